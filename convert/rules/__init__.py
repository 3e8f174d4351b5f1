"""Per family: its configuration in our words, and where each of its tensors goes."""

from __future__ import annotations

import textwrap
from typing import Any

from convert.rules import llama, opt, rope
from convert.rules.fields import QUANTIZATIONS, unread_fields
from convert.rules.rope import context_notes
from convert.rules.rule import Rule
from convert.source import ConversionError
from polarjax.config import ModelConfig

__all__ = ["context_notes", "describe", "understand", "unread"]

# model_type -> (architecture, module)
_FAMILIES = {
    "llama": ("LlamaForCausalLM", llama),
    "mistral": ("MistralForCausalLM", llama),
    "opt": ("OPTForCausalLM", opt),
    "qwen2": ("Qwen2ForCausalLM", llama),
    "qwen3": ("Qwen3ForCausalLM", llama),
    "smollm3": ("SmolLM3ForCausalLM", llama),
}


def understand(config: dict[str, Any]) -> tuple[ModelConfig, tuple[Rule, ...]]:
    """Find the family of a checkpoint and read its configuration.

    Args:
      config: what Hugging Face's config.json holds.

    Returns:
      What the model is, and the family's rules.

    Raises:
      ConversionError: naming what is not supported, or missing.
    """
    supported = ", ".join(name for name, _ in _FAMILIES.values())
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConversionError(f"configuration: architectures is {architectures!r}")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        what = ", ".join(map(str, architectures)) or f"model_type {model_type!r}"
        raise ConversionError(
            f"the architecture {what} is not supported; supported: {supported}"
        )
    architecture, family = _FAMILIES[model_type]
    if architectures and architecture not in architectures:
        raise ConversionError(
            f"the architecture {', '.join(map(str, architectures))} is not supported; "
            f"supported: {supported}"
        )
    for name in QUANTIZATIONS:
        if quantization := config.get(name):
            method = "?"
            if isinstance(quantization, dict):
                method = quantization.get("quant_method", "?")
            raise ConversionError(
                f"{name}: the checkpoint is quantised ({method}): convert the original "
                "one, or a GGUF file"
            )
    unread(config)
    try:
        return family.model_config(config), family.rules(config)
    except ConversionError:
        raise
    except ValueError as error:  # ModelConfig's own checks
        raise ConversionError(f"configuration: {error}") from None


def unread(config: dict[str, Any]) -> list[str]:
    """What to tell of fields that have a value, and that nobody reads.

    Args:
      config: of a family that `understand` knows.

    Returns:
      At most one line.

    Raises:
      ConversionError: naming a field that asks for what is not computed here.
    """
    family = _FAMILIES[config["model_type"]][1]
    names = unread_fields(config, family.FIELDS[config["model_type"]])
    for name in ("rope_parameters", "rope_scaling"):
        record = config.get(name)
        if isinstance(record, dict):
            found = unread_fields(record, rope.ROPE_FIELDS)
            names += [f"{name}.{field}" for field in found]
    if not names:
        return []
    listed = textwrap.shorten(", ".join(names), 500, placeholder=" ...")
    return [f"configuration fields that were not read: {listed}"]


def describe(config: ModelConfig) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """The way back from `understand`: a config.json, and the family's rules.

    Args:
      config: what the model is.

    Raises:
      ConversionError: if Hugging Face's classes have no words for it.
    """
    if config.family not in _FAMILIES:
        raise ConversionError(
            f"the family {config.family!r} is not one of {', '.join(_FAMILIES)}"
        )
    architecture, family = _FAMILIES[config.family]
    ids = {
        f"{name}_token_id": found[0] if len(found) == 1 else (list(found) or None)
        for name, found in (("bos", config.bos_ids), ("eos", config.eos_ids))
    }
    record = {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied_embeddings,
        **family.configuration(config),
        **ids,
    }
    return record, family.rules(record)
