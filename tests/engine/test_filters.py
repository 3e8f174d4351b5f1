"""Min-p, top-k and top-p: what they keep, by sorting and by `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polarjax.engine.filters import filtered

ROWS = 64

# Bits depend on what a compiler makes of a program.
pytestmark = pytest.mark.usefixtures("as_users_do")

jitted = jax.jit(filtered)


def settings(v, seed=0):
    """Filters of many rows, some of them off."""
    rng = np.random.default_rng(seed)

    def often(on, off, dtype):
        chosen = np.where(rng.random(ROWS) < 0.3, off, on)
        return chosen.astype(dtype)

    top_k = often(rng.integers(1, v + 1, ROWS), v, np.int32)
    top_p = often(rng.uniform(0.01, 1, ROWS), 1, np.float32)
    min_p = often(10 ** rng.uniform(-4, 0, ROWS), 0, np.float32)
    return top_k, top_p, min_p


def by_sorting(scores, top_k, top_p, min_p):
    """The tokens that one row keeps, in float64."""
    scores = np.float64(scores)
    p = np.exp(scores - scores.max())
    order = np.argsort(-scores, kind="stable")
    order = [i for i in order if p[i] >= np.float64(min_p)][:top_k]
    mass = p[order].sum() * np.float64(top_p)
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    return {i for i, b in zip(order, before, strict=True) if b < mass or top_p >= 1}


@pytest.mark.parametrize("v", [1, 2, 31, 200, 1024])
@pytest.mark.parametrize("kind", ["apart", "ties", "flat", "peaked"])
def test_what_is_kept_is_what_sorting_keeps(kind, v):
    rng = np.random.default_rng(v)
    scores = {
        "apart": rng.normal(size=(ROWS, v)) * 3,
        "ties": rng.integers(-3, 3, (ROWS, v)) * 0.75,
        "flat": np.zeros((ROWS, v)) - 7,
        "peaked": rng.normal(size=(ROWS, v)) * 30,
    }[kind].astype(np.float32)
    given = settings(v)
    found = np.asarray(jitted(scores, *given))
    for i, row in enumerate(scores):
        kept = by_sorting(row, *(x[i] for x in given))
        assert set(np.flatnonzero(np.isfinite(found[i])).tolist()) == kept
    # What is kept is bit for bit what it was.
    np.testing.assert_array_equal(found[np.isfinite(found)], scores[np.isfinite(found)])


def test_of_equal_scores_the_first_are_kept():
    scores = jnp.array([[0.0, 2, -0.0, 2, 0, 2]] * 4, jnp.float32)
    top_k = jnp.array([1, 2, 4, 5], jnp.int32)
    ones = jnp.ones(4, jnp.float32)
    found = np.isfinite(filtered(scores, top_k, ones, 0 * ones))
    assert [np.flatnonzero(row).tolist() for row in found] == [
        [1],
        [1, 3],
        [0, 1, 3, 5],
        [0, 1, 2, 3, 5],
    ]
    even = jnp.zeros((4, 8), jnp.float32)
    top_p = jnp.array([0.125, 0.1251, 0.5, 0.99], jnp.float32)
    found = np.isfinite(filtered(even, top_k + 8, top_p, 0 * ones))
    assert found.sum(axis=1).tolist() == [1, 2, 4, 8]
    assert all(row[: row.sum()].all() for row in found)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4, 1e30])
def test_the_best_is_kept_whatever_the_numbers(scale):
    rng = np.random.default_rng(0)
    scores = (rng.normal(size=(ROWS, 99)) * scale).astype(np.float32)
    scores[::2, 1:] = -np.inf  # banned, all but one
    ones = np.ones(ROWS, np.float32)
    found = np.asarray(jitted(scores, np.ones(ROWS, np.int32), 1e-9 * ones, ones))
    np.testing.assert_array_equal(found.argmax(axis=1), scores.argmax(axis=1))
    assert (np.isfinite(found).sum(axis=1) == 1).all()


def test_the_rarest_are_kept_at_a_mass_of_1():
    scores = np.array([[0.0] + [-60.0] * 5, [0.0] + [-np.inf] * 5], np.float32)
    ones = np.ones(2, np.float32)
    found = filtered(scores, np.full(2, 6, np.int32), ones, 0 * ones)
    np.testing.assert_array_equal(found, scores)


def test_the_mass_of_many_rare_tokens_counts():
    # Each has a part of the best one's that is no whole number of units, and together
    # they have most of the mass.
    v = 2**20
    scores = np.full((2, v), np.log(2.7 / (v - 1)), np.float32)
    scores[:, 0] = 0
    top_p, rest = np.array([0.75, 0.9], np.float32), np.zeros(2, np.float32)
    found = np.isfinite(jitted(scores, np.full(2, v, np.int32), top_p, rest)).sum(1)
    np.testing.assert_allclose(
        found / v, [(0.75 * 3.7 - 1) / 2.7, (0.9 * 3.7 - 1) / 2.7], rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"2\*\*20 tokens at most, not 1048577"):
        filtered(jnp.zeros((1, v + 1)), *(jnp.ones(1, jnp.int32) for _ in range(3)))


def test_a_row_keeps_the_same_among_other_mates():
    rng = np.random.default_rng(1)
    scores = (rng.normal(size=(ROWS, 500)) * 3).astype(np.float32)
    given = settings(500, seed=2)
    found = np.asarray(jitted(scores, *given))
    order = rng.permutation(ROWS)[: ROWS // 2]
    part = jax.jit(filtered)(scores[order], *(x[order] for x in given))
    assert np.asarray(part).tobytes() == found[order].tobytes()


@pytest.mark.parametrize(
    "names", [("min_p",), ("top_k",), ("top_p",), ("min_p", "top_k", "top_p")]
)
def test_the_filters_are_those_of_transformers(names):
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    process = pytest.importorskip(
        "transformers.generation.logits_process",
        reason="needs it: pip install transformers",
    )
    rng = np.random.default_rng(3)
    for v in (50, 2000):
        scores = (rng.normal(size=(20, v)) * 3).astype(np.float32)
        for _ in range(5):
            value = {
                "min_p": rng.uniform(0.001, 0.3),
                "top_k": int(rng.integers(1, v)),
                "top_p": rng.uniform(0.1, 0.999),
            }
            theirs = torch.from_numpy(scores)
            for name in names:
                warper = {
                    "min_p": process.MinPLogitsWarper,
                    "top_k": process.TopKLogitsWarper,
                    "top_p": process.TopPLogitsWarper,
                }[name]
                theirs = warper(value[name])(torch.zeros(20, 1, dtype=int), theirs)
            off = {"min_p": 0.0, "top_k": v, "top_p": 1.0}
            one = {**off, **{name: value[name] for name in names}}
            ours = jitted(
                scores,
                np.full(20, one["top_k"], np.int32),
                np.full(20, one["top_p"], np.float32),
                np.full(20, one["min_p"], np.float32),
            )
            np.testing.assert_array_equal(ours, theirs.numpy())
