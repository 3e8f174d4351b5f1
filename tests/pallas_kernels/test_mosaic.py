"""What is specific to the Mosaic backend; test_attention.py holds what all share."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import select_head_attention
from pallas_kernels.attention import hopper, mosaic, stream
from pallas_kernels.attention.shares import Work

needs_mosaic = pytest.mark.usefixtures("mosaic_serves")
# The interpreter multiplies the poisoned rows, as the tensor cores do.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered in matmul:RuntimeWarning"
)


def make_args(
    b=3, h=6, k=3, s=200, d=64, dtype="bfloat16", n=2, n_active=(2, 1, 0), lengths=None
):
    """Random arguments of `attend`, poisoned wherever nothing may be read."""
    rng = np.random.default_rng(h * s + d)
    q = jnp.asarray(rng.normal(size=(b, h, d)), dtype)
    caches = rng.normal(size=(2, b, k, s, d))
    lengths = np.resize((s, 1, 130) if lengths is None else lengths, b)
    n_active = np.resize(n_active, b)
    heads = np.stack([rng.permutation(k)[:n] for _ in range(b)])
    for i in range(b):
        caches[:, i, :, lengths[i] :] = rng.choice([np.nan, np.inf, -np.inf])
        caches[:, i, np.setdiff1d(np.arange(k), heads[i, : n_active[i]])] = np.nan
        heads[i, n_active[i] :] = rng.choice([-7, 10**6, k], n - n_active[i])
    indices = (jnp.asarray(x, jnp.int32) for x in (lengths, heads, n_active))
    return (q, *jnp.asarray(caches, dtype), *indices)


def check(args, interpret, config=None, **options):
    options = {"scale": args[0].shape[-1] ** -0.5, **options}
    out, *_ = mosaic.attend(*args, interpret=interpret, config=config, **options)
    expected = select_head_attention(*args, **options, implementation="xla")
    assert out.dtype == expected.dtype
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    assert np.all(out[expected == 0] == 0), "unselected heads must be zero"
    np.testing.assert_allclose(out, expected, atol=1e-2)  # NaN fails too


@needs_mosaic
@pytest.mark.parametrize("programs", [1, 3, 11])
def test_pieces(programs, interpret):
    # 1 program: the ring goes on from group to group. 11: 8 tiles, so some are idle.
    args = make_args(h=4, k=2, s=256, n_active=(2, 2, 1), lengths=(256, 0, 63))
    check(args, interpret, hopper.Config(block=64, stages=2, programs=programs))


@needs_mosaic
def test_dense_in_a_scan(interpret):
    args = make_args(h=4, k=2, n_active=(2,))[:4]

    def step(lengths, _):
        config = hopper.Config(block=64, stages=2, programs=2)
        options = dict(scale=0.1, interpret=interpret, config=config)
        out, *_ = mosaic.attend(*args[:3], lengths, None, None, **options)
        return lengths + 1, out

    lengths = args[3] - 1
    outs = jax.lax.scan(step, lengths, length=2)[1]
    for i, out in enumerate(outs):
        expected = select_head_attention(
            *args[:3], lengths + i, scale=0.1, implementation="xla"
        )
        np.testing.assert_allclose(out, expected, atol=1e-2)


@needs_mosaic
@pytest.mark.parametrize("window", [1, 70, 1000])
def test_window_and_softcap(window, interpret):
    args = make_args(lengths=(200, 1, 131), n_active=(1,), n=1)
    config = hopper.Config(block=64, stages=2, programs=2)
    check(args, interpret, config, window=window, softcap=2.0, scale=0.5)


@needs_mosaic
@pytest.mark.parametrize("h", [2, 4])
def test_many_pieces(h, interpret):
    # 10 pieces for each of two groups, more than are combined at once, for a share cuts
    # both; and two parts of 64 columns.
    args = make_args(h=h, k=2, s=1216, d=128, n_active=(2,), lengths=(0, 1210, 0))
    config = hopper.Config(block=64, stages=1, programs=19)
    check(args, interpret, config, scale=0.25)


@needs_mosaic
def test_many_sequences(interpret):
    # More than are looked up in one round, and most have nothing to read.
    lengths = (0, 64, 0, 1, 0, 0, 40)
    args = make_args(b=70, h=2, k=1, s=64, d=16, n=1, n_active=(1, 0), lengths=lengths)
    check(args, interpret, hopper.Config(block=64, stages=1, programs=4))


@functools.partial(jax.jit, static_argnums=0)
def find_shares(work, lengths, n_active):
    def tiles(i):
        return work.tiles(lengths[i])[1] * work.groups(n_active[i])

    programs = jnp.arange(work.programs, dtype=jnp.int32)
    find = functools.partial(stream.find_share, tiles, len(lengths), work)
    return jax.vmap(find)(programs)


@pytest.mark.parametrize("window", [None, 1, 100])
def test_every_tile_is_read_once(window):
    rng = np.random.default_rng(0)
    cases = ((1, 1, 1), (8, 4, 7), (5, 2, 40), (3, 4, 132), (65, 3, 132), (130, 1, 20))
    for b, n, programs in cases:
        work = Work(s=500, n=n, block=64, programs=programs, window=window)
        lengths = rng.integers(-5, 600, b) * rng.integers(0, 2, b)
        n_active = rng.integers(-1, n + 2, b)
        tiles = np.ceil(np.clip(lengths, 0, 500) / 64).astype(int)
        if window:
            tiles -= np.maximum(np.clip(lengths, 0, 500) - window, 0) // 64
        line = np.repeat(np.arange(b), tiles * np.clip(n_active, 0, n))
        begins = np.searchsorted(line, np.arange(b))
        total = len(line)

        indices = (jnp.asarray(x, jnp.int32) for x in (lengths, n_active))
        found = find_shares(work, *indices)
        totals, sequence, skip, count = (np.asarray(x) for x in found)
        assert np.all(totals == total)
        owners = np.repeat(np.arange(programs), count)
        assert len(owners) == total and count.max() - count.min() <= 1
        assert np.all((sequence >= 0) & (sequence < b) & (skip >= 0))
        if total:
            assert np.array_equal(work.owner(total, jnp.arange(total)), owners)
            busy = count > 0
            begin = (np.cumsum(count) - count)[busy]
            assert np.array_equal(sequence[busy], line[begin])
            assert np.array_equal(skip[busy], begin - begins[line[begin]])


# b, h, k, s, d, n of the models.
MODELS = {
    "opt-66b": (64, 72, 72, 1920, 128, 21),
    "opt-2.7b": (16, 32, 32, 2048, 80, 16),
    "llama-2-7b": (16, 32, 32, 4096, 128, 16),
    "llama-3.1-8b": (64, 32, 8, 4096, 128, 5),
    "llama-3.1-70b": (16, 64, 8, 8192, 128, 5),
    "llama-3.1-8b-long": (1, 32, 8, 65536, 128, 4),
    "smollm2-135m": (8, 9, 3, 2048, 64, 2),
    "head-dim-256": (4, 16, 8, 1000, 256, 3),
    "mqa": (70, 64, 1, 1000, 128, 1),
}


def specs(b, h, k, s, d, n, dtype="bfloat16"):
    spec = jax.ShapeDtypeStruct
    cache, lengths = spec((b, k, s, d), dtype), spec((b,), "int32")
    return spec((b, h, d), dtype), cache, cache, lengths, spec((b, n), "int32"), lengths


@needs_mosaic
@pytest.mark.parametrize("model", MODELS)
def test_lowers_for_cuda(model, lower_for_cuda, monkeypatch):
    # A named kernel must not ask which backend this host has.
    monkeypatch.setattr(jax, "default_backend", None)
    args = specs(*MODELS[model])
    if args[4].shape[1] == args[1].shape[1]:  # dense if it selects all groups
        args = (*args[:4], None, None)
    text = lower_for_cuda(functools.partial(mosaic.attend, scale=0.1), *args)
    # Nothing but the two kernels, so that no kernel of XLA's runs before them and the
    # caches go to them as they are, not copied in another order.
    operations = re.findall(r"= stablehlo\.(\w+)", text)
    assert operations == ["custom_call", "custom_call", "optimization_barrier"]
    assert text.count("custom_call @mosaic_gpu") == 2


@needs_mosaic
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("not float32", dict(dtype="float32")),
        ("not a head dim of 512", dict(d=512)),
        ("not a head dim of 72", dict(d=72)),
        ("33 heads per group", dict(h=33, k=1, d=256)),
        ("a multiple of 8, not 100", dict(s=100)),
    ],
)
def test_what_the_kernel_cannot_serve(message, changes):
    shape = {**dict(b=1, h=2, k=1, s=64, d=64, n=1), **changes}
    attend = functools.partial(mosaic.attend, scale=1.0)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(attend, *specs(**shape))


@needs_mosaic
def test_the_interpreter_would_hang_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attend = functools.partial(mosaic.attend, scale=1.0, interpret=True)
    with pytest.raises(NotImplementedError, match="JAX_PLATFORMS=cpu"):
        jax.eval_shape(attend, *specs(1, 2, 1, 64, 64, 1))


def test_needs_a_newer_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    attend = functools.partial(mosaic.attend, scale=1.0)
    with pytest.raises(NotImplementedError, match=r"needs jax >= 0\.11"):
        jax.eval_shape(attend, *specs(1, 2, 1, 64, 64, 1))


@pytest.mark.parametrize("d", [16, 64, 80, 128, 256])
def test_heuristic_fits_the_hardware(d):
    for g in (1, 8, 20, 64):
        columns, rows = hopper.padded(g, d)
        if columns * rows > hopper.MAX_ACCUMULATOR:
            continue
        config = hopper.heuristic(g=g, d=d)
        assert config.block % 64 == 0 and config.stages >= 2
        ring = 2 * config.stages * config.block * rows
        assert 2 * (ring + columns * (5 * rows + config.block)) <= 220 * 1024
