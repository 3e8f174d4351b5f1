import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from pallas_kernels import _backend, append_and_attend, select_head_attention
from pallas_kernels.attention import configs, triton

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


@dataclasses.dataclass
class Case:
    """Inputs whose every unneeded entry is poison, and what they should yield."""

    q: jax.Array
    k_cache: jax.Array
    v_cache: jax.Array
    lengths: jax.Array
    heads: jax.Array | None
    n_active: jax.Array | None
    expected: np.ndarray
    options: dict

    def paged(self, page=16, spare=3):
        """The same caches in shuffled pages, among others and behind trash of NaN.

        Returns:
            The case, whose options name the table.
        """
        b, k, s, d = self.k_cache.shape
        rng = np.random.default_rng(page + s)
        m = -(-s // page)
        table = 1 + rng.permutation(b * m + spare)[: b * m].reshape(b, m)
        pools = []
        for cache in (self.k_cache, self.v_cache):
            pool = np.full((1 + b * m + spare, k, page, d), np.nan, cache.dtype)
            rest = ((0, 0), (0, 0), (0, m * page - s), (0, 0))
            whole = np.pad(np.asarray(cache), rest, constant_values=np.nan)
            pool[table] = whole.reshape(b, k, m, page, d).swapaxes(1, 2)
            pools.append(jnp.asarray(pool))
        options = {**self.options, "table": jnp.asarray(table, jnp.int32)}
        keys, values = pools
        return dataclasses.replace(self, k_cache=keys, v_cache=values, options=options)

    @property
    def args(self):
        return (
            self.q,
            self.k_cache,
            self.v_cache,
            self.lengths,
            self.heads,
            self.n_active,
        )

    def check(self, out):
        assert out.dtype == self.q.dtype
        out = np.asarray(out, np.float64)
        assert np.all(out[self.expected == 0] == 0), "unselected heads must be zero"
        error = np.max(np.abs(out - self.expected))  # NaN fails the comparison
        assert error <= TOLERANCE[self.q.dtype.name], error


def make_case(
    b=3,
    h=6,
    k=3,
    s=40,
    d=64,
    dtype="float32",
    n=2,
    n_active=(2, 1, 0),
    lengths=None,
    **options,
):
    """A random case; lengths and n_active repeat along the batch, None means absent."""
    rng = np.random.default_rng(h * s + d)
    q = jnp.asarray(rng.normal(size=(b, h, d)), dtype)
    k_cache, v_cache = (rng.normal(size=(b, k, s, d)) for _ in range(2))
    lengths = np.resize((s, 1, 17) if lengths is None else lengths, b)
    heads = active = None
    selected = [range(k)] * b
    if n is not None:
        heads = np.stack([rng.permutation(k)[:n] for _ in range(b)])
        selected = list(heads)
        if n_active is not None:
            active = np.resize(n_active, b)
            selected = [row[:count] for row, count in zip(heads, active, strict=True)]
            for row, count in zip(heads, active, strict=True):
                row[count:] = rng.choice([-7, 10**6, k, *row[:count]], n - count)
    for i in range(b):
        unselected = np.setdiff1d(np.arange(k), selected[i])
        unseen = max(lengths[i] - options.get("window", s), 0)
        for cache in (k_cache, v_cache):
            cache[i, :, lengths[i] :] = rng.choice([np.nan, np.inf, -np.inf])
            cache[i, :, :unseen] = np.nan
            cache[i, unselected] = np.nan
    k_cache, v_cache = jnp.asarray(k_cache, dtype), jnp.asarray(v_cache, dtype)
    expected = attention_float64(q, k_cache, v_cache, lengths, selected, **options)
    indices = (
        None if a is None else jnp.asarray(a, jnp.int32)
        for a in (lengths, heads, active)
    )
    return Case(q, k_cache, v_cache, *indices, expected, options)


def attention_float64(
    q, k_cache, v_cache, lengths, selected, window=None, softcap=None
):
    q, k_cache, v_cache = (np.asarray(a, np.float64) for a in (q, k_cache, v_cache))
    out = np.zeros_like(q)
    g = q.shape[1] // k_cache.shape[1]
    for i, groups in enumerate(selected):
        for group in groups:
            first = max(lengths[i] - window, 0) if window else 0
            keys = k_cache[i, group, first : lengths[i]]
            values = v_cache[i, group, first : lengths[i]]
            if not len(keys):
                continue
            for head in range(group * g, (group + 1) * g):
                scores = keys @ q[i, head] / np.sqrt(q.shape[2])
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[i, head] = weights @ values / weights.sum()
    return out


def run(args, implementation, **options):
    attend = functools.partial(
        select_head_attention, implementation=implementation, **options
    )
    return jax.jit(attend)(*args)


CASES = {
    "gqa": dict(),
    "gqa-bfloat16-d128": dict(h=8, k=2, d=128, dtype="bfloat16", n=1, n_active=None),
    "mha-float16-d80": dict(h=5, k=5, d=80, dtype="float16", n=4, n_active=(4, 0, 2)),
    "mha-dense-d96": dict(h=3, k=3, d=96, n=None, lengths=(40, 0, 16)),
    "mqa-d256": dict(h=20, k=1, d=256, s=33, n=1, n_active=(1, 0, 1)),
    "empty-sequence": dict(lengths=(0, 40, 39)),
    "one-position": dict(s=1, lengths=(1, 0, 1)),
    "long": dict(b=2, s=1100, h=4, k=2, lengths=(1100, 300), n=2, n_active=(2, 1)),
    "window": dict(s=100, lengths=(100, 20, 47), window=21, n_active=(2, 2, 1)),
    "window-of-one": dict(lengths=(40, 1, 0), window=1, dtype="bfloat16", d=128),
    "long-window": dict(b=2, s=900, lengths=(900, 650), window=600, n=None),
    "softcap": dict(softcap=1.5, n=None, d=80),
    "softcap-and-window": dict(softcap=30.0, window=16, dtype="bfloat16"),
    "smollm2": dict(b=2, h=9, k=3, s=70, dtype="bfloat16", n=2, n_active=None),
}


@pytest.mark.parametrize("page", [None, 16, 48])
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, page, implementation):
    case = make_case(**CASES[name])
    case = case if page is None else case.paged(page)
    case.check(run(case.args, implementation, **case.options))


# Programs of many groups, of parts of groups, of one tile, of none; with pieces of a
# tile, of several, of a whole group.
@pytest.mark.parametrize(("programs", "piece"), [(1, 2), (5, 1), (5, 4), (40, 8)])
@pytest.mark.parametrize(("n", "window"), [(None, None), (2, 25)])
@pytest.mark.parametrize("page", [None, 32])
def test_shares_of_pieces(programs, piece, n, window, page, interpret):
    case = shared_case(n, window)
    case = case if page is None else case.paged(page)
    config = configs.Config(16, piece, programs, num_warps=4, num_stages=2)
    check_shares(case, config, interpret)


def shared_case(n, window):
    options = {} if window is None else {"window": window}
    active = (2, 1, 2, 0, 2)
    return make_case(
        b=5, s=90, n=n, lengths=(90, 3, 0, 33, 64), n_active=active, **options
    )


def check_shares(case, config, interpret):
    options = {**case.options, "config": config, "interpret": interpret}
    attend = jax.jit(functools.partial(triton.attend, scale=64**-0.5, **options))
    case.check(attend(*case.args)[0])
    # The same with the last position still to be written.
    new, caches = take_newest(case)
    out, *written = attend(case.q, *caches, *case.args[3:], new)
    case.check(out)
    check_appended(case, written)


def take_newest(case):
    """Each sequence's newest keys and values, and the caches with garbage instead."""
    last = np.asarray(case.lengths) - 1
    rows, row = np.arange(len(last)), np.maximum(last, 0)
    if "table" in case.options:
        page = case.k_cache.shape[2]
        rows = np.asarray(case.options["table"])[rows, row // page]
        row = row % page
    caches = case.k_cache, case.v_cache
    new = tuple(cache[rows, :, row] for cache in caches)
    at = rows[last >= 0], slice(None), row[last >= 0]
    return new, tuple(cache.at[at].set(np.nan) for cache in caches)


def check_appended(case, written):
    """The newest keys and values are where they belong, and all else as it was."""
    for cache, expected in zip(written, (case.k_cache, case.v_cache), strict=True):
        cache, expected = np.asarray(cache, "float32"), np.asarray(expected, "float32")
        np.testing.assert_array_equal(cache, expected)  # NaN equals NaN here


@pytest.mark.parametrize("page", [None, 32])
@pytest.mark.parametrize("name", ["gqa", "mha-dense-d96", "window", "softcap", "long"])
def test_append_and_attend(name, page, implementation):
    case = make_case(**CASES[name])
    case = case if page is None else case.paged(page)
    new, caches = take_newest(case)
    checked = jaxtyped(typechecker=beartype)(append_and_attend)
    attend = functools.partial(checked, implementation=implementation, **case.options)
    out, *written = jax.jit(attend)(case.q, *new, *caches, *case.args[3:])
    case.check(out)
    check_appended(case, written)


# Lists of entries of a table for each group, or one for all; the last is empty.
@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("piece", [1, 8])
def test_lists_of_pages(shared, appends, piece, implementation):
    b, k, s, page = 4, 3, 230, 32
    lengths = (230, 70, 33, 224)
    case = make_case(b=b, s=s, lengths=lengths, n=2, n_active=(2, 1, 2, 2))
    rng = np.random.default_rng(piece)
    m = -(-s // page)
    lists = np.full((b, 1 if shared else k, 5), 7)
    counts = rng.integers(1, 4, lists.shape[:2])
    counts[3, 0] = 0
    lists[:] = rng.choice([-3, 10**6, 0], lists.shape)  # behind the counts, anything
    selected = np.asarray(case.heads)
    for i, j in np.ndindex(*lists.shape[:2]):
        lists[i, j, : counts[i, j]] = rng.permutation(m)[: counts[i, j]]
    case.expected[:] = 0
    q, keys, values = (
        np.asarray(x, np.float64) for x in (case.q, case.k_cache, case.v_cache)
    )
    for i in range(b):
        for group in selected[i, : case.n_active[i]]:
            row = 0 if shared else group
            entries = lists[i, row, : counts[i, row]]
            at = {x for e in entries for x in range(e * page, (e + 1) * page)}
            if appends and len(entries):
                at.add(lengths[i] - 1)
            at = sorted(x for x in at if x < lengths[i])
            if at:
                case.expected[i, 2 * group : 2 * group + 2] = exact(
                    q[i, 2 * group : 2 * group + 2],
                    keys[i, group],
                    values[i, group],
                    at,
                )
    case = case.paged(page)
    lists, counts = (jnp.asarray(x, jnp.int32) for x in (lists, counts))
    options = {**case.options, "pages": lists, "n_pages": counts}
    if implementation != "xla":
        config = configs.Config(16, piece, 7, num_warps=4, num_stages=2)
        options = {
            **case.options,
            "pages": (lists, counts),
            "scale": 64**-0.5,
            "interpret": implementation == "triton_interpret",
            "config": config,
        }
        new, caches = take_newest(case) if appends else (None, case.args[1:3])
        out, *_ = triton.attend(case.q, *caches, *case.args[3:], new, **options)
    elif appends:
        new, caches = take_newest(case)
        out, *_ = append_and_attend(
            case.q,
            *new,
            *caches,
            *case.args[3:],
            implementation=implementation,
            **options,
        )
    else:
        out = run(case.args, implementation, **options)
    case.check(out)


def exact(q, keys, values, at):
    """Attention of some queries [g, d] to some positions, in float64."""
    scores = q @ keys[at].T / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights @ values[at] / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [None, 2])
def test_a_result_is_the_same_bits_among_any_mates(n, dtype, implementation):
    case = make_case(
        b=6,
        s=700,
        n=n,
        n_active=(2,),
        dtype=dtype,
        lengths=(700, 3, 650, 70, 520, 0),
    ).paged(64)
    want = np.asarray(run(case.args, implementation, **case.options))
    rng = np.random.default_rng(0)
    for _ in range(4):
        order = rng.permutation(6)
        lengths = np.asarray(case.lengths)[order]
        lengths[3:] = rng.integers(0, 701, 3)  # other mates
        others = [case.heads, case.n_active, case.options["table"]]
        heads, n_active, table = (x if x is None else x[order] for x in others)
        if n_active is not None:
            n_active = n_active.at[3:].set(rng.integers(0, 3))
        found = run(
            (case.q[order], *case.args[1:3], jnp.asarray(lengths), heads, n_active),
            implementation,
            **{**case.options, "table": table},
        )
        np.testing.assert_array_equal(np.asarray(found)[:3], want[order[:3]])


def test_append_refuses_other_shapes_and_dtypes():
    case = make_case()
    new = jnp.zeros((3, 3, 64))
    message = r"v_new is float32\[3, 2, 64\]; it must be float32\[3, 3, 64\]"
    with pytest.raises(ValueError, match=message):
        append_and_attend(case.q, new, new[:, :2], *case.args[1:])
    with pytest.raises(ValueError, match="k_new is bfloat16"):
        append_and_attend(case.q, new.astype("bfloat16"), new, *case.args[1:])


def test_nothing_to_read(implementation):
    case = make_case(b=2, lengths=(0, 0))
    case.check(run(case.args, implementation))
    case = make_case(b=2, s=500, n_active=(0, 0), lengths=(500, 3))
    case.check(run(case.args, implementation))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("h", "k"), [(6, 6), (6, 3), (34, 2)])
def test_sweep(dtype, d, h, k, implementation):
    for s in (15, 700):
        case = make_case(
            h=h,
            k=k,
            s=s,
            d=d,
            dtype=dtype,
            n=max(k - 1, 1),
            n_active=None,
            lengths=(s, 1, s - 2),
        )
        case.check(run(case.args, implementation))


def test_density_one_is_dense(implementation):
    case = make_case(n=3, n_active=(3,), lengths=(40, 0, 7))
    sparse = run(case.args, implementation)
    dense = run(case.args[:4], implementation)
    tolerance = TOLERANCE[case.q.dtype.name]
    np.testing.assert_allclose(*(np.float32(x) for x in (sparse, dense)), tolerance)


def test_a_sequence_does_not_depend_on_its_batch_mates(implementation):
    case = make_case(n_active=(2, 2, 2))
    spoiled = case.q.at[1:].set(jnp.nan)
    out = run((spoiled, *case.args[1:]), implementation)
    assert np.all(np.isnan(out[1:]).any(axis=2).sum(axis=1) == 4)
    case.expected, case.q = case.expected[:1], case.q[:1]
    case.check(out[:1])


def test_large_scores_do_not_overflow(implementation):
    # Ever larger scores: each block outweighs all that came before it.
    s, d = 304, 64
    dtype = jnp.float32
    position = jnp.arange(s, dtype=jnp.float32)[:, None]
    keys = jnp.broadcast_to(position, (1, 1, s, d)).astype(dtype)
    values = jnp.where(position == s - 1, 2.0, 1e30).astype(dtype)
    values = jnp.broadcast_to(values, keys.shape)
    q, lengths = jnp.full((1, 1, d), 1e4, dtype), jnp.array([s], jnp.int32)
    out = run((q, keys, values, lengths), implementation)
    np.testing.assert_allclose(out, 2.0, rtol=1e-6)


def test_scale(implementation):
    case = make_case()
    case.check(run((2.0 * case.q, *case.args[1:]), implementation, scale=0.5 / 8.0))


def test_under_jit_in_a_scan(implementation):
    case = make_case()

    @jax.jit
    def steps(lengths):
        def step(lengths, _):
            args = (*case.args[:3], lengths, *case.args[4:])
            return lengths + 1, run(args, implementation)

        return jax.lax.scan(step, lengths, length=3)[1]

    case.check(steps(case.lengths - 2)[-1])


def test_annotations_hold(implementation):
    checked = jaxtyped(typechecker=beartype)(select_head_attention)
    case = make_case()
    case.check(checked(*case.args, implementation=implementation))
    dense = make_case(n=None)
    dense.check(checked(*dense.args, implementation=implementation))


# The message, and the changes to a good call that must raise it.
WRONG = {
    r"q has shape \(6, 64\).*\[b, h, d\]": lambda c: dict(q=c.q[0]),
    r"k_cache has shape.*must be \[3, k, s, 64\]": lambda c: dict(
        k_cache=c.k_cache[..., :32]
    ),
    r"v_cache has shape.*that of k_cache": lambda c: dict(v_cache=c.v_cache[:, :2]),
    r"no axis may be empty": lambda c: dict(
        k_cache=c.k_cache[:, :, :0], v_cache=c.v_cache[:, :, :0]
    ),
    r"q has 5 heads; it must be a multiple": lambda c: dict(q=c.q[:, :5]),
    r"q has dtype int32; it must be one of": lambda c: dict(q=c.q.astype(jnp.int32)),
    r"v_cache has dtype float16; it must be that of q": lambda c: dict(
        v_cache=c.v_cache.astype(jnp.float16)
    ),
    r"lengths is float32\[3\]; it must be int32\[3\]": lambda c: dict(
        lengths=c.lengths.astype(jnp.float32)
    ),
    r"heads has shape \(2, 2\); it must be \[3, n\] with n in 1..3": lambda c: dict(
        heads=c.heads[:2]
    ),
    r"heads is float32": lambda c: dict(heads=c.heads.astype(jnp.float32)),
    r"n_active is int32\[2\]; it must be int32\[3\]": lambda c: dict(
        n_active=c.n_active[:2]
    ),
    r"n_active is given without heads": lambda c: dict(heads=None),
}


# The same of pages.
WRONG_PAGES = {
    r"table has shape \(2, 1\); it must be \[3, m\]": dict(
        table=np.zeros((2, 1), "i4")
    ),
    r"table is int16\[3, 1\]; it must be int32": dict(table=np.zeros((3, 1), "i2")),
    r"pages is given without n_pages": dict(pages=np.zeros((3, 1, 1), "i4")),
    r"n_pages is given without pages": dict(n_pages=np.zeros((3, 1), "i4")),
    r"pages is given without a table": dict(
        pages=np.zeros((3, 1, 1), "i4"), n_pages=np.zeros((3, 1), "i4"), table=None
    ),
    r"pages has shape \(3, 2, 1\); it must be \[3, 3, p\]": dict(
        pages=np.zeros((3, 2, 1), "i4"), n_pages=np.zeros((3, 2), "i4")
    ),
    r"n_pages is int32\[3, 3\]; it must be int32\[3, 1\]": dict(
        pages=np.zeros((3, 1, 1), "i4"), n_pages=np.zeros((3, 3), "i4")
    ),
}


@pytest.mark.parametrize("message", WRONG_PAGES)
def test_wrong_pages(message):
    case = make_case()
    table = jnp.zeros((3, 1), jnp.int32)
    options = {"table": table, **WRONG_PAGES[message]}
    with pytest.raises(ValueError, match=message):
        select_head_attention(*case.args, **options)


def test_pages_that_the_kernel_cannot_serve():
    case = make_case().paged(20)
    with pytest.raises(NotImplementedError, match="multiple of 16 positions, not 20"):
        select_head_attention(*case.args, implementation="triton", **case.options)
    case.check(select_head_attention(*case.args, implementation="xla", **case.options))


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    case = make_case()
    case = dataclasses.replace(case, **WRONG[message](case))
    with pytest.raises(ValueError, match=message):
        select_head_attention(*case.args)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'cuda'; it must be one of 'xla'"):
        select_head_attention(*make_case().args, implementation="cuda")


@pytest.mark.parametrize("option", ["window", "softcap"])
def test_options_must_be_positive(option):
    with pytest.raises(ValueError, match=f"{option} is 0; it must be positive"):
        select_head_attention(*make_case().args, **{option: 0})


@pytest.mark.parametrize(("h", "d"), [(129, 64), (1, 512)])
def test_what_the_kernel_cannot_serve(h, d):
    case = make_case(b=1, h=h, k=1, d=d, s=4, n=None, lengths=(4,))
    with pytest.raises(NotImplementedError, match="'xla' serves any"):
        select_head_attention(*case.args, implementation="triton")
    case.check(select_head_attention(*case.args, implementation="xla"))


def test_default_implementation():
    on_gpu = jax.default_backend() == "gpu"
    expected = "triton" if on_gpu else "xla"
    assert _backend.default_implementation() == expected


# b, h, k, s, d, n of the models: their decode shapes, long enough to be split or not.
MODELS = {
    "opt-66b": (64, 72, 72, 1920, 128, 21),
    "opt-2.7b": (16, 32, 32, 2048, 80, 16),
    "llama-2-7b": (16, 32, 32, 4096, 128, 16),
    "llama-3.1-8b": (64, 32, 8, 4096, 128, 5),
    "llama-3.1-70b": (16, 64, 8, 8192, 128, 5),
    "llama-3.1-8b-long": (1, 32, 8, 65536, 128, 4),
    "smollm2-135m": (8, 9, 3, 2048, 64, 2),
    "head-dim-256": (4, 16, 8, 1000, 256, 3),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_lowers_for_cuda(model, dtype, lower_for_cuda, monkeypatch):
    b, h, k, s, d, n = MODELS[model]
    spec = jax.ShapeDtypeStruct
    cache = spec((b, k, s, d), dtype)
    arrays = (spec((b, h, d), dtype), cache, cache, spec((b,), "int32"))
    selection = (spec((b, n), "int32"), spec((b,), "int32"))

    def attend(*args):
        return select_head_attention(*args, implementation="triton")

    # A named kernel must not ask which backend this host has.
    monkeypatch.setattr(jax, "default_backend", None)
    for args in (arrays, arrays + selection):
        text = lower_for_cuda(attend, *args)
        assert text.count("@__gpu$xla.gpu.triton") == 2
        # The caches go to the kernel as they are: no copy in another order.
        assert "stablehlo.transpose" not in text
        assert "stablehlo.gather" not in text


@pytest.mark.parametrize("lists", [None, "shared", "own"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "opt-2.7b", "smollm2-135m"])
def test_pages_lower_for_cuda(model, lists, lower_for_cuda):
    b, h, k, s, d, n = MODELS[model]
    spec, index = (
        jax.ShapeDtypeStruct,
        functools.partial(jax.ShapeDtypeStruct, dtype="i4"),
    )
    pool, new = (spec(x, "bfloat16") for x in ((1000, k, 64, d), (b, k, d)))
    arrays = [spec((b, h, d), "bfloat16"), new, new, pool, pool, index((b,))]
    arrays += [index((b, n)), index((b,)), index((b, s // 64))]
    if lists is not None:
        rows = 1 if lists == "shared" else k
        arrays += [index((b, rows, 16)), index((b, rows))]

    def attend(*args):
        options = dict(zip(("table", "pages", "n_pages"), args[8:], strict=False))
        return append_and_attend(*args[:8], implementation="triton", **options)

    text = lower_for_cuda(attend, *arrays)
    assert text.count("@__gpu$xla.gpu.triton") == 2
    assert "stablehlo.transpose" not in text
    assert "stablehlo.gather" not in text


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("s", [1, 100, 8192])
def test_heuristic_fits_the_hardware(itemsize, d, s):
    for b, n, g in ((1, 1, 1), (1, 8, 4), (16, 5, 8), (64, 72, 1), (4, 1, 128)):
        facts = {"b": b, "n": n, "g": g, "s": s, "d": d, "itemsize": itemsize}
        found = []
        for page in (None, 64):
            found.append(configs.heuristic(**facts, page=page))
            assert 1 <= found[-1].programs and found[-1].piece.bit_count() == 1
        assert 64 % found[-1].block == 0
        for config in found:
            assert config.block >= 16 and config.block.bit_count() == 1
            assert config.programs <= b * n * -(-s // config.block)
            padded = 1 << (d - 1).bit_length()
            tiles = 2 * config.block * padded * itemsize * config.num_stages
            assert tiles <= 96 * 1024
