"""Multiple choice and last-word tasks from JSONL rows, through the decode step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from polarjax.evaluation.scoring import score_continuations
from polarjax.evaluation.statistics import paired_bootstrap
from polarjax.generation import Tokenizer
from polarjax.generation.requests import bucket
from polarjax.params import Params
from polarjax.policy import SelectionPolicy
from polarjax.training.text import open_text


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Which rows of a task were right.

    Attributes:
      ids: of the rows.
      correct: bool[rows]: the likeliest choice is the label, or every token of the
        target is the most probable.
      correct_per_byte: bool[rows], by likelihood per byte of the choice; equal to
        `correct` for targets.
      density: KV groups read / KV groups there.
    """

    ids: list[str]
    correct: np.ndarray
    correct_per_byte: np.ndarray
    density: float

    @property
    def accuracy(self) -> float:
        """Share of rows that are right."""
        return float(self.correct.mean())

    @property
    def accuracy_per_byte(self) -> float:
        """Share of rows that are right by likelihood per byte (acc_norm)."""
        return float(self.correct_per_byte.mean())

    def difference(self, baseline: TaskResult) -> tuple[float, float, float]:
        """Accuracy minus a baseline's on the same rows, with a 95 % interval."""
        change = self.correct.astype(float) - baseline.correct
        return float(change.mean()), *paired_bootstrap(change)


def read_rows(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSONL file, plain or gzipped.

    Each has `context` and either `choices` and `label`, or `target`.

    Args:
      path: the file.
      limit: most rows to read; None for all.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the line that is no such row.
    """
    rows = []
    with open_text(path, "task") as file:
        for i, line in enumerate(file):
            if limit is not None and i == limit:
                break
            try:
                row = {"id": str(i), **json.loads(line)}
                whole = isinstance(row["context"], str) and (
                    bool(row["target"])
                    if "target" in row
                    else 0 <= row["label"] < len(row["choices"])
                )
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise ValueError(
                    f"{path}, line {i + 1}: a row needs a context, and choices with a "
                    "label or a target"
                )
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def evaluate_task(
    params: Params,
    rows: Sequence[dict[str, Any]],
    policy: SelectionPolicy,
    *,
    batch: int = 16,
    implementation: Implementation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Score every choice as a continuation of its context.

    Choices are joined to the context by a space; targets bring their own. An empty
    context stands for the end-of-text token.

    Args:
      params: the model, with a tokenizer.
      rows: from `read_rows`.
      policy: not yet bound.
      batch: continuations decoded together.
      implementation: of the kernels; None chooses by device.
      progress: called as progress(done, total) after each batch.

    Raises:
      ValueError: if there is no tokenizer, or a row exceeds the model's context.
    """
    tokenizer = Tokenizer.require(params.config, "a task")
    pairs = _pairs(params, rows, tokenizer)
    weights, bound = policy.bind(params, batch)
    # Alike lengths together, so that few programs serve and little is padding. The
    # order, and so every batch, depends on the rows alone.
    order = sorted(range(len(pairs)), key=lambda i: tuple(map(len, pairs[i])))
    nll, best = np.zeros(len(pairs)), np.zeros(len(pairs), bool)
    densities = []
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        group = [pairs[i] for i in np.resize(chosen, batch)]
        prompts = _pad([p for p, _ in group], 16)
        found, hits, density = score_continuations(
            *(weights, bound, prompts, jnp.array([len(p) for p, _ in group])),
            *(
                _pad([c for _, c in group], 8),
                jnp.array([len(c) - 1 for _, c in group]),
            ),
            config=params.config.architecture,
            implementation=implementation,
        )
        nll[chosen] = np.asarray(found, np.float64).sum(axis=1)[: len(chosen)]
        best[chosen] = np.all(np.asarray(hits)[: len(chosen)], axis=1)
        densities.append(float(density))
        if progress:
            progress(start + len(chosen), len(pairs))
    correct, per_byte, at = [], [], 0
    for row in rows:
        if "target" in row:
            right = right_per_byte = bool(best[at])
            at += 1
        else:
            scores = -nll[at : at + len(row["choices"])]
            size = [len(choice.encode()) for choice in row["choices"]]
            right = int(scores.argmax()) == row["label"]
            right_per_byte = int((scores / size).argmax()) == row["label"]
            at += len(scores)
        correct.append(right)
        per_byte.append(right_per_byte)
    ids = [str(row["id"]) for row in rows]
    return TaskResult(
        ids, np.array(correct), np.array(per_byte), float(np.mean(densities))
    )


def _pairs(
    params: Params, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> list[tuple[list[int], list[int]]]:
    """(prompt without its last token, that token and the continuation) of each."""
    config = params.config
    start = tokenizer.backend.token_to_id("<|endoftext|>")
    if start is None:
        start = (config.eos_ids or (0,))[0]
    pairs = []
    for row in rows:
        prompt = tokenizer.encode(row["context"]) if row["context"] else []
        if len(prompt) < 2:  # one token to prefill, one to decode
            prompt = [start] * (2 - len(prompt)) + prompt
        texts = (
            [row["target"]]
            if "target" in row
            else [(" " if row["context"] else "") + c for c in row["choices"]]
        )
        for text in texts:
            ids = tokenizer.encode(text, special=False)
            if len(prompt) + len(ids) > config.context:
                raise ValueError(
                    f"row {row['id']} has {len(prompt) + len(ids)} tokens, the model's "
                    f"context is {config.context}"
                )
            pairs.append((prompt[:-1], [prompt[-1], *ids]))
    return pairs


def _pad(rows: Sequence[Sequence[int]], smallest: int) -> jnp.ndarray:
    padded = np.zeros((len(rows), bucket(max(map(len, rows)), smallest)), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return jnp.asarray(padded)
