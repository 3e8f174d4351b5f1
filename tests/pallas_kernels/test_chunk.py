import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from pallas_kernels import attend_chunk
from pallas_kernels.attention import chunk_triton
from pallas_kernels.attention.chunk_triton import Config, heuristic
from pallas_kernels.attention.items import Items
from tests.pallas_kernels.paged import expected, make_world

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


def run(args, implementation, **options):
    attend = functools.partial(attend_chunk, implementation=implementation, **options)
    return jax.jit(attend)(*args)


# Sequences whole, behind a prefix, of one row; rows of no piece between them.
PIECES = [(0, 25, 45, 3), (1, 0, 33, 60), (2, 0, 1, 50), (0, 7, 2, 94)]
CASES = {
    "gqa-3": dict(),
    "gqa-4-bfloat16-d128": dict(h=8, k=2, d=128, dtype="bfloat16"),
    "mha-float16-d80": dict(h=3, k=3, d=80, dtype="float16"),
    "mqa-d256": dict(h=5, k=1, d=256),
    "odd-page": dict(page=24, h=4, k=4, d=8),
    "page-of-one": dict(page=1, h=2, k=2, d=16),
    "page-64": dict(page=64, h=2, k=1, d=64, dtype="bfloat16"),
    "window": dict(window=9),
    "window-of-one": dict(window=1, h=4, k=1, dtype="bfloat16"),
    "long-window": dict(window=1000, d=80),
    "softcap": dict(softcap=1.5),
    "softcap-and-window": dict(softcap=30.0, window=40, h=4, k=4, dtype="bfloat16"),
    "scale": dict(scale=0.7, page=64),
}
OPTIONS = ("window", "softcap", "scale")


def parts(case):
    """What of a case makes the world, and what the call."""
    options = {name: case[name] for name in OPTIONS if name in case}
    return {name: case[name] for name in case if name not in OPTIONS}, options


def check(out, wanted, dtype):
    assert out.dtype == dtype
    out = np.asarray(out, np.float64)
    rowless = np.all(wanted == 0, axis=(1, 2))
    assert np.all(out[rowless] == 0), "rows of no piece must be zero"
    error = np.max(np.abs(out - wanted))  # NaN fails the comparison
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, implementation):
    shape, options = parts(CASES[name])
    world = make_world(**shape)
    out = run(
        world.args(100, PIECES, window=options.get("window")), implementation, **options
    )
    check(out, expected(world, 100, PIECES, **options), world.dtype)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 64), (16, 128)])
@pytest.mark.parametrize("name", ["gqa-3", "mha-float16-d80", "odd-page", "window"])
def test_configs(name, blocks, split, interpret):
    shape, options = parts(CASES[name])
    world = make_world(**shape)
    args = world.args(100, PIECES, window=options.get("window"))
    scale = world.q[0].shape[2] ** -0.5
    out = chunk_triton.attend(
        *args,
        scale=scale,
        **options,
        config=Config(*blocks, num_warps=4, num_stages=2, split=split),
        interpret=interpret,
    )
    check(out, expected(world, 100, PIECES, **options), world.dtype)


def test_nothing_to_do(implementation):
    out = run(make_world().args(7, []), implementation)
    assert out.shape == (7, 6, 64) and not np.any(out)


def test_every_row_a_piece(implementation):
    world = make_world()
    pieces = [(0, x, 1, 9 - x) for x in range(10)]
    out = run(world.args(10, pieces, r=16), implementation)
    check(out, expected(world, 10, pieces), "float32")


def packings(world, n, seed):
    """Ways to compute all rows of all sequences: lists of calls, lists of pieces."""
    rng = np.random.default_rng(seed)
    pieces = []
    for slot, q in enumerate(world.q):
        cuts = rng.integers(0, len(q), rng.integers(0, 5))
        borders = np.unique([0, len(q), *cuts])
        pieces += [(slot, int(a), int(b - a)) for a, b in itertools.pairwise(borders)]
    calls, call, row = [], [], 0
    for i in rng.permutation(len(pieces)):
        slot, first, count = pieces[i]
        row += int(rng.integers(0, 9))
        if row + count > n or len(call) == 5:
            calls.append(call)
            call, row = [], 0
        call.append((slot, first, count, row))
        row += count
    return [*calls, call]


def rows_of(attend, world, n, calls, window):
    """The outputs of all positions of all sequences."""
    out = [np.full(q.shape, np.nan, np.float32) for q in world.q]
    for pieces in calls:
        result = np.asarray(attend(*world.args(n, pieces, window=window)), np.float32)
        for slot, first, count, start in pieces:
            out[slot][first : first + count] = result[start : start + count]
    assert not any(np.isnan(x).any() for x in out)
    return out


INVARIANT = {
    "gqa-4-bfloat16": dict(h=4, k=1, d=128, dtype="bfloat16", page=64),
    "gqa-3-float32": dict(h=3, k=1, d=64, page=64),
    "mha-d80-float16": dict(h=2, k=2, d=80, dtype="float16", page=64),
    "small-page": dict(h=4, k=2, d=64, page=8),
    "window": dict(h=3, k=1, d=64, page=64, window=130),
    "short-window": dict(h=3, k=1, d=64, page=16, window=7, dtype="bfloat16"),
    "softcap": dict(h=2, k=1, d=64, page=64, softcap=2.0),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_bits_do_not_depend_on_the_packing(name, implementation):
    shape, options = parts(INVARIANT[name])
    world = make_world(**shape, lengths=(560, 300, 75, 1))
    attend = jax.jit(
        functools.partial(attend_chunk, implementation=implementation, **options)
    )
    whole = [[(slot, 0, len(q), 0)] for slot, q in enumerate(world.q)]
    window = options.get("window")
    wanted = rows_of(attend, world, 570, whole, window)
    for seed in range(3):
        calls = packings(world, 570, seed)
        found = rows_of(attend, world, 570, calls, window)
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("rows", [100, 260])
def test_bits_do_not_depend_on_how_many_rows_a_call_has(rows, implementation):
    world = make_world(lengths=(90,), dtype="bfloat16")
    outs = [
        run(world.args(n, [(0, 20, 70, n - 75)]), implementation)[n - 75 : n - 5]
        for n in (80, rows)
    ]
    np.testing.assert_array_equal(*(np.float32(x) for x in outs))


def test_bits_do_not_depend_on_the_mask(interpret):
    world = make_world(lengths=(300,), h=4, k=1, dtype="bfloat16")
    args = world.args(300, [(0, 0, 300, 0)])
    outs = [
        chunk_triton.attend(
            *args,
            scale=0.125,
            config=Config(64, 32, num_warps=4, num_stages=2, split=split),
            interpret=interpret,
        )
        for split in (True, False)
    ]
    np.testing.assert_array_equal(*(np.float32(x) for x in outs))


def test_large_scores_do_not_overflow(implementation):
    # Ever larger scores: each tile outweighs all that came before it.
    world = make_world(h=1, k=1, lengths=(304,), page=16)
    position = np.arange(304, dtype=np.float32)[:, None, None]
    world.keys[0] = np.broadcast_to(position, (304, 1, 64))
    world.values[0] = np.broadcast_to(
        np.where(position == 303, 2.0, 1e30), (304, 1, 64)
    )
    world.q[0][:] = 1e4
    out = run(world.args(2, [(0, 302, 2, 0)]), implementation)
    np.testing.assert_allclose(out[0], 1e30, rtol=1e-6)
    np.testing.assert_allclose(out[1], 2.0, rtol=1e-6)


def test_under_jit_in_a_scan(implementation):
    world = make_world()
    args = world.args(100, PIECES)

    @jax.jit
    def steps(q):
        def step(q, _):
            return q, run((q, *args[1:]), implementation)

        return jax.lax.scan(step, q, length=2)[1]

    check(steps(args[0])[-1], expected(world, 100, PIECES), "float32")


def test_annotations_hold(implementation):
    checked = jaxtyped(typechecker=beartype)(attend_chunk)
    world = make_world()
    out = checked(*world.args(100, PIECES), implementation=implementation)
    check(out, expected(world, 100, PIECES), "float32")


NAMES = "q k_pages v_pages table slots starts counts firsts".split()
# The message, and the changes to a good call that must raise it.
WRONG = {
    r"q has shape \(6, 64\).*\[n, h, d\]": lambda c: dict(q=c["q"][0]),
    r"k_pages has shape.*must be \[p, k, page, 64\]": lambda c: dict(
        k_pages=c["k_pages"][..., :32]
    ),
    r"v_pages has shape.*that of k_pages": lambda c: dict(v_pages=c["v_pages"][:2]),
    r"no axis may be empty": lambda c: dict(q=c["q"][:0]),
    r"q has 5 heads; it must be a multiple": lambda c: dict(q=c["q"][:, :5]),
    r"q has dtype int32; it must be one of": lambda c: dict(q=c["q"].astype(int)),
    r"v_pages has dtype float16; it must be that of q": lambda c: dict(
        v_pages=c["v_pages"].astype(jnp.float16)
    ),
    r"table is int32\[6\]; it must be int32\[slots, m\]": lambda c: dict(
        table=c["table"][0]
    ),
    r"table is float32": lambda c: dict(table=c["table"].astype(float)),
    r"slots is empty": lambda c: dict(slots=c["slots"][:0]),
    r"counts is int32\[2\]; .* must be int32\[r\]": lambda c: dict(
        counts=c["counts"][:2]
    ),
    r"firsts is float32\[5\]": lambda c: dict(firsts=c["firsts"].astype(float)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    good = dict(zip(NAMES, make_world().args(100, PIECES), strict=True))
    with pytest.raises(ValueError, match=message):
        attend_chunk(**good | WRONG[message](good))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_options_must_be_positive(option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}; it must be positive"):
        attend_chunk(*make_world().args(100, PIECES), **{option: value})


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'cuda'; it must be one of 'xla'"):
        attend_chunk(*make_world().args(100, PIECES), implementation="cuda")


@pytest.mark.parametrize(("h", "d"), [(129, 8), (1, 512)])
def test_what_the_kernel_cannot_serve(h, d):
    world = make_world(h=h, k=1, d=d, lengths=(9,))
    args = world.args(9, [(0, 0, 9, 0)])
    with pytest.raises(NotImplementedError, match="'xla' serves any"):
        attend_chunk(*args, implementation="triton")
    out = attend_chunk(*args, implementation="xla")
    check(out, expected(world, 9, [(0, 0, 9, 0)]), "float32")


# h, k, d of the models.
MODELS = {
    "llama-3.1-8b": (32, 8, 128),
    "llama-3.1-70b": (64, 8, 128),
    "smollm2-135m": (9, 3, 64),
    "opt-2.7b": (32, 32, 80),
    "head-dim-256": (16, 8, 256),
}


@pytest.mark.parametrize(
    ("dtype", "window"), [("bfloat16", None), ("float32", None), ("bfloat16", 4096)]
)
@pytest.mark.parametrize("model", MODELS)
def test_lowers_for_cuda(model, dtype, window, lower_for_cuda, monkeypatch):
    h, k, d = MODELS[model]
    spec = jax.ShapeDtypeStruct
    pages = spec((4000, k, 64, d), dtype)
    pieces = [spec((64,), "int32")] * 4

    def attend(*args):
        return attend_chunk(*args, window=window, implementation="triton")

    # A named kernel must not ask which backend this host has.
    monkeypatch.setattr(jax, "default_backend", None)
    for n in (512, 2048):
        args = spec((n, h, d), dtype), pages, pages, spec((256, 64), "int32"), *pieces
        text = lower_for_cuda(attend, *args)
        assert text.count("@__gpu$xla.gpu.triton") == 1
        # The pool goes to the kernel as it is: no copy, in whatever order.
        for copy in ("transpose", "gather", "slice", "reshape", "copy"):
            assert f"stablehlo.{copy}" not in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_copy_of_the_pool(dtype):
    spec = jax.ShapeDtypeStruct
    pages = spec((4000, 3, 64, 64), dtype)  # 98 MB
    args = spec((64, 9, 64), dtype), pages, pages, spec((8, 64), "int32")
    attend = jax.jit(functools.partial(attend_chunk, implementation="xla"))
    compiled = attend.lower(*args, *[spec((8,), "int32")] * 4).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < 4e6


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("g", [1, 3, 4, 8, 128])
def test_heuristic_fits_the_hardware(g, d, itemsize):
    config = heuristic(g=g, d=d, itemsize=itemsize)
    assert config.block_q >= max(g, 16) and config.block_q.bit_count() == 1
    assert 16 <= config.block_k <= 128 and config.block_k.bit_count() == 1
    padded = 1 << (d - 1).bit_length()
    tiles = 2 * config.block_k * padded * itemsize * config.num_stages
    assert tiles + config.block_q * padded * itemsize <= 227 * 1024


def test_items_cover_every_row_once():
    rng = np.random.default_rng(0)
    for _ in range(15):
        r, rows = int(rng.integers(1, 9)), int(rng.integers(1, 20))
        counts = rng.integers(-30, 40, r)
        items = Items(n=int(counts.clip(0).sum()) + 3, r=r, rows=rows)
        total = int(items.counts(jnp.asarray(counts)).sum())
        assert total <= items.most
        seen = []
        for item in range(total):
            piece, skipped = map(int, items.find(jnp.asarray(counts), item))
            seen += [(piece, i) for i in range(skipped, counts[piece])[:rows]]
        assert seen == [(i, j) for i in range(r) for j in range(counts[i])]
