"""Reading prompts into a cache, in blocks, is one pass over them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.cache import PagedCache, Pieces
from polarjax.engine import steps
from polarjax.engine.slots import empty_slots
from polarjax.model import (
    Decoder,
    causal,
    extend,
    logits,
    make_decoder,
    whole,
)
from tests.models import LLAMA, MHA, OPT, OPT_AFTER, random_params

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
# A block is 16 tokens: one token, a block, one more, the context less one.
LENGTHS = (1, 16, 17, 3, 40, 107)


def relative(ours, theirs) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def read(config, lengths, width, size):
    """What blocks of `size` positions find, and one pass over the same prompts.

    Logits after each prompt; keys and values by layer and prompt, [n, k, d]; the cache.
    """
    b = len(lengths)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (b, width)).astype(np.int32)
    lengths = np.array(lengths, np.int32)
    places = np.roll(np.arange(b, dtype=np.int32), 1)
    model = Decoder(config)

    @jax.jit
    def both(weights):
        every = whole(model, weights, tokens)
        last = logits(model, weights, every.x[np.arange(b), lengths - 1])
        cache = PagedCache.empty(config, b, config.context, jnp.float32)
        view, options = (
            cache.of_rows(places),
            {"prefill_tokens": b * size, "fresh": True},
        )
        found = extend(model, weights, tokens, lengths, view, **options)
        return (
            last,
            (every.keys, every.values),
            found.logits,
            found.cache.back_in(cache),
        )

    last, (keys, values), found, cache = both(random_params(config).weights)
    assert np.asarray(cache.lengths)[places].tolist() == lengths.tolist()
    ours = [
        np.asarray(part)[place, :, :n].swapaxes(0, 1)
        for part in (*cache.keys, *cache.values)
        for place, n in zip(places, lengths, strict=True)
    ]
    theirs = [
        np.asarray(part)[i, :n]
        for part in (*keys, *values)
        for i, n in enumerate(lengths)
    ]
    return [*found, *ours], [*last, *theirs], cache


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_one_pass(name, monkeypatch):
    monkeypatch.setattr(causal, "BLOCK", 16)
    # The last block, of 12 tokens, overlaps the one before.
    ours, theirs, _ = read(CONFIGS[name], LENGTHS, 108, 16)
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) < 1e-5


def test_blocks_of_padding_alone_are_left_out():
    ours, theirs, cache = read(CONFIGS["llama"], (33, 5), 108, 32)
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) < 1e-5
    for part in map(np.asarray, (*cache.keys, *cache.values)):
        assert part[:, :, :64].all() and not part[:, :, 64:].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_behind_what_the_cache_has_are_one_pass(name):
    config, model = CONFIGS[name], Decoder(CONFIGS[name])
    rng = np.random.default_rng(0)
    counts = np.array([[1, 1, 1], [16, 30, 2], [5, 1, 30], [30, 30, 30]], np.int32)
    lengths, places = counts.sum(axis=1), np.array([2, 0, 3, 1], np.int32)
    tokens = rng.integers(0, config.vocab_size, (4, 90)).astype(np.int32)

    @jax.jit
    def both(weights):
        every = whole(model, weights, tokens)
        found, view = [], PagedCache.empty(config, 4, config.context, jnp.float32)
        poison = jax.tree.map(lambda x: x.at[:].set(jnp.nan), (view.keys, view.values))
        keys, values = poison
        view = dataclasses.replace(view, keys=keys, values=values).of_rows(places)
        for n, start in zip(counts.T, (counts.cumsum(axis=1) - counts).T, strict=True):
            part = np.zeros((4, 30), np.int32)
            for row, whole_row, first, count in zip(
                part, tokens, start, n, strict=True
            ):
                row[:count] = whole_row[first : first + count]
            last, view, _ = extend(model, weights, part, n, view)
            at = every.x[np.arange(4), start + n - 1]
            found.append((last, logits(model, weights, at)))
        return found, view, every.keys, every.values

    found, view, keys, values = both(random_params(config).weights)
    for ours, theirs in found:
        assert relative(ours, theirs) < 1e-5
    assert np.asarray(view.lengths).tolist() == lengths.tolist()
    pairs = zip((*view.keys, *view.values), (*keys, *values), strict=True)
    for ours, theirs in pairs:
        for place, one, n in zip(places, np.asarray(theirs), lengths, strict=True):
            kept = np.asarray(ours)[place]
            assert relative(kept[:, :n].swapaxes(0, 1), one[:n]) < 1e-5
            assert np.isnan(kept[:, n:]).all()  # padding was written nowhere


@pytest.mark.parametrize("window", [None, 1, 5, 256, 300, 2000])
@pytest.mark.parametrize("t", [256, 700])
def test_blockwise_attention(t, window):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, t, h, 8)), jnp.float32) for h in (6, 2, 2)
    )
    ours = jax.jit(causal.blockwise_attention, static_argnums=3)(q, k, v, window)
    assert relative(ours, causal.causal_attention(q, k, v, window)) < 1e-6


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
    numbers = jax.ShapeDtypeStruct((1,), jnp.int32)
    ids = jax.ShapeDtypeStruct((size,), jnp.int32)
    pieces = Pieces(numbers, numbers, numbers, numbers)
    program = steps.read_pieces.lower(params.weights, ids, pieces, slots, model=model)
    memory = program.compile().memory_analysis()
    cache = sum(leaf.nbytes for leaf in (*slots.cache.keys, *slots.cache.values))
    assert memory.alias_size_in_bytes >= cache
    # The activations of a piece: residual stream, Q, K, V and what attention puts out,
    # some of them twice; and the MLP's.
    positions = config.dim + 2 * (config.heads + config.kv_heads) * config.head_dim
    assert memory.temp_size_in_bytes < 4 * size * (2 * positions + 4 * config.neurons)
