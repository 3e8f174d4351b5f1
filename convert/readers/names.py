"""What training wraps a model in, and so leaves in the names of its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from convert.source import ConversionError, SourceTensor

# Modules around a part of the model, or all of it.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
# Around the whole: of every name, or none.
_PREFIXES = {"module.": "DataParallel", "base_model.model.": "PEFT"}
# Of weights beside those of the model, which they change.
_UNMERGED = re.compile(r"\.(lora_\w+|ia3_\w+|base_layer|modules_to_save)\.")


def unwrap(
    tensors: Mapping[str, SourceTensor],
) -> tuple[dict[str, SourceTensor], str]:
    """Name tensors as the model inside does.

    Args:
      tensors: by name.

    Returns:
      The same by the new names, and what was left out of the old ones, in words; empty
      if nothing.

    Raises:
      ConversionError: if they are those of an unmerged PEFT model, or two get one name.
    """
    for name in tensors:
        if _UNMERGED.search(name):
            raise ConversionError(
                f"{name} is of an unmerged PEFT model: save the merged one "
                "(`model.merge_and_unload().save_pretrained(DST)`) and convert DST"
            )
    names = {name: name for name in tensors}  # old -> new
    found: dict[str, str] = {}
    more = True
    while more and names:
        more = False
        for wrapper, maker in _WRAPPERS.items():
            pattern = re.compile(rf"(^|\.){re.escape(wrapper)}")
            if any(pattern.search(name) for name in names.values()):
                names = {old: pattern.sub(r"\1", new) for old, new in names.items()}
                found[wrapper], more = maker, True
        for prefix, maker in _PREFIXES.items():
            if all(name.startswith(prefix) for name in names.values()):
                names = {old: new[len(prefix) :] for old, new in names.items()}
                found[prefix], more = maker, True
    renamed: dict[str, SourceTensor] = {}
    for old, new in names.items():
        if new in renamed:
            raise ConversionError(
                f"{old} and {renamed[new].stored_name} are both {new} of the model"
            )
        renamed[new] = dataclasses.replace(tensors[old], name=new)
    words = ", ".join(f"{part} ({maker})" for part, maker in found.items())
    return renamed, words
