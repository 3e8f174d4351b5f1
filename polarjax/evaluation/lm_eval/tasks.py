"""Tasks of EleutherAI's lm-eval under several policies, beside the dense model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from pallas_kernels import Implementation, runnable
from polarjax.evaluation.batches import Mode
from polarjax.evaluation.measure import Progress
from polarjax.evaluation.results import DENSE
from polarjax.evaluation.statistics import (
    difference_interval,
    mcnemar,
    mean_interval,
    within,
)
from polarjax.params import Params
from polarjax.policy import Dense, Policy

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from polarjax.evaluation.lm_eval.model import PolarLM


# Draws for standard errors that have no formula. lm-eval's 100 000 take minutes.
_DRAWS = 1000

# What lm-eval makes of a mean log-likelihood. A difference of means yields a ratio of
# perplexities, or a difference of bits.
_RATIOS = ("perplexity", "word_perplexity", "byte_perplexity")
_SCALES: dict[str, Callable[[float], float]] = {
    **dict.fromkeys(_RATIOS, lambda mean: float(np.exp(-mean))),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


# What lies between 0 and 1 in every row.
_FRACTIONS = (
    "acc",
    "acc_norm",
    "acc_bytes",
    "acc_mutual_info",
    "exact_match",
    "em",
    "f1",
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """How lm-eval puts its tasks.

    Attributes:
      num_fewshot: examples before each question; None for the task's own number.
      limit: rows of each task, or below 1 the fraction of them; None for all.
      apply_chat_template: whether questions are put as the model's chat template has
        it.

    Raises:
      ValueError: if the limit is not above 0.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit must be above 0, got {self.limit}")


def run_lm_eval(
    params: Params,
    policies: Mapping[str, Policy],
    tasks: Sequence[str],
    asked: Asked | None = None,
    *,
    mode: Mode = "decode",
    batch: int = 16,
    include_path: str | Path | None = None,
    implementation: Implementation | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run lm-eval's tasks for the dense model and for policies, on the same rows.

    Any task runs whose data is on disk, or can be downloaded. Without a network, set
    HF_HUB_OFFLINE=1, else each look at the hub takes half a minute to fail.

    Args:
      params: the model; its checkpoint must have a tokenizer.
      policies: by label, not yet bound. "Dense" is added.
      tasks: names of tasks, groups or tags, or patterns such as "mmlu_*".
      asked: how the tasks are put; None for their own way, with all rows.
      mode: how continuations are scored, see `polarjax.evaluation.scoring`; texts are
        generated as `generate` does it in any mode.
      batch: requests computed together.
      include_path: folder with YAML files of more tasks.
      implementation: of the kernels; None chooses by device.
      progress: called as progress(what, units done, units in all).

    Returns:
      JSON values: the settings, and "tasks": for each task or group its "doc_ids", how
      many requests were "truncated" to the model's context and, in "policies", the
      "density" reached over tokens computed sparsely (None if there were none) and
      "metrics", each with "value", "stderr" and "against_dense". That is a paired
      "difference" or "ratio" with "low" and "high" of its 95 % interval, and McNemar's
      "p" for metrics that are 0 or 1; or None for metrics that are no mean over rows.

    Raises:
      ValueError: if lm-eval is not installed, a task is unknown or has no data, or a
        setting is out of range.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from polarjax.evaluation.lm_eval.model import PolarLM
    except ModuleNotFoundError as error:
        raise ValueError(
            f"lm-eval is not installed: pip install 'polarjax[eval]' ({error})"
        ) from error
    policies = {DENSE: Dense(), **policies}
    if not isinstance(policies[DENSE], Dense):
        raise ValueError(f"the label {DENSE!r} is the dense model's: choose another")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"there is no folder {include_path} to include tasks from")
    runnable(implementation)  # before data is downloaded
    manager = TaskManager(include_path=include_path)
    names = _find(manager, tasks)
    model = PolarLM(
        params,
        policies,
        mode=mode,
        batch=batch,
        implementation=implementation,
        progress=progress,
    )
    options = dataclasses.asdict(asked or Asked())
    runs = {}
    for label in policies:
        model.label = label
        runs[label] = _evaluate(model, names, manager, options)
    return {
        "lm_eval": lm_eval.__version__,
        "mode": mode,
        "batch": batch,
        **options,
        "tasks": {name: _task(name, runs, model) for name in runs[DENSE]["results"]},
    }


def _find(manager: TaskManager, patterns: Sequence[str]) -> list[str]:
    """Names that fit the patterns."""
    names: dict[str, None] = {}
    for pattern in patterns:
        found = manager.match_tasks([pattern])
        if not found:
            raise ValueError(
                f"lm-eval has no task {pattern!r}: list its tasks with `lm-eval ls "
                "tasks`, or include the folder that holds the task's YAML file"
            )
        names |= dict.fromkeys(found)
    if not names:
        raise ValueError("name at least one task")
    return list(names)


def _load(manager: TaskManager, name: str, num_fewshot: int | None) -> list[Any]:
    """The tasks or groups of a name, with their data.

    Raises:
      ValueError: if they do not load, or a task takes no examples but some are asked
        for, which lm-eval would leave out.
    """
    try:
        found = manager.load([name])
    except Exception as error:  # data sets come with code of all kinds
        lines = str(error).splitlines() or [""]
        raise ValueError(
            f"task {name!r} does not load, its data must be on disk or within reach: "
            f"{type(error).__name__}: {lines[0]}"
        ) from error
    for task, loaded in found["tasks"].items():
        if num_fewshot and loaded.get_config("num_fewshot") == 0:
            raise ValueError(
                f"task {task!r} says num_fewshot 0 in its file, and so takes no "
                f"examples, not {num_fewshot}: leave --num-fewshot out for it"
            )
    children: Any = found.get("group_map", {}).values()
    inside = {child for group in children for child in group}
    every: dict[str, Any] = {**found.get("groups", {}), **found["tasks"]}
    return [part for key, part in every.items() if key not in inside]


def _evaluate(
    model: PolarLM, names: list[str], manager: TaskManager, options: dict[str, Any]
) -> dict[str, Any]:
    """lm-eval's own results for the policy that answers."""
    import lm_eval

    evaluate: Callable[..., Any] = lm_eval.simple_evaluate
    # lm-eval prints as it computes: standard output is the caller's.
    with _one_process(), contextlib.redirect_stdout(sys.stderr):
        return evaluate(
            model=model,
            tasks=[
                part
                for name in names
                for part in _load(manager, name, options["num_fewshot"])
            ],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=_DRAWS,
            **options,
        )


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Keep lm-eval from forking: jax has threads, and a fork may wait for ever."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _task(name: str, runs: Mapping[str, Any], model: PolarLM) -> dict[str, Any]:
    """One task or group, under every policy."""
    dense = runs[DENSE]
    leaves = _leaves(name, dense["group_subtasks"])
    return {
        "version": dense["versions"].get(name),
        "num_fewshot": dense["n-shot"].get(name),
        "doc_ids": {
            leaf: sorted({row["doc_id"] for row in dense["samples"][leaf]})
            for leaf in leaves
        },
        "truncated": sum(
            n for (leaf, _), n in model.truncated.items() if leaf in leaves
        ),
        "policies": {
            label: {
                "density": model.density(label, leaves),
                "metrics": _metrics(name, leaves, run, None if run is dense else dense),
            }
            for label, run in runs.items()
        },
    }


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """Tasks of a group, or a task itself."""
    found: dict[str, None] = {}
    for child in children.get(name, ()):
        found |= dict.fromkeys(_leaves(child, children))
    return list(found) or [name]


def _metrics(name: str, leaves: Sequence[str], run: Any, dense: Any) -> dict[str, Any]:
    """Every number that lm-eval reports, compared if there is something to."""
    reported, metrics = run["results"][name], {}
    for key, value in reported.items():
        metric, _, kind = key.partition(",")  # "acc,none": kind is lm-eval's filter
        number = isinstance(value, int | float | np.number)
        if kind and number and not metric.endswith("_stderr"):
            metrics[key] = {
                "value": _finite(value),
                "stderr": _finite(reported.get(f"{metric}_stderr,{kind}")),
                "against_dense": dense and _compare(name, key, leaves, run, dense),
            }
    return metrics


def _compare(
    name: str, key: str, leaves: Sequence[str], run: Any, dense: Any
) -> dict[str, Any] | None:
    """A metric against the dense model's, row by row; None if it is no mean of rows."""
    metric = key.partition(",")[0]
    scale = _SCALES.get(metric, float)
    rows, dense_rows = (_rows(key, leaves, found["samples"]) for found in (run, dense))
    try:
        pairs = [(rows[at], dense_rows[at]) for at in rows | dense_rows]
        both = np.array(pairs, np.float64)  # [rows, 2] or, with weights, [rows, 2, 2]
    except (KeyError, TypeError, ValueError):  # rows without the metric, or texts
        return None
    weights = np.ones(len(pairs))
    if both.ndim == 3:
        weights = both[:, 0, 1]
        both = both[..., 0] / weights[:, None]
    if not len(pairs):
        return None
    means = np.average(both, axis=0, weights=weights)
    values = [found["results"][name][key] for found in (run, dense)]
    if not np.allclose([scale(mean) for mean in means], values, rtol=1e-6, atol=1e-9):
        return None
    extra = {}
    if scale is float and np.isin(both, (0, 1)).all():
        new, old = both.astype(bool).T
        change, extra = difference_interval(new, old), {"p": mcnemar(new, old)}
    else:
        change = mean_interval(both[:, 0] - both[:, 1], weights)
        if metric in _FRACTIONS and (0 <= both).all() and (both <= 1).all():
            change = within(change, -1, 1)
    low, high = sorted(map(scale, change[1:]))
    kind = "ratio" if metric in _RATIOS else "difference"
    value = scale(change.value)
    return {kind: _finite(value), "low": _finite(low), "high": _finite(high), **extra}


def _rows(
    key: str, leaves: Sequence[str], samples: Mapping[str, Any]
) -> dict[tuple[str, int], Any]:
    """What each row yields for a metric."""
    metric, _, kind = key.partition(",")
    return {
        (leaf, row["doc_id"]): row[metric]
        for leaf in leaves
        for row in samples[leaf]
        if row["filter"] == kind and metric in row
    }


def _finite(value: Any) -> float | None:
    """A number as JSON has it; None for "N/A" and infinity."""
    if isinstance(value, int | float | np.number) and math.isfinite(value):
        return float(value)
    return None


def table(result: Mapping[str, Any]) -> Table:
    """A result for people.

    Args:
      result: of `run_lm_eval`.
    """
    table = Table()
    for title in ("task", "metric", "policy"):
        table.add_column(title)
    for title in ("value ± stderr", "against dense (95 % interval)", "density"):
        table.add_column(title, justify="right")
    for name, task in result["tasks"].items():
        for key in task["policies"][DENSE]["metrics"]:
            for label, found in task["policies"].items():
                metric = found["metrics"][key]
                error = metric["stderr"]
                value = _show(metric["value"])
                cells = (
                    name,
                    key.removesuffix(",none"),
                    label,
                    value if error is None else f"{value} ± {_show(error)}",
                    _against(metric["against_dense"]),
                    _show(found["density"]),
                )
                table.add_row(*cells)
        table.add_section()
    return table


def _against(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    bounds = f"[{_show(found['low'])}, {_show(found['high'])}]"
    if "ratio" in found:
        return f"× {_show(found['ratio'])} {bounds}"
    return f"{_show(found['difference'], '+')} {bounds}"


def _show(value: float | None, sign: str = "") -> str:
    if value is None:
        return "?"
    return f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.3e}"
