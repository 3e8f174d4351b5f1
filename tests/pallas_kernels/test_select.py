import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from pallas_kernels import (
    needed_neurons,
    top_heads,
    union_neurons,
)
from pallas_kernels.select.search import MAX_STEPS, find_threshold


def _kept(scores, live):
    """The sums that decide, in float64."""
    scores = np.asarray(scores, np.float64)[np.asarray(live)]
    return np.where(scores > 0, scores, 0).sum(axis=0)


def _check_union(neurons, kept, n, rtol=1e-6):
    neurons = np.asarray(neurons)
    assert neurons.dtype == np.int32
    assert neurons.shape == (n,)
    assert neurons[0] >= 0
    assert neurons[-1] < kept.size
    assert np.all(np.diff(neurons) > 0), "ascending, and therefore distinct"
    # Exact up to ties: the kept sums are the n largest.
    np.testing.assert_allclose(
        np.sort(kept[neurons]), np.sort(kept)[kept.size - n :], rtol=rtol
    )


# --- heads ---


@pytest.mark.parametrize(("c", "n"), [(200, 30), (8, 5), (72, 21), (3, 3), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_heads(c, n, dtype, implementation):
    scores = jnp.asarray(np.random.default_rng(c).normal(size=(4, c)), dtype)
    order = np.argsort(-np.asarray(scores, np.float64), axis=1, kind="stable")
    checked = jaxtyped(typechecker=beartype)(top_heads)
    heads = jax.jit(lambda s: checked(s, n, implementation=implementation))(scores)
    assert heads.dtype == jnp.int32
    np.testing.assert_array_equal(heads, order[:, :n])


def test_top_heads_breaks_ties_by_the_lower_index(implementation):
    scores = jnp.array(
        [[1, 2, 1, 2, 2], [0, 0, 0, 0, 0], [-jnp.inf, 3, -jnp.inf, 3, 9]]
    )
    expected = [[1, 3, 4, 0], [0, 1, 2, 3], [4, 1, 3, 0]]
    heads = top_heads(scores, 4, implementation=implementation)
    np.testing.assert_array_equal(heads, expected)


def test_top_heads_puts_nan_and_infinity_where_they_belong(implementation):
    nan, inf = jnp.nan, jnp.inf
    scores = jnp.array([[nan, 1, nan, 2], [-inf, nan, inf, -inf], [nan] * 4])
    heads = top_heads(scores, 4, implementation=implementation)
    np.testing.assert_array_equal(heads, [[3, 1, 0, 2], [2, 0, 1, 3], [0, 1, 2, 3]])


def test_a_smaller_budget_takes_a_prefix(implementation):
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(5, 32)), jnp.float32)
    many = top_heads(scores, 20, implementation=implementation)
    few = top_heads(scores, 7, implementation=implementation)
    np.testing.assert_array_equal(many[:, :7], few)


# --- neurons ---


@pytest.mark.parametrize(
    ("b", "f", "n"),
    [(1, 64, 10), (5, 1000, 300), (3, 20, 20), (64, 2500, 1), (70, 1024, 700)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_union_neurons(b, f, n, dtype, implementation):
    scores = jnp.asarray(np.random.default_rng(f).normal(size=(b, f)), dtype)
    live = np.arange(b) != 1
    checked = jaxtyped(typechecker=beartype)(union_neurons)
    union = jax.jit(
        lambda s, alive: checked(s, alive, n, implementation=implementation)
    )
    _check_union(union(scores, jnp.asarray(live)), _kept(scores, live), n, rtol=1e-5)


def _edge_cases():
    rng = np.random.default_rng(0)
    f = 1500
    first, normal = np.arange(f) == 7, rng.normal(size=(2, f))
    one_row = np.array([[1.0], [-1.0]])
    yield "zeros", np.zeros((2, f))
    yield "negative zeros", np.full((2, f), -0.0)
    yield "equal", np.full((2, f), 3.7)
    yield "few values", rng.integers(-2, 4, f) * one_row
    yield "mostly zero", np.where(rng.random(f) < 0.01, normal, 0)
    yield "tiny", rng.integers(0, 50, (2, f)) * 2e-38
    yield "wide", 10.0 ** rng.uniform(-37, 37, (2, f))
    yield "an outlier", np.where(first, 1e38, normal + 20)
    yield "an infinity", np.where(first, np.inf, normal)
    yield "infinities", np.where(rng.random(f) < 0.5, np.inf, normal)
    yield "nan", np.where(rng.random((2, f)) < 0.3, np.nan, normal)
    yield "ascending", np.arange(f) * one_row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("b", "w", "r", "f", "n"),
    [
        (3, 12, 8, 300, 40),
        (1, 70, 70, 129, 129),
        (70, 64, 64, 1100, 1),
        (5, 3, 2, 7, 3),
    ],
)
def test_needed_neurons(b, w, r, f, n, dtype, implementation):
    rng = np.random.default_rng(f)
    hidden = jnp.asarray(rng.normal(size=(b, w)), jnp.float32)
    up = jnp.asarray(rng.normal(size=(f, r)), dtype)
    live = jnp.asarray(rng.random(b) < 0.7).at[0].set(True)
    checked = jaxtyped(typechecker=beartype)(needed_neurons)
    needed = functools.partial(checked, n=n, implementation=implementation)
    dead = jnp.asarray(rng.normal(size=(b, w)) * 50, jnp.float32)
    neurons = jax.jit(needed)(jnp.where(live[:, None], hidden, dead), up, live)
    x = np.asarray(hidden[:, w - r :].astype(dtype), np.float64)[np.asarray(live)]
    chances = np.logaddexp(0, x @ np.asarray(up, np.float64).T).sum(axis=0)
    _check_union(neurons, chances, n, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 500, 1500])
def test_union_neurons_always_selects(n, implementation):
    union = jax.jit(lambda s, a: union_neurons(s, a, n, implementation=implementation))
    live = np.ones(2, bool)
    for name, scores in _edge_cases():
        scores = scores.astype(np.float32)
        try:
            _check_union(union(scores, live), _kept(scores, live), n)
        except AssertionError as error:
            raise AssertionError(name) from error


def test_union_ignores_finished_sequences_and_negative_scores(implementation):
    scores = jnp.array([[-9.0, 1.0, 0.5, -1.0], [jnp.nan] * 4, [3.0, 0.0, 0.4, -1.0]])
    live = jnp.array([True, False, True])
    neurons = union_neurons(scores, live, 2, implementation=implementation)
    np.testing.assert_array_equal(neurons, [0, 1])
    live = jnp.array([True, False, False])
    neurons = union_neurons(scores, live, 2, implementation=implementation)
    np.testing.assert_array_equal(neurons, [1, 2])


# --- the search ---


@jax.jit
def _search(keys, n):
    f = keys.size

    def count(threshold):
        return f - jnp.searchsorted(keys, threshold, side="left").astype(jnp.int32)

    return find_threshold(count, keys[-1], f=f, n=n)


def _steps(values, n):
    """The steps of a search whose threshold proved right."""
    keys = np.sort(np.asarray(values, np.float32).view(np.int32))
    found = jax.tree.map(int, _search(keys, n))
    tied = keys[(keys >= found.tied) & (keys < found.sure)]
    assert np.sum(keys >= found.sure) + found.ties == n
    assert found.ties <= tied.size
    assert found.ties == 0 or np.unique(tied).size == 1
    return found.steps


@pytest.mark.parametrize("b", [1, 16, 64])
def test_the_search_takes_few_steps_on_router_scores(b):
    rng = np.random.default_rng(b)
    steps = []
    for mean, spread in ((0, 0), (0, 1), (1, 0.3), (-2, 1.5)):
        scores = rng.normal(mean, 1, (b, 16_384)) + rng.normal(0, spread, 16_384)
        total = np.maximum(scores, 0).sum(axis=0)
        steps += [_steps(total, n) for n in (1638, 4915, 8192)]
    assert np.mean(steps) < 10
    assert max(steps) < 20


def test_the_search_is_bounded_whatever_the_numbers():
    rng = np.random.default_rng(0)
    f = 4096
    hostile = [
        rng.integers(0, 0x7F800000, f, dtype=np.int32).view(np.float32),
        rng.choice(10.0 ** np.arange(-30, 31, 6), f),
        np.where(np.arange(f) < 9, 3e38, rng.normal(25, 4, f).clip(0)),
        np.where(rng.random(f) < 0.5, np.inf, 1.0),
        np.repeat([1.0, 1.0000001, 1e20, 1e-40], f // 4),
        np.zeros(f),
    ]
    for values in hostile:
        for n in (1, 2, f // 3, f // 2, f - 1, f):
            assert _steps(values, n) <= MAX_STEPS


# --- arguments and lowering ---


def test_a_loss_may_select(implementation):
    # As the recall of a router does, beside what is differentiated.
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)))

    def loss(scores):
        heads = top_heads(scores, 4, implementation=implementation)
        neurons = union_neurons(
            scores, jnp.ones(3, bool), 4, implementation=implementation
        )
        return jnp.sum(scores**2) + jnp.sum(heads) + jnp.sum(neurons)

    np.testing.assert_allclose(jax.grad(loss)(scores), 2 * scores, rtol=1e-6)


def test_wrong_scores_or_budget():
    scores = jnp.ones((2, 8))
    with pytest.raises(ValueError, match=r"n is 9; it must be in 1\.\.8"):
        top_heads(scores, 9)
    with pytest.raises(ValueError, match=r"n is 0; it must be in 1\.\.8"):
        union_neurons(scores, jnp.ones(2, bool), 0)
    with pytest.raises(ValueError, match=r"scores is float32\[8\]; it must be"):
        top_heads(scores[0], 1)
    with pytest.raises(ValueError, match=r"live is bool\[3\]; it must be bool\[2\]"):
        union_neurons(scores, jnp.ones(3, bool), 1)
    with pytest.raises(ValueError, match=r"live is int32\[2\]; it must be bool"):
        union_neurons(scores, jnp.ones(2, jnp.int32), 1)


def test_what_no_kernel_serves():
    with pytest.raises(NotImplementedError, match="scores has 2000 heads"):
        top_heads(jnp.ones((1, 2000)), 3, implementation="triton_interpret")
    with pytest.raises(NotImplementedError, match="there are 70000 neurons"):
        union_neurons(
            jnp.ones((1, 70_000)), jnp.ones(1, bool), 3, implementation="triton"
        )
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        top_heads(jnp.ones((1, 8)), 3, implementation="cuda")  # pyright: ignore


@pytest.mark.parametrize(
    ("b", "f", "n"),
    [
        (64, 36_864, 11_059),
        (16, 16_384, 4915),
        (1, 65_536, 6553),
        (200, 49_152, 1),
        (3, 11_001, 11_001),
    ],
)
def test_union_neurons_lowers_for_cuda(b, f, n, lower_for_cuda):
    text = lower_for_cuda(
        lambda scores, live: union_neurons(scores, live, n, implementation="triton"),
        jax.ShapeDtypeStruct((b, f), jnp.float32),
        jax.ShapeDtypeStruct((b,), jnp.bool_),
    )
    assert text.count("__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize(("b", "c", "n"), [(64, 8, 4), (64, 72, 21), (1, 128, 128)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_heads_lowers_for_cuda(b, c, n, dtype, lower_for_cuda):
    text = lower_for_cuda(
        lambda scores: top_heads(scores, n, implementation="triton"),
        jax.ShapeDtypeStruct((b, c), dtype),
    )
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize(("b", "f"), [(48, 16384), (64, 36864)])
def test_needed_neurons_lowers_for_cuda(b, f, lower_for_cuda):
    spec = jax.ShapeDtypeStruct
    text = lower_for_cuda(
        lambda x, up, live: needed_neurons(
            x, up, live, f // 2, implementation="triton"
        ),
        *(spec((b, 1056), jnp.float32), spec((f, 1024), jnp.bfloat16)),
        spec((b,), jnp.bool_),
    )
    assert text.count("__gpu$xla.gpu.triton") == 2


def test_needed_neurons_names_bad_arguments():
    with pytest.raises(ValueError, match="w no less than r"):
        needed_neurons(jnp.ones((2, 3)), jnp.ones((9, 4)), jnp.ones(2, bool), 1)
    with pytest.raises(ValueError, match=r"n is 10; it must be in 1\.\.9"):
        needed_neurons(jnp.ones((2, 4)), jnp.ones((9, 4)), jnp.ones(2, bool), 10)
