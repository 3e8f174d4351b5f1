"""What ends a text, as users ask for it, checked."""

from __future__ import annotations

from typing import Any

from polarjax.config import ModelConfig
from polarjax.engine.settings import LONGEST_STOP, MOST_STOP_STRINGS, MOST_STOPS
from polarjax.engine.templates import check_text
from polarjax.engine.tokenizer import Tokenizer
from polarjax.engine.values import (
    check_count,
    is_row,
    is_sequence,
    listed,
    per_request,
)
from polarjax.storage.quoted import quoted


def stop_strings(stop: Any, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """The strings that end a text, from one or several.

    Raises:
      ValueError: if one is no string, empty, too long or no Unicode text, if they are
        too many, or there is no tokenizer.
    """
    stops = stop if isinstance(stop, list | tuple) else (stop,)
    check_count("stop", stops, MOST_STOP_STRINGS, "strings")
    for s in stops:
        if not isinstance(s, str) or not s:
            raise ValueError(f"stop must be non-empty strings, got {quoted(stop)}")
        if len(s) > LONGEST_STOP:
            raise ValueError(
                f"a string of stop must have {LONGEST_STOP} characters at most, got "
                f"{len(s)}: {quoted(s)}"
            )
        check_text(s, f"the stop string {s[:20]!a}")
    if stops and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, this checkpoint has none")
    return tuple(stops)


def stop_tokens(stop_ids: Any, config: ModelConfig) -> tuple[int, ...]:
    """The token ids that end a request; None means the model's own.

    Raises:
      ValueError: if one is no token id of the model, or they are too many.
    """
    if stop_ids is None:
        stop_ids = config.eos_ids
    v = config.vocab_size
    several = isinstance(stop_ids, set | frozenset) or is_sequence(stop_ids)
    if not several and not is_row(stop_ids):
        raise ValueError(
            f"stop_ids must be a list of token ids, got {quoted(stop_ids)}"
        )
    check_count("stop_ids", stop_ids, MOST_STOPS, "token ids")
    many = list(listed("stop_ids", stop_ids))
    found = per_request("stop_ids", many, len(many), 0, v - 1, whole=True)
    return tuple(int(x) for x in found)
