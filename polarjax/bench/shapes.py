"""Models at their published shapes, and the cases to time. No jax: `--help` is here."""

import dataclasses

from polarjax.config import ModelConfig, Rope


def llama(
    layers: int,
    dim: int,
    heads: int,
    kv_heads: int,
    neurons: int,
    vocab: int,
    context: int,
    theta: float = 1e4,
) -> ModelConfig:
    """An architecture like LLaMA's."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim // heads,
        neurons=neurons,
        context=context,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rope=Rope(theta),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied_embeddings=False,
        embed_dim=dim,
    )


def opt(layers: int, dim: int, heads: int, vocab: int = 50272) -> ModelConfig:
    """An architecture like OPT's."""
    return dataclasses.replace(
        llama(layers, dim, heads, heads, 4 * dim, vocab, 2048),
        family="opt",
        norm="layer",
        activation="relu",
        gated_mlp=False,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
    )


MODELS = {
    "opt-6.7b": opt(32, 4096, 32),
    "opt-30b": opt(48, 7168, 56),
    "opt-66b": opt(64, 9216, 72),
    "llama-2-7b": llama(32, 4096, 32, 32, 11008, 32000, 4096),
    "llama-3.1-8b": llama(32, 4096, 32, 8, 14336, 128256, 131072, 5e5),
    "llama-3.1-70b": llama(80, 8192, 64, 8, 28672, 128256, 131072, 5e5),
    "mistral-7b": dataclasses.replace(
        llama(32, 4096, 32, 8, 14336, 32768, 32768, 1e6), family="mistral"
    ),
    "qwen2.5-7b": dataclasses.replace(
        llama(28, 3584, 28, 4, 18944, 152064, 32768, 1e6),
        family="qwen2",
        qkv_bias=True,
    ),
}
TOY_MODELS = {
    "toy-llama": llama(2, 64, 4, 2, 96, 500, 512),
    "toy-opt": opt(2, 64, 4, vocab=500),
}


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """One sparse policy, and what is wanted of it on an H100.

    Attributes:
      heads: fraction of the KV groups read; None for the adapter's own budgets where
        they pay, as `generate` decides. Random weights have budgets of half the groups.
      neurons: fraction of the MLP neurons read; None for all of them (or, without
        `heads`, the adapter's own).
      floor: wanted floor / time.
      over_dense: wanted speedup over our dense.
      balanced: whether each of several devices that share the model reads as many of
        its own; on one device there is nothing to balance.
      over_one: wanted speedup over one device, of the same densities.
    """

    heads: float | None
    neurons: float | None = None
    floor: float | None = None
    over_dense: float | None = None
    balanced: bool = False
    over_one: float | None = None

    def label(self, tp: int = 1) -> str:
        """How rows call it, where so many devices share the model."""
        heads = f"heads {self.heads:.3g}" if self.heads else "as generate decides"
        neurons = f", neurons {self.neurons:.3g}" if self.neurons else ""
        return heads + neurons + (", balanced" if self.balanced and tp > 1 else "")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch of equally long sequences, and policies beside dense.

    Attributes:
      model: name in `MODELS`, with ":n" for its layers 1 to n alone; or a checkpoint.
      batch: sequences.
      context: tokens in the cache of each at the end of the steps.
      sparse: policies.
      floor: wanted floor / time of the dense one.
      prefill: (prompts, tokens of each) to time too, if any.
      transformers: whether `transformers` is timed on it too.
      meshes: (tp, dp) of the devices that it is timed on, one after the other.
      over_one: wanted speedup of dense over one device.
    """

    model: str
    batch: int
    context: int
    sparse: tuple[Sparsity, ...] = ()
    floor: float | None = None
    prefill: tuple[tuple[int, int], ...] = ()
    transformers: bool = False
    meshes: tuple[tuple[int, int], ...] = ((1, 1),)
    over_one: float | None = None

    @property
    def devices(self) -> int:
        """How many it needs."""
        return max(tp * dp for tp, dp in self.meshes)


CASES = {
    "llama-2-7b-b16": Case(
        "llama-2-7b",
        16,
        2048,
        (Sparsity(0.5, floor=0.90),),
        0.92,
        transformers=True,
    ),
    "llama-2-7b-b28": Case(
        "llama-2-7b",
        28,
        3968,
        (Sparsity(0.5, floor=0.91, over_dense=1.55),),
        0.93,
    ),
    "llama-3.1-8b-b64": Case(
        "llama-3.1-8b",
        64,
        4096,
        (Sparsity(5 / 8, floor=0.91), Sparsity(4 / 8, floor=0.90)),
        0.93,
        prefill=((8, 2048),),
    ),
    "llama-3.1-8b-b1": Case(
        "llama-3.1-8b",
        1,
        2048,
        (Sparsity(0.5), Sparsity(None, over_dense=1.0)),
        0.85,
    ),
    "opt-6.7b-b48": Case(
        "opt-6.7b",
        48,
        1920,
        (Sparsity(0.5), Sparsity(0.5, 0.58, 0.86, 1.53)),
        0.92,
    ),
    "opt-66b-layers": Case(
        "opt-66b:8", 64, 1920, (Sparsity(21 / 72, 0.49, 0.86, 2.1),), 0.93
    ),
    "llama-3.1-70b-layers": Case(
        "llama-3.1-70b:8", 64, 8192, (Sparsity(5 / 8, floor=0.91),), 0.93
    ),
    "mistral-7b-b32": Case("mistral-7b", 32, 4096, (Sparsity(0.5, floor=0.89),), 0.92),
    "qwen2.5-7b-b32": Case("qwen2.5-7b", 32, 4096, (Sparsity(0.5, floor=0.89),), 0.92),
    "llama-3.1-8b-b64-tp2": Case(
        "llama-3.1-8b",
        64,
        4096,
        (Sparsity(5 / 8, over_one=1.6), Sparsity(6 / 8, balanced=True, over_one=1.7)),
        meshes=((1, 1), (2, 1)),
        over_one=1.75,
    ),
    # Half of its weights are 71 GB.
    "llama-3.1-70b-tp2": Case("llama-3.1-70b", 8, 2048, floor=0.85, meshes=((2, 1),)),
}
TOY_CASES = {
    "toy-llama": Case(
        "toy-llama",
        2,
        128,
        (Sparsity(0.5),),
        prefill=((2, 32),),
        transformers=True,
    ),
    "toy-opt": Case("toy-opt", 2, 128, (Sparsity(0.5, 0.5),)),
    "toy-layers": Case("toy-opt:1", 2, 128, (Sparsity(0.5, 0.5),)),
    "toy-tp2": Case(
        "toy-opt",
        2,
        128,
        (Sparsity(0.5, 0.5), Sparsity(0.5, 0.5, balanced=True)),
        meshes=((1, 1), (2, 1)),
    ),
}


def parse_model(name: str) -> tuple[ModelConfig, int] | None:
    """Configuration of a registered model, and how many layers alone; 0 for whole.

    Args:
      name: such as "opt-6.7b" or "opt-66b:8".

    Returns:
      None if no such model is registered: it is a checkpoint then.

    Raises:
      ValueError: if the model has not so many layers beside layer 0.
    """
    known, colon, count = name.partition(":")
    config = {**MODELS, **TOY_MODELS}.get(known)
    if config is None or not colon:
        return config and (config, 0)
    if not count.isdigit() or not 1 <= int(count) < config.layers:
        raise ValueError(
            f"{name}: layers 1 to n alone need n from 1 to {config.layers - 1}"
        )
    return config, int(count)


def layers_alone(config: ModelConfig, count: int) -> ModelConfig:
    """The configuration of which layers 1 to `count` are timed by themselves.

    Layer 0 is counted, because it is the dense one, but it has no weights here.
    """
    return dataclasses.replace(
        config, layers=count + 1, tied_embeddings=False, final_norm=False
    )


def prefill_flops(config: ModelConfig, prompts: int, tokens: int) -> int:
    """2 x parameters x tokens, and what causal attention needs beside.

    Parameters are the matrices of the layers, which every token meets, but for those
    of the last layer behind its keys and values, and the head, which the last token of
    each prompt meets. Attention is 2 products of 2 d t (t + 1) / 2 for each query head
    and layer.
    """
    m, d, f = config.dim, config.head_dim, config.neurons
    attention = (config.heads + 2 * config.kv_heads) * d * m + config.heads * d * m
    layer = attention + (3 if config.gated_mlp else 2) * f * m
    behind = layer - (config.heads + 2 * config.kv_heads) * d * m
    products = 2 * layer * config.layers * tokens + 2 * config.vocab_size * m
    products -= 2 * behind * (tokens - 1)
    causal = 2 * d * tokens * (tokens + 1) * config.heads * config.layers
    return prompts * (products + causal)
