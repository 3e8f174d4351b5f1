"""Text that the model writes: the draws are its own, whatever the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.mesh.cut import make_mesh, shard
from polarjax.training import write_blocks
from tests.models import LLAMA, random_params

CONFIG = dataclasses.replace(LLAMA, layers=2, vocab_size=11, context=32)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, scale=0.3)


def test_a_block_depends_on_the_seed_and_its_place_alone(params):
    whole = write_blocks(params, 3, 9, 7, seed=5)
    assert whole.shape == (7, 9) and whole.dtype == np.int32
    assert (whole[:, 0] == 3).all() and whole.max() < 11
    assert len(np.unique(whole, axis=0)) == 7
    for blocks, batch in ((7, 3), (1, 64)):
        again = write_blocks(params, 3, 9, blocks, batch=batch, seed=5)
        np.testing.assert_array_equal(again, whole[:blocks])
    assert not np.array_equal(write_blocks(params, 3, 9, 7, seed=6), whole)
    shorter = write_blocks(params, 3, 2, 7, seed=5)
    np.testing.assert_array_equal(shorter, whole[:, :2])


@pytest.mark.devices(4)
def test_it_is_written_over_devices_too(params):
    whole = write_blocks(params, 3, 9, 7, batch=3, seed=5)
    cut = shard(params, make_mesh(2, 2))
    again = write_blocks(cut, 3, 9, 7, batch=3, seed=5)
    np.testing.assert_array_equal(again, whole)


def test_it_goes_on_behind_tokens_that_end_a_text(params):
    config = dataclasses.replace(CONFIG, eos_ids=(4,))
    ending = dataclasses.replace(params, config=config)
    whole = write_blocks(params, 4, 9, 16)
    np.testing.assert_array_equal(write_blocks(ending, 4, 9, 16), whole)
    assert (whole[:, 1:-1] == 4).any()


def test_draws_have_the_models_odds(params):
    """The first two tokens, and the fifth given what comes before it."""
    blocks, counts = write_blocks(params, 3, 6, 2000, batch=500), np.arange(11)
    odds = jax.nn.softmax(polarjax.logits(params, [[3]])[0, 0])

    def surprise(drawn, expected):
        """Chi-square by its 10 degrees of freedom, in standard deviations."""
        seen = (drawn[:, None] == counts).sum(axis=0)
        expected = np.asarray(expected, float)
        chi = ((seen - expected) ** 2 / expected).sum()
        return (chi - 10) / np.sqrt(20)

    assert abs(surprise(blocks[:, 1], 2000 * odds)) < 4
    assert surprise(blocks[:, 1], np.full(11, 2000 / 11)) > 10
    later = jax.nn.softmax(polarjax.logits(params, jnp.asarray(blocks))[:, 4])
    assert abs(surprise(blocks[:, 5], later.sum(axis=0))) < 4


def test_progress_and_errors(params):
    told = []
    write_blocks(params, 3, 4, 5, batch=2, progress=lambda *seen: told.append(seen))
    assert told == [(2, 5), (4, 5), (5, 5)]
    for length in (1, 33):
        with pytest.raises(ValueError, match=f"of {length} tokens: .* from 2 to 32"):
            write_blocks(params, 3, length, 2)
    assert write_blocks(params, 3, 32, 1).shape == (1, 32)
    for blocks, batch in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="blocks and batch must be at least 1"):
            write_blocks(params, 3, 4, blocks, batch=batch)
