"""What a model is: one frozen, hashable record, the static half of `Params`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal, get_args

FORMAT_VERSION = 2
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
LARGEST_CONTEXT = 2**24  # tokens, whose positions float32 still tells apart


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its context extensions.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: "default"; "linear" (positions divided by `factor`, Chen et al. 2023);
        "dynamic" (a larger base the more the model's context exceeds the original
        one: NTK-aware, as vLLM); "llama3" (frequencies rescaled by wavelength, as
        LLaMA-3.1); "yarn" (by dimension, and logits sharpened; Peng et al. 2023, arXiv
        2309.00071); or "longrope" (by dimension, otherwise where the model's context
        exceeds the original one; Ding et al. 2024, arXiv 2402.13753).
      factor: how much longer the context became (not "default", "longrope").
      low_freq_factor: wavelengths above `original_context` / this are stretched by
        `factor` ("llama3").
      high_freq_factor: wavelengths below `original_context` / this stay ("llama3").
      original_context: context length in tokens before the extension ("dynamic",
        "llama3", "yarn", "longrope").
      divisors: d / 2 numbers that divide the frequencies, as GGUF files store a
        scaling, and "longrope" its short factors; empty for none.
      beta_fast: dimensions that turn at least so often over the original context
        stay ("yarn").
      beta_slow: those that turn at most so often are stretched ("yarn").
      truncate: whether the ramp between them begins and ends at whole dimensions
        ("yarn").
      scale: of queries and of keys ("yarn", "longrope").
      long_divisors: instead of `divisors` in a context beyond the original one
        ("longrope").
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    divisors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    scale: float = 1.0
    long_divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"unknown kind of rotary positions: {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and kind of a decoder-only model.

    Letters are the README's glossary. The fields from `bos_ids` on describe the
    checkpoint rather than the computation; `architecture` leaves them out.

    Attributes:
      family: the family it was converted from ("llama", "mistral",
        "opt", "qwen2", "qwen3", "smollm3").
      vocab_size: v.
      dim: m, width of the residual stream.
      layers: number of decoder layers.
      heads: h, query heads.
      kv_heads: k, KV groups; h is a multiple of k.
      head_dim: d.
      neurons: f, MLP neurons.
      context: longest sequence in tokens.
      norm: "rms" (RMSNorm) or "layer" (LayerNorm with bias).
      norm_eps: added to the variance.
      activation: of the MLP.
      gated_mlp: whether the activation multiplies a second projection (SwiGLU).
      rope: rotary positions, or None for learned ones.
      qkv_bias: whether the query, key and value projections have a bias.
      out_bias: whether the attention's output projection has a bias.
      mlp_bias: whether the MLP's matrices have biases.
      tied_embeddings: whether the output head is the token embedding.
      embed_dim: width of the token embedding where it differs from `dim` (OPT's
        `word_embed_proj_dim`), else `dim`.
      qk_norm: whether each query and key head is normalised before it is rotated.
      windows: by layer, newest tokens that a token sees, itself included; 0 for all.
        Empty if every layer sees them all.
      rotary: by layer, whether queries and keys are rotated (not in NoPE layers, which
        know the order of tokens by the causal mask alone). Empty if they are in every
        layer, or positions are learned.
      norm_after: whether each half of a layer is normalised after it has been added to
        the residual stream (OPT-350M), not before it reads that.
      final_norm: whether the last layer's output is normalised before the output head.
      bos_ids: tokens that start a text; for information, the tokenizer adds them.
      eos_ids: tokens that end a text.
      budgets: KV groups that an adapter's policy reads in each layer; empty without
        an adapter.
      adaptive: whether they are means over tokens: which token reads how many is then
        decided by the thresholds.
      neuron_budgets: MLP neurons that an adapter's policy reads in each layer, by
        batch size: ((batch, (n of layer 0, n of layer 1, ...)), ...), batch sizes
        ascending; empty for all neurons.
      thresholds: per layer, the router score from which on an adaptive policy reads a
        KV group; empty without an adapter that brings them.
      model_hash: SHA-256 over the source tensors, hexadecimal.
      folder: the checkpoint's folder; holds the tokenizer.
    """

    family: str
    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    context: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Literal["relu", "silu", "gelu"]
    gated_mlp: bool
    rope: Rope | None
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    embed_dim: int
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    rotary: tuple[bool, ...] = ()
    norm_after: bool = False
    final_norm: bool = True
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    budgets: tuple[float, ...] = ()
    adaptive: bool = False
    neuron_budgets: tuple[tuple[int, tuple[int, ...]], ...] = ()
    thresholds: tuple[float, ...] = ()
    model_hash: str = ""
    folder: str = ""

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim"),
            *("neurons", "context", "embed_dim"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, options in (
            ("norm", ("rms", "layer")),
            ("activation", ("relu", "silu", "gelu")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(
                    f"{name} must be one of {options}, got {getattr(self, name)!r}"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise ValueError(
                f"windows must be {self.layers} numbers of 0 or more, "
                f"got {self.windows}"
            )
        if self.rotary and (len(self.rotary) != self.layers or not self.rope):
            raise ValueError(
                f"rotary must be {self.layers} flags beside rope, got {self.rotary}"
            )
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim: {self.head_dim}")
        if self.rope and self.rope.kind == "dynamic" and self.head_dim < 4:
            raise ValueError("dynamic rotary positions need a head_dim of 4 or more")
        if self.rope and self.rope.kind == "longrope":
            for name in ("divisors", "long_divisors"):
                count = len(getattr(self.rope, name))
                if count != self.head_dim // 2:
                    raise ValueError(
                        f"longrope needs {self.head_dim // 2} {name}, got {count}"
                    )

    @property
    def group(self) -> int:
        """Query heads per KV group, g."""
        return self.heads // self.kv_heads

    def window(self, layer: int) -> int | None:
        """Newest tokens that a token of the layer sees; None for all."""
        window = self.windows[layer] if self.windows else 0
        return window if 0 < window < self.context else None

    def rope_of(self, layer: int) -> Rope | None:
        """The layer's rotary positions, if it has them."""
        return self.rope if not self.rotary or self.rotary[layer] else None

    def with_context(self, context: int) -> ModelConfig:
        """The same model for texts of another length.

        Rotary positions go on beyond what a model was made for, if not what it has
        learned.

        Args:
          context: longest sequence in tokens.

        Raises:
          ValueError: if it is out of range, or another than a table of learned
            positions has.
        """
        whole = isinstance(context, int) and not isinstance(context, bool)
        if not whole or not 1 <= context <= LARGEST_CONTEXT:
            raise ValueError(
                f"context must be an integer from 1 to {LARGEST_CONTEXT}, "
                f"got {context!r}"
            )
        if self.rope is None and context != self.context:
            raise ValueError(
                f"context {context}: the model has learned positions of "
                f"{self.context} tokens, and no others"
            )
        return dataclasses.replace(self, context=context)

    @property
    def architecture(self) -> ModelConfig:
        """What the computation depends on: the static argument of compiled programs.

        Two checkpoints of one architecture share their programs, although their
        configs differ (as they must: `jax.jit` hands back a pytree with the static
        half that it saw first).
        """
        return dataclasses.replace(
            self,
            bos_ids=(),
            eos_ids=(),
            budgets=(),
            adaptive=False,
            neuron_budgets=(),
            thresholds=(),
            model_hash="",
            folder="",
        )

    def to_json(self) -> str:
        """The record as JSON text, without `folder` (it may move)."""
        fields = dataclasses.asdict(self)
        del fields["folder"]
        return json.dumps({"format_version": FORMAT_VERSION, **fields}, indent=2)

    @classmethod
    def from_json(cls, text: str, folder: str = "") -> ModelConfig:
        """Read what `to_json` wrote.

        Args:
          text: JSON.
          folder: the checkpoint's folder.

        Raises:
          ValueError: if the text is not such a record, or of another format version.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.pop("format_version")
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"not a polarjax config.json: {error}") from error
        except RecursionError:
            raise ValueError("not a polarjax config.json: it is too deep") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"checkpoint format {version!r}, but this polarjax reads "
                f"{FORMAT_VERSION}: convert the original model again"
            )
        try:
            if fields["rope"] is not None:
                rope = {"long_divisors": (), **fields["rope"]}  # an older one has none
                for name in ("divisors", "long_divisors"):
                    rope[name] = tuple(rope[name])
                fields["rope"] = Rope(**rope)
            tuples = (
                "windows",
                "rotary",
                "bos_ids",
                "eos_ids",
                "budgets",
                "thresholds",
            )
            fields |= {name: tuple(fields[name]) for name in tuples}
            found = fields["neuron_budgets"]
            fields["neuron_budgets"] = tuple_neuron_budgets(found)
            return cls(**fields, folder=folder)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a polarjax config.json: {error}") from error


def tuple_neuron_budgets(found: Any) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """`ModelConfig.neuron_budgets` from JSON, where tuples became lists.

    Args:
      found: [[batch, [n, ...]], ...].

    Raises:
      TypeError: if it has another form; the numbers are not looked at.
    """
    pairs = [tuple(entry) for entry in found]
    if any(len(pair) != 2 for pair in pairs):
        raise TypeError(f"neuron_budgets must be pairs, got {found!r}")
    return tuple((batch, tuple(counts)) for batch, counts in pairs)
