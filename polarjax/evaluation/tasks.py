"""Multiple choice and last-word tasks: rows of JSON lines, and which were right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.config import ModelConfig
from polarjax.engine import Tokenizer, start_token
from polarjax.evaluation.batches import Continuation
from polarjax.training.text import open_text


@dataclasses.dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
      id: of the row in its task.
      context: what comes before; may be empty.
      choices: continuations to choose from, spaces in front included; one is the
        `target` of a last-word task.
      label: the right one, from 0; None for a target.
      source: file and line.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    label: int | None
    source: str


def read_rows(path: str | Path, limit: int | None = None) -> list[Row]:
    """Rows of a JSONL file, plain or gzipped.

    Each is an object with `context` and either `choices` and `label`, or `target`, and
    optionally `id`. Choices are joined to a context by a space; a target brings its
    own.

    Args:
      path: the file.
      limit: most rows to read; None for all.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file and the line that is no such row.
    """
    rows: list[Row] = []
    with open_text(path, "task") as file:
        for i, line in enumerate(file):
            if len(rows) == limit:
                break
            source = f"{path}, line {i + 1}"
            try:
                rows.append(_row(json.loads(line), source, str(i)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}: no JSON: {error}") from None
            if (rows[0].label is None) != (rows[-1].label is None):
                raise ValueError(
                    f"{source}: the file's rows must all have choices or all a target"
                )
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _row(value: Any, source: str, name: str) -> Row:
    def need(right: bool, message: str) -> None:
        if not right:
            raise ValueError(f"{source}: {message}")

    need(isinstance(value, dict), "a row must be a JSON object")
    name, context = str(value.get("id", name)), value.get("context")
    need(isinstance(context, str), f"context must be a string, got {context!r}")
    if "target" in value:
        target = value["target"]
        need(
            isinstance(target, str) and bool(target.strip()),
            f"target must be a string that is not empty, got {target!r}",
        )
        need("choices" not in value, "a row has choices or a target, not both")
        need(_is_text(context + target), "its text is no Unicode text")
        return Row(name, context, (target,), None, source)
    choices, label = value.get("choices"), value.get("label")
    need(
        isinstance(choices, list) and len(choices) > 1,
        f"choices must be a list of at least two strings, got {choices!r}",
    )
    for choice in choices:
        need(
            isinstance(choice, str) and bool(choice.strip()),
            f"a choice must be a string that is not empty, got {choice!r}",
        )
    whole = isinstance(label, int) and not isinstance(label, bool)
    need(
        whole and 0 <= label < len(choices),
        f"label must be from 0 to {len(choices) - 1}, got {label!r}",
    )
    need(_is_text("".join([context, *choices])), "its text is no Unicode text")
    space = " " if context.strip() else ""
    return Row(name, context, tuple(space + c for c in choices), label, source)


def _is_text(text: str) -> bool:
    """Whether it has no lone halves of characters, which no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def encode_pair(
    tokenizer: Tokenizer, config: ModelConfig, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Tokens of a context, and those that a continuation adds to it.

    Both are tokenized together, as lm-eval does it: some tokenizers treat the start of
    a text in their own way. Spaces at the context's end go to the continuation. An
    empty context is the start token.

    Args:
      tokenizer: of the model.
      config: of the model.
      context: text; may be empty.
      continuation: text.
    """
    if not context.strip():
        start = start_token(tokenizer, config)
        return [start], tokenizer.encode(continuation, special=False)
    head = tokenizer.encode(context.rstrip())
    whole = tokenizer.encode(context + continuation)
    return head, whole[len(head) :]


def task_items(
    rows: Sequence[Row], tokenizer: Tokenizer, config: ModelConfig
) -> list[Continuation]:
    """Every choice of every row as a continuation of its context.

    Args:
      rows: of a task.
      tokenizer: of the model.
      config: of the model.

    Raises:
      ValueError: naming file and line of a row that is longer than the model's
        context, or of which nothing is left to score.
    """
    items = []
    for row in rows:
        for choice in row.choices:
            head, tail = encode_pair(tokenizer, config, row.context, choice)
            if not head or not tail:
                raise ValueError(f"{row.source}: {choice!r} has no tokens of its own")
            if len(head) + len(tail) > config.context + 1:
                raise ValueError(
                    f"{row.source}: row {row.id!r} has {len(head) + len(tail)} tokens, "
                    f"the model's context is {config.context}"
                )
            items.append(Continuation((*head, *tail), len(tail), row.source))
    return items


@dataclasses.dataclass(frozen=True)
class Answers:
    """Which rows of a task were right.

    Attributes:
      right: bool[rows]: the likeliest choice is the label, or every token of the
        target is the most probable one.
      right_per_byte: bool[rows], by likelihood per byte of the choice (acc_norm); None
        for targets.
    """

    right: np.ndarray
    right_per_byte: np.ndarray | None


def grade(rows: Sequence[Row], nll: np.ndarray, greedy: np.ndarray) -> Answers:
    """Say which rows are right.

    Args:
      rows: of a task.
      nll: float[items], of `task_items`.
      greedy: bool[items].
    """
    if rows[0].label is None:
        return Answers(np.asarray(greedy, bool), None)
    right, per_byte, at = [], [], 0
    for row in rows:
        scores = -nll[at : at + len(row.choices)]
        # The space that joins is not the choice's own.
        joined = bool(row.context.strip())
        sizes = np.array([len(choice[joined:].encode()) for choice in row.choices])
        right.append(int(scores.argmax()) == row.label)
        per_byte.append(int((scores / sizes).argmax()) == row.label)
        at += len(row.choices)
    return Answers(np.array(right), np.array(per_byte))
