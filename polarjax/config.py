"""What a model is: one frozen, hashable record, the static half of `Params`."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from typing import Annotated, Any, Literal

from polarjax.storage.checked import (
    LATER,
    UNSTORED,
    Between,
    check_record,
    read_record,
)
from polarjax.storage.files import FileError, parse_json

FORMAT_VERSION = 2
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

# Sizes beyond this are damage, and arithmetic on them may take forever; nor does
# float32 tell positions beyond it apart.
LARGEST = 2**24
Size = Annotated[int, Between(1, LARGEST)]
Depth = Annotated[int, Between(1, 2**12)]
TokenId = Annotated[int, Between(0, LARGEST - 1)]
Word = Annotated[str, Between(0, 64)]
# float32 makes zeros or infinities of what is far beyond.
Moderate = Annotated[float, Between(1e-6, 1e6)]
# What a checkpoint that was saved with an adapter says of its policy, in the same file:
# the numbers of `polarjax.policy.Learned`.
POLICY = ("budgets", "adaptive", "neuron_budgets", "thresholds")
NO_CONFIG = "not a polarjax config.json"


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

    theta: Annotated[float, Between(2, 1e30)] = 10000.0
    kind: RopeKind = "default"
    factor: Moderate = 1.0
    low_freq_factor: Moderate = 1.0
    high_freq_factor: Moderate = 4.0
    original_context: Size = 8192
    divisors: tuple[Moderate, ...] = ()
    beta_fast: Moderate = 32.0
    beta_slow: Moderate = 1.0
    truncate: bool = True
    scale: Moderate = 1.0
    long_divisors: Annotated[tuple[Moderate, ...], LATER] = ()

    def __post_init__(self) -> None:
        check_record(self)
        for kind, low, high in (
            ("llama3", "low_freq_factor", "high_freq_factor"),
            ("yarn", "beta_slow", "beta_fast"),
        ):
            less, more = getattr(self, low), getattr(self, high)
            if self.kind == kind and less >= more:
                raise ValueError(f"{low} {less} must be below {high} {more}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and kind of a decoder-only model.

    Letters are those of docs/glossary.md. The fields from `bos_ids` on describe the
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
      model_hash: SHA-256 over the source tensors, hexadecimal.
      folder: the checkpoint's folder; holds the tokenizer.
    """

    family: Word
    vocab_size: Size
    dim: Size
    layers: Depth
    heads: Size
    kv_heads: Size
    head_dim: Size
    neurons: Size
    context: Size
    norm: Literal["rms", "layer"]
    norm_eps: Annotated[float, Between(1e-30, 1)]
    activation: Literal["relu", "silu", "gelu"]
    gated_mlp: bool
    rope: Rope | None
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    embed_dim: Size
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    rotary: tuple[bool, ...] = ()
    norm_after: bool = False
    final_norm: bool = True
    bos_ids: tuple[TokenId, ...] = ()
    eos_ids: tuple[TokenId, ...] = ()
    model_hash: Word = ""
    folder: Annotated[str, UNSTORED] = ""

    def __post_init__(self) -> None:
        check_record(self)
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        wide = not all(0 <= window <= LARGEST for window in self.windows)
        if self.windows and (len(self.windows) != self.layers or wide):
            raise ValueError(
                f"windows must be {self.layers} numbers from 0 to {LARGEST:,}, "
                f"got {reprlib.repr(self.windows)}"
            )
        if self.rotary and (len(self.rotary) != self.layers or not self.rope):
            raise ValueError(
                f"rotary must be {self.layers} flags beside rope, "
                f"got {reprlib.repr(self.rotary)}"
            )
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim: {self.head_dim}")
        if self.rope and self.rope.kind == "dynamic" and self.head_dim < 4:
            raise ValueError("dynamic rotary positions need a head_dim of 4 or more")
        if self.rope:
            self._check_divisors(self.rope)
        for name in ("bos_ids", "eos_ids"):
            if max(getattr(self, name), default=0) >= self.vocab_size:
                raise ValueError(
                    f"{name} must be below the vocabulary's {self.vocab_size}, got "
                    f"{reprlib.repr(getattr(self, name))}"
                )

    def _check_divisors(self, rope: Rope) -> None:
        for name in ("divisors", "long_divisors"):
            count, needed = len(getattr(rope, name)), self.head_dim // 2
            if count != needed and (count or rope.kind == "longrope"):
                raise ValueError(
                    f"rope has {count} {name}: a head_dim of {self.head_dim} needs "
                    f"{needed}, or none unless its kind is 'longrope'"
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
        if not whole or not 1 <= context <= LARGEST:
            raise ValueError(
                f"context must be an integer from 1 to {LARGEST}, got {context!r}"
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
            model_hash="",
            folder="",
        )

    def to_json(self, policy: dict[str, Any]) -> str:
        """The record as JSON text, without `folder` (it may move).

        Args:
          policy: what else the file says: `polarjax.policy.Learned.numbers`.
        """
        fields = dataclasses.asdict(self)
        del fields["folder"]
        record = {"format_version": FORMAT_VERSION, **fields, **policy}
        return json.dumps(record, indent=2)

    @classmethod
    def from_json(cls, text: str, folder: str = "") -> ModelConfig:
        """Read what `to_json` wrote, but for its policy.

        Args:
          text: JSON.
          folder: the checkpoint's folder.

        Raises:
          ValueError: if the text is not such a record, or of another format version.
        """
        try:
            fields = parse_json(text, "it")
            if "format_version" not in fields:
                raise ValueError("it has no format_version")
        except ValueError as error:
            raise FileError(f"{NO_CONFIG}: {error}") from None
        version = fields.pop("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise FileError(
                f"checkpoint format {reprlib.repr(version)}, but this polarjax reads "
                f"{FORMAT_VERSION}: convert the original model again"
            )
        own = {name: value for name, value in fields.items() if name not in POLICY}
        try:
            found = read_record(cls, own)
        except ValueError as error:
            raise FileError(f"{NO_CONFIG}: {error}") from None
        return dataclasses.replace(found, folder=folder)
