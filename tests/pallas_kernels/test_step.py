"""What a decode step is made of beside attention: products in parts, sum and norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    add_norm,
    gathered_mlp,
    partial_mlp,
    partial_product,
    split_heads,
)

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def draw(*shape, dtype="float32", seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), dtype)


def check(found, expected, dtype):
    found = np.asarray(found, np.float64)
    error = np.max(np.abs(found - expected))
    assert error <= TOLERANCE[dtype] * np.max(np.abs(expected)), error


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("b", "m", "n", "bias"),
    [(1, 40, 70, False), (5, 64, 33, True), (17, 600, 200, True), (64, 96, 48, False)],
)
def test_parts_add_up_to_the_product(axis, b, m, n, bias, dtype, implementation):
    x, matrix = draw(b, m, dtype=dtype), draw(n, m, dtype=dtype, seed=1)
    bias = draw(n, dtype=dtype, seed=2) if bias else None
    product = functools.partial(
        partial_product, axis=axis, implementation=implementation
    )
    parts = jax.jit(product)(x, matrix if axis == 1 else matrix.T, bias)
    assert parts.dtype == jnp.float32 and parts.shape[1:] == (b, n)
    exact = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    exact = exact if bias is None else exact + np.asarray(bias, np.float64)
    check(parts.sum(axis=0), exact, dtype)


NAMES = ("up", "gate", "down")


def test_parts_of_an_mlp_add_up_to_its_output(implementation):
    x, weights = draw(3, 40), {k: draw(70, 40, seed=i) for i, k in enumerate(NAMES)}
    weights["down_bias"] = draw(40, seed=5)
    for neurons in (None, jnp.arange(0, 70, 2)):
        options = {"activation": "silu", "implementation": implementation}
        parts = partial_mlp(x, weights, neurons, **options)
        whole = gathered_mlp(x, weights, neurons, **options)
        np.testing.assert_allclose(parts.sum(axis=0), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("b", [1, 3])
def test_numbers_beyond_the_neurons_are_none(b, implementation):
    x, weights = draw(b, 40), {k: draw(70, 40, seed=i) for i, k in enumerate(NAMES)}
    weights |= {"up_bias": draw(70, seed=4), "down_bias": draw(40, seed=5)}
    options = {"activation": "silu", "implementation": implementation}
    some = jnp.arange(0, 70, 3)
    padded = jnp.concatenate([some, jnp.full(9, 70)])
    parts = partial_mlp(x, weights, padded, padded=True, **options)
    want = gathered_mlp(x, weights, some, **options)
    np.testing.assert_allclose(parts.sum(axis=0), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("b", "m", "p"), [(1, 64, 1), (3, 40, 2), (5, 576, 4)])
def test_the_sum_and_its_norm(b, m, p, center, dtype, implementation):
    x, parts = draw(b, m, dtype=dtype), draw(p, b, m, seed=1)
    scale = draw(m, dtype=dtype, seed=2)
    shift = draw(m, dtype=dtype, seed=3) if center else None
    total, normed = jax.jit(
        functools.partial(
            add_norm, center=center, eps=1e-5, implementation=implementation
        )
    )(x, parts + 3, scale, shift)  # not centred by chance
    assert total.dtype == normed.dtype == x.dtype
    exact = np.asarray(x, np.float64) + np.asarray(parts + 3, np.float64).sum(axis=0)
    check(total, exact, dtype)
    y = np.asarray(total, np.float64)
    y = y - y.mean(axis=1, keepdims=True) if center else y
    y = y / np.sqrt((y * y).mean(axis=1, keepdims=True) + 1e-5)
    y = y * np.asarray(scale, np.float64)
    check(normed, y if shift is None else y + np.asarray(shift, np.float64), dtype)


def test_bad_arguments_are_named():
    x, wrong = draw(2, 8), "parts has shape"
    with pytest.raises(ValueError, match=wrong):
        add_norm(x, draw(2, 8), draw(8), center=False, eps=1e-5)
    with pytest.raises(ValueError, match="scale has shape"):
        add_norm(x, draw(1, 2, 8), draw(7), center=False, eps=1e-5)
    with pytest.raises(ValueError, match=r"must be \[b, m\] and \[n, m\]"):
        partial_product(x, draw(8, 5))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); it must be \[5\]"):
        partial_product(x, draw(5, 8), draw(4))
    sizes = {"heads": 2, "kv_heads": 1, "dtype": jnp.float32}
    with pytest.raises(ValueError, match="head_dim is 5; it must be even"):
        split_heads(draw(1, 2, 20), None, None, head_dim=5, **sizes)
    with pytest.raises(ValueError, match=r"it must be \[p, b, 24 or more\]"):
        split_heads(draw(1, 2, 20), None, None, head_dim=6, **sizes)


@pytest.mark.parametrize(
    ("b", "m", "n"), [(64, 4096, 6152), (16, 4096, 12288), (1, 9216, 27648)]
)
def test_real_shapes_lower_for_cuda(b, m, n, lower_for_cuda):
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)

    def step(x, rows, out, scale):
        parts = partial_product(x, rows, implementation="triton")
        sizes = {"heads": m // 128, "kv_heads": (n - m) // 256, "head_dim": 128}
        turn = jnp.ones((2, b, 64))
        q, *_ = split_heads(
            *(parts, *turn), dtype=x.dtype, implementation="triton", **sizes
        )
        q = q.reshape(b, m)
        parts = partial_product(q, out, axis=0, implementation="triton")
        return add_norm(
            x, parts, scale, center=False, eps=1e-5, implementation="triton"
        )

    text = lower_for_cuda(step, spec((b, m)), spec((n, m)), spec((m, m)), spec((m,)))
    assert text.count("__gpu$xla.gpu.triton") == 4


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("h", "k", "d", "rest", "turns"),
    [
        (4, 2, 16, 0, True),
        (9, 3, 64, 5, True),
        (5, 5, 80, 700, False),
        (1, 1, 2, 1, True),
    ],
)
def test_heads_are_added_up_rotated_and_split(
    h, k, d, rest, turns, dtype, implementation
):
    b, p = 3, 2
    parts = draw(p, b, (h + 2 * k) * d + rest)
    angle = draw(b, d // 2, seed=1)
    turn = (jnp.cos(angle), jnp.sin(angle)) if turns else (None, None)
    split = functools.partial(
        split_heads,
        heads=h,
        kv_heads=k,
        head_dim=d,
        dtype=dtype,
        implementation=implementation,
    )
    *found, others = jax.jit(split)(parts, *turn)
    y = np.asarray(parts, np.float64).sum(axis=0)
    # As complex numbers: dimension i is the real part of that with i + d / 2.
    z = np.exp(1j * np.asarray(angle, np.float64))[:, None] if turns else 1
    start = 0
    for out, (n, factor) in zip(found, ((h, z), (k, z), (k, 1)), strict=True):
        whole = y[:, start : start + n * d].reshape(b, n, d)
        pairs = (whole[..., : d // 2] + 1j * whole[..., d // 2 :]) * factor
        check(out, np.concatenate([pairs.real, pairs.imag], axis=-1), dtype)
        assert out.dtype == dtype
        start += n * d
    if rest:
        check(others, y[:, start:], "float32")
    else:
        assert others is None


def test_a_kernel_is_lowered_once_for_all_layers(lower_for_cuda):
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)

    def layers(x, matrices, scale):
        for matrix in matrices:
            parts = partial_product(x, matrix, axis=0, implementation="triton")
            _, x = add_norm(
                *(x, parts, scale), center=False, eps=1e-5, implementation="triton"
            )
        return x

    def kernels(count):
        arrays = spec((4, 64)), [spec((64, 64))] * count, spec((64,))
        return lower_for_cuda(layers, *arrays).count("__gpu$xla.gpu.triton")

    assert kernels(9) == kernels(5) < 10
