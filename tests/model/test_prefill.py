"""Reading prompts into a cache, in pieces, is one pass over them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.cache import Pieces
from polarjax.engine import steps
from polarjax.engine.chunk import empty_chunk
from polarjax.engine.slots import empty_slots
from polarjax.model import (
    Decoder,
    logits,
    make_decoder,
    read,
    whole,
)
from tests.models import LLAMA, MHA, OPT, OPT_AFTER, empty_cache, random_params

TWO = {"layers": 2, "context": 108}
MISTRAL = dataclasses.replace(LLAMA, **TWO, windows=(24, 3))
CONFIGS = {
    "llama": dataclasses.replace(LLAMA, **TWO),
    "opt": dataclasses.replace(OPT, **TWO),
    "opt-after": dataclasses.replace(OPT_AFTER, **TWO),
    "windows": MISTRAL,
    "nope": dataclasses.replace(LLAMA, **TWO, rotary=(True, False)),
    "qwen": dataclasses.replace(MHA, **TWO, qkv_bias=True, qk_norm=True),
}


def relative(ours, theirs) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_behind_what_the_cache_has_are_one_pass(name):
    config, model = CONFIGS[name], Decoder(CONFIGS[name])
    rng = np.random.default_rng(0)
    # Of each prompt a token, a page, one more; the last is the context less one.
    counts = np.array([[1, 1, 1], [16, 30, 2], [5, 1, 30], [16, 17, 74]], np.int32)
    lengths, slots = counts.sum(axis=1), np.array([2, 0, 3, 1], np.int32)
    tokens = rng.integers(0, config.vocab_size, (4, 107)).astype(np.int32)

    @jax.jit
    def both(weights):
        every = whole(model, weights, tokens)
        found, cache = [], empty_cache(config, 4, config.context)
        keys, values = jax.tree.map(
            lambda x: x.at[:].set(jnp.nan), (cache.keys, cache.values)
        )
        cache = dataclasses.replace(cache, keys=keys, values=values)
        for n, first in zip(counts.T, (counts.cumsum(axis=1) - counts).T, strict=True):
            starts = 3 + np.cumsum(n) - n  # behind some that are nobody's
            packed = np.full(128, 7, np.int32)
            for row, start, at, count in zip(tokens, starts, first, n, strict=True):
                packed[start : start + count] = row[at : at + count]
            pieces = Pieces(*map(jnp.asarray, (slots, starts, n, first)))
            last, cache, *_ = read(model, weights, packed, pieces, cache)
            at = every.x[np.arange(4), first + n - 1]
            found.append((last, logits(model, weights, at)))
        return found, cache, every.keys, every.values

    found, cache, keys, values = both(random_params(config).weights)
    for ours, theirs in found:
        assert relative(ours, theirs) < 1e-5
    assert np.asarray(cache.lengths)[slots].tolist() == lengths.tolist()
    table = np.asarray(cache.table)
    pairs = zip((*cache.keys, *cache.values), (*keys, *values), strict=True)
    for ours, theirs in pairs:
        for slot, one, n in zip(slots, np.asarray(theirs), lengths, strict=True):
            kept = np.concatenate(np.asarray(ours)[table[slot]], axis=1)
            assert relative(kept[:, :n].swapaxes(0, 1), one[:n]) < 1e-5
            assert np.isnan(kept[:, n:]).all()  # padding was written nowhere


def test_prompts_do_not_depend_on_how_they_are_cut():
    params = random_params(MISTRAL)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 331, n).tolist() for n in (3, 40, 5)]
    settings = {
        "max_new_tokens": 4,
    }
    temperatures = [0.0, 1.0, 2.0]
    whole, cut = (
        polarjax.generate(
            params, prompts, temperature=temperatures, prefill_tokens=n, **settings
        )
        for n in (16_384, 16)
    )
    assert whole.tokens == cut.tokens
    np.testing.assert_allclose(
        *map(np.concatenate, (whole.logprobs, cut.logprobs)), atol=1e-4
    )


def test_a_long_prompt_needs_little_memory():
    # 8 heads: 32k x 32k weights of one would be 4 GiB.
    t, size = 32_768, 1024
    config = dataclasses.replace(LLAMA, layers=2, neurons=4096, context=t)
    params = random_params(config)
    model = make_decoder(config.architecture, params.weights, implementation="xla")
    slots = empty_slots(model, 1, t, t // 64 + 1, 64, params.weights)
    chunk = empty_chunk(model, size, 1, params.weights)
    program = steps.read_pieces.lower(params.weights, chunk, slots, model=model)
    memory = program.compile().memory_analysis()
    cache = sum(leaf.nbytes for leaf in (*slots.cache.keys, *slots.cache.values))
    assert memory.alias_size_in_bytes >= cache
    # The activations of a piece: residual stream, Q, K, V and what attention puts out,
    # some of them twice; and the MLP's.
    positions = config.dim + 2 * (config.heads + config.kv_heads) * config.head_dim
    assert memory.temp_size_in_bytes < 4 * size * (2 * positions + 4 * config.neurons)
