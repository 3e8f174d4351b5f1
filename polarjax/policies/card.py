"""An adapter's card: what it was learned for, and how, for people and for `load`."""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from polarjax.config import Size, Word
from polarjax.policy import Budgets, NeuronBudgets, Thresholds
from polarjax.storage.checked import Between, read_record
from polarjax.storage.checksums import CHECKSUMS_FILE, check_text, read_checksums
from polarjax.storage.files import (
    LARGEST_TABLE,
    FileError,
    is_there,
    parse_json,
    read_text,
)
from polarjax.storage.folder import CARD_FILE

ADAPTER_FORMAT = 1
Count = Annotated[int, Between(0, 2**62)]
Record = dict[str, Any]


@dataclass(frozen=True)
class Card:
    """Every key that a card may have; those with a default may be missing.

    Attributes:
      model_hash: of the model that it was learned on.
      budgets: KV groups to read in each layer.
      adaptive: whether the budgets are means over tokens.
      neuron_budgets: MLP neurons to read in each layer, by batch size.
      thresholds: of the routers' scores.
      kv_heads: of the model.
      texts: learned from, each with name and weight.
      tokens: of them.
      tokens_sha256: of these.
      held_out_tokens: by text, tokens that were measured on.
      held_out_sha256: of these.
      context: tokens of a block.
      seed: of all draws.
      training: settings of calibration.
      recovery: settings of recovery.
      weights_dtype: that the model had in memory.
      training_seconds: that it took.
      neurons: by batch size, what is known of neuron routers.
      cost: bytes of a decode step.
      divergence: by text, from dense before and after recovery.
      parameters: how many recovery added.
      recall: of the routers, by text.
      quality: perplexities by text and policy.
      contract: what is promised.
      made: command, time, versions, device.
      warning: of a quality much worse than the dense model's.
      data: whatever its maker says of its data.
      notes: whatever its maker says besides.
    """

    model_hash: Word
    budgets: Budgets
    adaptive: bool = False
    neuron_budgets: NeuronBudgets = ()
    thresholds: Thresholds = ()
    kv_heads: Size = 1
    texts: list[Any] = field(default_factory=list)
    tokens: Count = 0
    tokens_sha256: Word = ""
    held_out_tokens: Record = field(default_factory=dict)
    held_out_sha256: Record = field(default_factory=dict)
    context: Count = 0
    seed: int = 0
    training: Record = field(default_factory=dict)
    recovery: Record = field(default_factory=dict)
    weights_dtype: Word = ""
    training_seconds: Annotated[float, Between(0, 1e12)] = 0.0
    neurons: Record = field(default_factory=dict)
    cost: Record = field(default_factory=dict)
    divergence: Record = field(default_factory=dict)
    parameters: Count = 0
    recall: Any = None
    quality: Record = field(default_factory=dict)
    contract: Record = field(default_factory=dict)
    made: Record = field(default_factory=dict)
    warning: Annotated[str, Between(0, 4000)] = ""
    data: Any = None
    notes: Any = None


def _check(found: dict[str, Any]) -> Card:
    """The card, if what JSON has is one of this format."""
    fields = {name: value for name, value in found.items() if name != "format_version"}
    return read_record(Card, fields, partial=True)


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of an adapter.

    Args:
      path: the folder.

    Returns:
      Its keys; "budgets" is a list, "adaptive", "thresholds" and "neuron_budgets" are
      there and as in `polarjax.policy.Learned`.

    Raises:
      FileNotFoundError: if there is no card.
      ValueError: if it is damaged or of another format.
    """
    path = Path(path)
    if not is_there(path / CARD_FILE):
        raise FileNotFoundError(
            f"no adapter at {path}: it should hold {CARD_FILE}, as `polarjax "
            "calibrate` writes it"
        )
    try:
        text = read_text(path / CARD_FILE, LARGEST_TABLE)
        found = parse_json(text, "it")
        if "format_version" not in found:
            raise ValueError("it has no format_version")
        version = found["format_version"]
        if type(version) is not int or version != ADAPTER_FORMAT:
            raise ValueError(
                f"it has adapter format {reprlib.repr(version)}, this polarjax reads "
                f"{ADAPTER_FORMAT}: calibrate again"
            )
        card = _check(found)
    except ValueError as error:
        raise FileError(f"{path / CARD_FILE} is no adapter card: {error}") from None
    if is_there(path / CHECKSUMS_FILE):
        check_text(path, CARD_FILE, text, read_checksums(path))
    return found | {
        "adaptive": card.adaptive,
        "neuron_budgets": card.neuron_budgets,
        "thresholds": tuple(map(float, card.thresholds)),
    }


def card_text(facts: dict[str, Any]) -> str:
    """A card as it is written.

    Args:
      facts: its keys, JSON values.

    Raises:
      ValueError: naming a key that is none of a card's, or a value that is wrong.
    """
    text = json.dumps({**facts, "format_version": ADAPTER_FORMAT}, indent=2)
    _check(parse_json(text, "the card"))
    return text + "\n"
