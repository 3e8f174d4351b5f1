"""Draws of devices that share a vocabulary are those of one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import polarjax
from polarjax.engine.alternatives import alternatives
from polarjax.engine.checks import settings_of
from polarjax.engine.rules import History
from polarjax.engine.sampling import Variant, draw
from polarjax.mesh.cut import make_mesh, shard
from polarjax.mesh.share import Share
from tests.models import LLAMA, make_sampling, random_params

PROMPTS = [[1, 2, 3], [7] * 20, [5, 6]]
CONFIG = dataclasses.replace(
    LLAMA, layers=2, vocab_size=336, heads=8, head_dim=8, kv_heads=4
)
pytestmark = pytest.mark.devices(8)


@pytest.mark.parametrize("shape", [(4, 2), (8,)])
def test_rules_and_filters_do_not_depend_on_the_mesh(shape):
    params = random_params(CONFIG)
    settings = {
        "max_new_tokens": 6,
        "temperature": [0.9, 0, 2.0],
        "repetition_penalty": [1.0, 2.5, 1.2],
        "frequency_penalty": [0.0, 1.0, -0.5],
        "logit_bias": [None, {7: 5.0, 255: 4.0}, {200: 9.0}],
        "allowed_token_ids": [None, None, range(100, 256)],
        "min_p": [0.05, 0, 0],
    }
    one, many = (
        polarjax.generate(p, PROMPTS, policy=polarjax.Dense(), seed=3, **settings)
        for p in (params, shard(params, make_mesh(*shape)))
    )
    assert one.tokens == many.tokens
    for a, b in zip(one.logprobs, many.logprobs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_devices_that_share_a_vocabulary_draw_and_tell_alike():
    rows, v, share = 32, CONFIG.vocab_size, Share(CONFIG, make_mesh(4, 2))
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 9, (rows, v)).astype(np.float32)
    mass = np.array(jax.nn.logsumexp(logits, axis=-1))
    position = np.arange(rows, dtype=np.int32)
    history = History(rng.integers(0, v, (rows, 40)).astype(np.int32), position // 2)
    asked = {
        "temperature": [0.0, 1.0, 1.0, 0.5] * 8,
        "top_p": [1, 1, 0.5, 0.9] * 8,
        "presence_penalty": [2, 1, 0, 0] * 8,
    }
    settings = settings_of(CONFIG, None, rows, asked)
    sampling = make_sampling(CONFIG, settings)
    cut, by_row = P("dp", "tp"), P("dp")
    for variant in Variant:
        one = functools.partial(draw, variant=variant)
        over = functools.partial(draw, share=share, variant=variant)
        over = share.over(over, (cut, *[by_row] * 4), by_row)
        alone, together = (
            jax.jit(f)(logits, mass, sampling, position, history) for f in (one, over)
        )
        for a, b in zip(together, alone, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    tell = share.over(
        functools.partial(alternatives, share=share), (cut, by_row, by_row), by_row
    )
    found, expected = (jax.jit(f)(logits, mass, alone[0]) for f in (tell, alternatives))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
