"""Result files of `polarjax eval`, read and checked, for the page that shows them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import reprlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polarjax.evaluation.results import FORMAT

_RIGHT = "`polarjax eval --out FILE` writes a result"
_MODES = {
    "decode": "contexts are read dense, what follows them is decoded sparsely",
    "kernel": "every token goes through the sparse decode step",
    "mask": "a dense model in which what is not selected is set to zero",
}


class Column(NamedTuple):
    """Which number a table shows, and how.

    Attributes:
      heading: above it.
      key: in the result; with `change`, among what is said against dense.
      form: as `format` takes it.
      scale: that it is multiplied with.
      change: whether it is against dense.
      interval: whether it always has one; a number may have one, too.
    """

    heading: str
    key: str
    form: str
    scale: float = 1
    change: bool = False
    interval: bool = True


_Number = functools.partial(Column, interval=False)
_DENSITY = _Number("Density", "density", ".3f")
_COST = (
    _DENSITY,
    _Number("Tokens/s", "tokens_per_second", ",.0f"),
    _Number("Speed / dense", "speed", ".2f"),
)
_COST_TEXT = (
    " Density is the share of KV groups read, as counted; a speed was timed once and "
    "has no interval."
)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a kind of measurement has, and what the page says of it.

    Attributes:
      title: of the section.
      text: how its intervals came about.
      needs: keys that are always there.
      columns: of the tables.
      quality: what is plotted against dense: the column, its axis, dense's value.
      caption: of those plots.
      missing: what is said if it was not measured.
    """

    title: str
    text: str
    needs: tuple[str, ...]
    columns: tuple[Column, ...]
    missing: str
    quality: tuple[Column, str, float] | None = None
    caption: str = ""


_CHANGE = Column("Minus dense, points", "accuracy", "+.2f", 100, True)
_RATIO = Column("Ratio to dense", "ratio", ".4f", 1, True)
PARTS = {
    "tasks": Part(
        title="Tasks",
        text="Accuracies have Wilson intervals. Others come from resampling questions, "
        "those against dense together with dense's answers; where fewer than ten "
        "changed, the bounds are Bonett and Price's. McNemar's p is exact, and not "
        "corrected for how many tests there are." + _COST_TEXT,
        needs=("accuracy", "positions", "use"),
        columns=(
            Column("Accuracy, %", "accuracy", ".2f", 100),
            _CHANGE,
            _Number("McNemar p", "mcnemar_p", ".2g", 1, True),
            Column("Accuracy per byte, %", "accuracy_per_byte", ".2f", 100),
            Column("Per byte minus dense", "accuracy_per_byte", "+.2f", 100, True),
            _Number("p per byte", "mcnemar_p_per_byte", ".2g", 1, True),
            Column("Target perplexity", "target_perplexity", ",.3f"),
            Column("Ratio to dense", "target_perplexity_ratio", ".4f", 1, True),
            *_COST,
        ),
        missing="No task was measured: `--tasks` of `polarjax eval` adds the tables "
        "and the plots of accuracy by density and by speed.",
        quality=(_CHANGE, "accuracy minus dense, points", 0),
        caption="One panel for each task. Bars are 95 % intervals, from resampling "
        "questions together with dense's answers to them; where a bar crosses the "
        "dashed line, which is dense, the difference may be chance.",
    ),
    "perplexity": Part(
        title="Perplexity",
        text="Intervals come from resampling windows of the text (fewer than eight: "
        "Student's t); those of the ratio "
        "are paired with dense." + _COST_TEXT,
        needs=("perplexity", "positions", "use"),
        columns=(
            Column("Perplexity", "perplexity", ",.3f"),
            _RATIO,
            _Number("Per word", "word_perplexity", ",.3f"),
            _Number("Per byte", "byte_perplexity", ",.4f"),
            _Number("Bits per byte", "bits_per_byte", ".4f"),
            *_COST,
        ),
        missing="No text was measured: `--text` of `polarjax eval` adds the tables and "
        "the plots of perplexity by density and by speed.",
        quality=(_RATIO, "perplexity / dense", 1),
        caption="One panel for each way of cutting the text. Bars are 95 % intervals, "
        "from resampling windows together with dense's likelihoods of them; above the "
        "dashed line, which is dense, a policy predicts worse.",
    ),
    "generation": Part(
        title="Generation damage",
        text="Greedy continuations of the same prompts as dense: the share that is the "
        "same to the last token, tokens before the first that differs, and, along "
        "dense's own text, the Kullback-Leibler divergence from dense and how often "
        "the likeliest token is the same. The share has a Wilson interval; the others "
        "come from resampling prompts.",
        needs=("identical", "tokens_until_divergence", "kl", "agreement"),
        columns=(
            Column("Identical, %", "identical", ".1f", 100),
            Column("Tokens until divergence", "tokens_until_divergence", ".1f"),
            Column("Mean KL, nats", "kl", "#.3g"),
            Column("Top-1 agreement, %", "agreement", ".2f", 100),
            _DENSITY,
        ),
        missing="No text was generated: `--generation` of `polarjax eval`, with "
        "`--text`, adds the table and the histogram of KL by token.",
    ),
}


class Run(NamedTuple):
    """A result file; the tag tells it from others, if there are any."""

    record: Mapping[str, Any]
    file: str
    tag: str

    def named(self, label: str) -> str:
        """A label that no other file has."""
        return f"{label} · {self.tag}" if self.tag else label

    def kind(self, label: str) -> str:
        """Name of the policy that a label stands for."""
        policy = self.record["setup"]["policies"][label]
        parts = policy.get("balanced", 1)
        return policy["policy"] + (f" balanced {parts}" if parts > 1 else "")

    def measured(self, part: str) -> Mapping[str, Any]:
        """Measurements of a part, by name."""
        found = self.record.get(part) or {}
        return {part: found} if part == "generation" and found else found


class Row(NamedTuple):
    """What one policy yielded in one measurement."""

    run: Run
    label: str
    found: Mapping[str, Any]

    def value(self, column: Column) -> Any:
        """A number or [value, low, high], as the result has it; None for none.

        A value that no float can hold is none, too: `eval` writes it as null.
        """
        found = self.found.get("against_dense") if column.change else self.found
        value = (found or {}).get(column.key)
        return None if isinstance(value, list) and value[:1] == [None] else value

    @property
    def kind(self) -> str:
        """Name of the policy."""
        return self.run.kind(self.label)

    @property
    def dense(self) -> bool:
        """Whether that is Dense."""
        return self.kind == "dense"


class Group(NamedTuple):
    """What policies yielded on the same data."""

    title: str
    note: str
    rows: list[Row]


def read_results(paths: Sequence[str | Path]) -> list[Run]:
    """Read result files.

    Args:
      paths: at least one.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file that is no result, or is damaged.
    """
    if not paths:
        raise ValueError("no result file: name at least one")
    runs: list[Run] = []
    for path in map(Path, paths):
        record = _load(path)
        base = f"{_clean(path.stem)}, {record['setup']['mode']}"
        tags = itertools.chain([base], (f"{base} ({i})" for i in itertools.count(2)))
        tag = next(tag for tag in tags if tag not in [run.tag for run in runs])
        runs.append(Run(record, _clean(path.name), tag))
    return runs if len(runs) > 1 else [runs[0]._replace(tag="")]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_RIGHT}")
    try:
        text = path.read_text(encoding="utf-8")
        record = _clean(json.loads(text, parse_constant=lambda _: None))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); {_RIGHT}") from None
    if not isinstance(record, dict) or record.get("kind") != "polarjax eval":
        raise ValueError(f"{path} is no result of `polarjax eval`; {_RIGHT}")
    if (version := record.get("format_version")) != FORMAT:
        raise ValueError(
            f"{path} has format version {reprlib.repr(version)}, this polarjax reads "
            f"{FORMAT}; {_RIGHT}"
        )
    try:
        _check(Run(record, path.name, ""))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {_RIGHT}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged ({what}); {_RIGHT}") from None
    return record


def _clean(value: Any) -> Any:
    """Without control characters and halves of surrogate pairs, which XML forbids."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else " " for c in value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value


def _check(run: Run) -> None:
    """Raise something if there is what cannot be shown."""
    facts_of(run)
    for name, part in PARTS.items():
        for row in (row for group in gather([run], name) for row in group.rows):
            source = f"{name}, {row.label!r}"
            for key in part.needs:
                if row.found.get(key) is None:
                    raise ValueError(f"{source}: {key} is not there")
            for column in part.columns:
                value = row.value(column)
                _check_value(value, column.interval, f"{source}: {column.key}")
            _check_value(row.found.get("positions"), False, f"{source}: positions")
    head_use(run)
    divergences([run])
    recall(run)


def _check_value(value: Any, interval: bool, source: str) -> None:
    if value is None:
        return
    numbers = value if isinstance(value, list) else [value]
    known = [number for number in numbers if number is not None]
    right = all(type(n) in (int, float) and math.isfinite(n) for n in known)
    if interval or isinstance(value, list):
        right &= len(numbers) == 3 and numbers[0] is not None
    if not right:
        shape = "[value, low, high]" if interval else "a number, or with an interval"
        raise ValueError(f"{source} must be {shape}, got {reprlib.repr(value)}")


def _array(values: Any, dimensions: int, source: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{source} must be numbers in {dimensions} dimensions")
    return array


def gather(runs: Sequence[Run], name: str) -> list[Group]:
    """What all files hold of a part, by the data that it was measured on."""
    groups: dict[Any, Group] = {}
    for run in runs:
        for title, found in run.measured(name).items():
            key = title, _note(found)
            if key not in groups:
                same = sum(title == other for other, _ in groups)
                title = f"{title} ({same + 1})" if same else title
                groups[key] = Group(title, key[1], [])
            groups[key].rows.extend(_rows(run, found["results"]))
    return list(groups.values())


def _note(found: Mapping[str, Any]) -> str:
    """What was measured on; equal for equal data."""
    words = [str(found["kind"])] if found.get("kind") else []
    if "ids" in found:
        words.append(f"{len(found['ids']):,} questions")
    counts = "tokens", "words", "bytes", "window", "prefix", "stride", "prompts"
    for key in (*counts, "prompt_tokens", "new_tokens", "file"):
        if (value := found.get(key)) is not None:
            value = f"{value:,}" if isinstance(value, int) else value
            words.append(f"{key.replace('_', ' ')} {value}")
    if found.get("sha256"):
        words.append(f"sha256 {str(found['sha256'])[:12]}")
    return ", ".join(words)


def _rows(run: Run, results: Mapping[str, Any]) -> list[Row]:
    """With speeds relative to dense in the same measurement."""
    dense = [found for label, found in results.items() if run.kind(label) == "dense"]
    base = dense[0].get("tokens_per_second") if dense else None
    rows = []
    for label, found in results.items():
        own = found.get("tokens_per_second")
        speed = own / base if own and base else None
        rows.append(Row(run, label, {**found, "speed": speed}))
    return rows


def head_use(run: Run) -> dict[str, np.ndarray]:
    """Of each sparse policy, in the measurement with the most positions."""
    most: dict[str, Mapping[str, Any]] = {}
    for name in ("tasks", "perplexity"):
        for row in (row for group in gather([run], name) for row in group.rows):
            known = most.get(row.label, {"positions": -1})
            if not row.dense and row.found["positions"] > known["positions"]:
                most[row.label] = row.found
    return {
        label: _array(found["use"], 2, f"use of {label!r}")
        for label, found in most.items()
    }


def divergences(runs: Sequence[Run]) -> list[tuple[Row, np.ndarray]]:
    """Of each sparse policy, KL of every token of every prompt."""
    found = []
    for row in (row for group in gather(runs, "generation") for row in group.rows):
        values = list(itertools.chain(*(row.found.get("kl_per_token") or ())))
        if values and not row.dense:
            found.append((row, _array(values, 1, f"KL of {row.label!r}")))
    return found


def recall(run: Run) -> list[np.ndarray]:
    """Layers, recall of the routers, and of chance; [] if there is none."""
    if not (recall := run.record.get("recall")):
        return []
    keys = "layers", "routers", "chance"
    return list(_array([recall[key] for key in keys], 2, "recall"))


def facts_of(run: Run) -> dict[str, Any]:
    """What was measured, how and where: for the head of the page."""
    made, setup = run.record["made"], run.record["setup"]
    adapter, versions = setup.get("adapter") or {}, made.get("versions") or {}
    same = itertools.groupby(adapter.get("budgets") or ())
    budgets = [(groups, len(list(layers))) for groups, layers in same]
    mode = setup["mode"]
    rows = {
        "Checkpoint": setup["checkpoint"],
        "Model": f"{setup.get('layers')} layers of {setup.get('kv_heads')} KV groups",
        "Model hash": setup.get("model_hash"),
        "Mode": f"{mode}: {_MODES[mode]}" if mode in _MODES else mode,
        "Batch": setup.get("batch"),
        "Dtype": setup.get("dtype"),
        "Implementation": setup.get("implementation"),
        "Device": made.get("device"),
        "Mesh": ", ".join(f"{k} {n}" for k, n in (setup.get("mesh") or {}).items()),
        "Commit": made.get("commit"),
        "Finished": made.get("finished"),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items() if v),
        "Policies": ", ".join(setup["policies"]),
        "Adapter": adapter.get("name", "none"),
        "Adapter hash": adapter.get("sha256"),
        # Such as 3, 2 × 29.
        "Adapter budgets": ", ".join(
            f"{k} × {n}" if n > 1 else f"{k}" for k, n in budgets
        ),
        "Bootstrap seed": setup.get("bootstrap_seed"),
    }
    return {
        "title": run.tag or run.file,
        "rows": {key: str(v) for key, v in rows.items() if v not in (None, "")},
        "command": shlex.join(["polarjax", *made["command"]]),
    }
