import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from pallas_kernels import top_heads, union_neurons


@pytest.mark.parametrize(("c", "n"), [(8, 5), (72, 21), (3, 3), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_heads(c, n, dtype):
    scores = jnp.asarray(np.random.default_rng(c).normal(size=(4, c)), dtype)
    order = np.argsort(-np.asarray(scores, np.float64), axis=1, kind="stable")
    top = jax.jit(jaxtyped(typechecker=beartype)(top_heads), static_argnums=1)
    heads = top(scores, n)
    assert heads.dtype == jnp.int32
    np.testing.assert_array_equal(heads, order[:, :n])


def test_top_heads_breaks_ties_by_the_lower_index():
    scores = jnp.array(
        [[1, 2, 1, 2, 2], [0, 0, 0, 0, 0], [-jnp.inf, 3, -jnp.inf, 3, 9]]
    )
    expected = [[1, 3, 4, 0], [0, 1, 2, 3], [4, 1, 3, 0]]
    np.testing.assert_array_equal(top_heads(scores, 4), expected)


def test_a_smaller_budget_takes_a_prefix():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(5, 32)), jnp.float32)
    np.testing.assert_array_equal(top_heads(scores, 20)[:, :7], top_heads(scores, 7))


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


@pytest.mark.parametrize(("b", "f", "n"), [(1, 64, 10), (5, 1000, 300), (3, 20, 20)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_union_neurons(b, f, n, dtype):
    scores = jnp.asarray(np.random.default_rng(f).normal(size=(b, f)), dtype)
    live = np.arange(b) != 1
    kept = np.maximum(np.asarray(scores, np.float32), 0)[live].sum(axis=0)
    union = jax.jit(jaxtyped(typechecker=beartype)(union_neurons), static_argnums=2)
    neurons = np.asarray(union(scores, jnp.asarray(live), n))
    assert neurons.dtype == np.int32
    assert np.all(np.diff(neurons) > 0), "ascending, and therefore distinct"
    # Exact up to ties: the kept sums are the n largest.
    np.testing.assert_allclose(
        np.sort(kept[neurons]), np.sort(kept)[f - n :], rtol=1e-6
    )


def test_union_ignores_finished_sequences_and_negative_scores():
    scores = jnp.array([[-9.0, 1.0, 0.5, -1.0], [jnp.nan] * 4, [3.0, 0.0, 0.4, -1.0]])
    live = jnp.array([True, False, True])
    np.testing.assert_array_equal(union_neurons(scores, live, 2), [0, 1])
    live = jnp.array([True, False, False])
    np.testing.assert_array_equal(union_neurons(scores, live, 2), [1, 2])
