"""Small random models for tests, and how to call them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import polarjax
from polarjax.cache import PagedCache, Pieces
from polarjax.engine.checks import sampling_of, stop_table
from polarjax.engine.sampling import Variant
from polarjax.model import read, weight_shapes
from polarjax.policies import of_learned
from polarjax.policy import Learned

LLAMA = polarjax.ModelConfig(
    family="llama",
    vocab_size=331,
    dim=48,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=16,
    neurons=80,
    context=128,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    rope=polarjax.Rope(1e4),
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied_embeddings=True,
    embed_dim=48,
)
MHA = dataclasses.replace(LLAMA, heads=6, kv_heads=6, head_dim=8)
OPT = dataclasses.replace(
    MHA,
    family="opt",
    norm="layer",
    activation="relu",
    gated_mlp=False,
    rope=None,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
# As OPT-350M is.
OPT_AFTER = dataclasses.replace(OPT, norm_after=True, final_norm=False, embed_dim=24)

# For engines whose requests ask for nothing: fewer programs are compiled.
GREEDY: Any = {
    "variants": [Variant.GREEDY],
    "logprobs": False,
    "prompt_logprobs": False,
}


def random_params(
    config, seed=0, routers=False, neuron_rank=0, scale=0.2, head_rank=0, **learned
) -> polarjax.Params:
    """Random weights, norms and biases included; optionally routers and budgets."""
    rng = np.random.default_rng(seed)  # jax's would compile for each shape

    def draw(shape):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    weights = jax.tree.map(lambda leaf: draw(leaf.shape), weight_shapes(config))
    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 1 if path[-1].key == "scale" else leaf, weights
    )
    tree = {}
    for layer in range(1, config.layers) if routers else ():
        k, m, f = config.kv_heads, config.dim, config.neurons
        parts = {"heads": {"weight": draw((k, m)), "bias": draw((k,))}}
        if head_rank:
            parts["heads"] |= {
                "down": draw((head_rank, m)),
                "up": draw((k, head_rank)),
            }
        if neuron_rank:
            parts["neurons"] = {
                "down": draw((neuron_rank, m)),
                "up": draw((f, neuron_rank)),
            }
        tree[f"layers_{layer}"] = parts
    policy = of_learned(Learned(tree, **learned))
    # `jnp.asarray` compiles a program for each shape.
    return jax.tree.map(jax.device_put, polarjax.Params(weights, policy, config))


def byte_tokenizer():
    """256 tokens, one per byte, and <end> = 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def write_checkpoint(folder, params) -> polarjax.Params:
    """Save a random model with a byte tokenizer and load it back."""
    from polarjax.params import write_folder

    files = {
        "tokenizer.json": byte_tokenizer().to_str(),
        "chat_template.jinja": "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}",
    }
    learned = params.policy.learned
    write_folder(folder, params.config, params.weights, learned, files)
    return polarjax.load(folder)


def empty_cache(config, slots, context, dtype="float32", page=16):
    """A cache of no positions, where each sequence has all pages that it may need."""
    each = -(-context // page)
    cache = PagedCache.pool(config, slots, context, 1 + slots * each, page, dtype)
    pages = np.random.default_rng(0).permutation(slots * each) + 1
    table = jnp.asarray(pages.reshape(slots, each), jnp.int32)
    return dataclasses.replace(cache, table=table)


def read_prompts(model, weights, tokens, lengths, cache):
    """`read` of prompts in a cache that has none of them.

    Args:
      model: that reads.
      weights: its own.
      tokens: int32[b, t], padded at the end.
      lengths: int32[b], tokens of each.
      cache: of b sequences.
    """
    n = tokens.size
    pieces = Pieces.among(lengths, 0, n)
    return read(model, weights, tokens[pieces.places(n)], pieces, cache)


def make_sampling(config, settings):
    """How each of a batch of requests draws; with rules where one of them has any."""
    made = sampling_of(config, settings, stop_table(settings))
    if not any(one.has_rules for one in settings):
        made = dataclasses.replace(made, rules=None)
    return jax.device_put(made)
