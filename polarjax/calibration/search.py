"""Per-layer budgets by measured loss: what scores the settings of a search.

How the search goes through them is `polarjax.calibration.path`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels import Implementation
from polarjax.calibration.path import Budgets, Evaluate, Setting, search_path
from polarjax.evaluation.batches import Continuation, Mode
from polarjax.evaluation.measure import Journal, Progress
from polarjax.evaluation.scoring import Scorer
from polarjax.params import Params
from polarjax.planning.cost import step_cost
from polarjax.policies import named, with_learned
from polarjax.policy import Dense, Policy

Thresholds = Callable[[Budgets], tuple[float, ...]]
"""Budgets -> the router score from which on a group is read, by layer."""

_LABEL = "sparse"


@dataclasses.dataclass(frozen=True)
class Search:
    """What budgets are searched for, and how far and closely.

    Attributes:
      max_drop: relative increase of perplexity that will be allowed in each domain.
      batch: sequences of the decode step whose bytes are to be saved.
      context: tokens in the cache of each of them.
      mode: how windows are scored, see `polarjax.evaluation.scoring`. "mask" is the
        fastest without a GPU; as what comes before the scored tokens is sparse in it
        too, "decode" tells better what decoding will cost.
      rows: windows computed together.
      width: most candidates that are measured for a step of the path but the first,
        for which all are.
      step: groups by which a layer is lowered at a time; None for an eighth of them,
        one at the least, or a twelfth with thresholds.
      reach: how far beyond `max_drop` the path goes, as a multiple of it.

    Raises:
      ValueError: if a number is not positive.
    """

    max_drop: float
    batch: int
    context: int
    mode: Mode = "mask"
    rows: int = 16
    width: int = 4
    step: float | None = None
    reach: float = 1.5

    def __post_init__(self) -> None:
        for name in ("max_drop", "rows", "width", "step", "reach"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def step_of(self, kv_heads: int, thresholds: bool) -> float:
        """Groups by which a layer of so many is lowered at a time."""
        if self.step is None:
            return kv_heads / 12 if thresholds else max(1, kv_heads // 8)
        if not thresholds and self.step != int(self.step):
            raise ValueError(f"step {self.step}: a part of a group needs thresholds")
        return self.step


def search_budgets(
    params: Params,
    domains: Mapping[str, Sequence[Continuation]],
    settings: Search,
    *,
    policy: Policy | None = None,
    thresholds: Thresholds | None = None,
    implementation: Implementation | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> tuple[Setting, ...]:
    """Lower budgets group by group, where a byte saved costs the least loss.

    All settings are scored by one compiled program: the budgets are its data. MLP
    neurons are all read: which ones a batch shares depends on its size.

    Args:
      params: the model, with routers if the policy is `Polar`.
      domains: calibration windows, by name.
      settings: what is searched for.
      policy: that picks the groups, without densities of its own; None for `Polar()`.
      thresholds: with them budgets are means over tokens, and a token reads the groups
        that score above the thresholds of a setting: a few tokens can then do without
        a group in many layers, which costs much less than all tokens in a few.
      implementation: of the kernels; None chooses by device.
      journal: settings found there are not measured again; others are added to it. It
        must be of this model, these routers, thresholds and these windows.
      progress: called as progress("searching budgets", settings measured, most).

    Returns:
      The path: all-dense first, each setting within the one before it, up to the last
      whose calibration drop, and bound for a further domain, are at most `reach` x
      `max_drop` of the settings.

    Raises:
      ValueError: if a number is out of range, there is nothing to score, or the policy
        does not fit the model.
    """
    config, k = params.config, params.config.kv_heads
    step = settings.step_of(k, thresholds is not None)
    if thresholds and policy is not None and not policy.asks:
        raise ValueError(
            "thresholds are of routers' scores: they need the policy Polar"
        )
    if not domains or not all(domains.values()):
        raise ValueError("there is no calibration window to measure budgets on")
    items = [item for windows in domains.values() for item in windows]
    cost = step_cost(params, batch=settings.batch, context=settings.context)
    evaluate = _evaluator(
        params,
        items,
        policy or named("polar"),
        thresholds,
        {} if journal is None else journal,
        mode=settings.mode,
        batch=min(settings.rows, len(items)),
        implementation=implementation,
    )
    # The first step measures every layer, each further one a few.
    width, steps = settings.width, (config.layers - 1) * math.ceil((k - 1) / step)
    most = 1 + (config.layers - 1) + width * max(0, steps - 1)
    measured = 0

    def counted(budgets: Budgets) -> np.ndarray:
        nonlocal measured
        found = evaluate(budgets)
        measured += 1
        if progress:
            progress("searching budgets", measured, most)
        return found

    scored = [np.array([w.scored for w in windows]) for windows in domains.values()]
    limit = settings.reach * settings.max_drop
    return search_path(counted, cost, scored, limit=limit, width=width, step=step)


def _evaluator(
    params: Params,
    items: Sequence[Continuation],
    policy: Policy,
    thresholds: Thresholds | None,
    journal: Journal,
    **options: Any,
) -> Evaluate:
    """Scores items under one budget after another; compiles on first need.

    The options are those of a `Scorer`.
    """
    density = policy.settings().get("density")
    if density is not None:
        raise ValueError(
            f"the policy has density {density}: a search finds it, leave it out"
        )
    # The policy at all heads may still differ from dense: by recovery's updates.
    dense = Scorer(params, {_LABEL: Dense()}, **options)
    sparse = _Budgeted(params, policy, thresholds, **options)
    batches = sparse.plan(items)

    def evaluate(budgets: Budgets) -> np.ndarray:
        key = f"budgets/{','.join(map(str, budgets))}"
        if key not in journal:
            scorer = sparse
            if min(budgets) == params.config.kv_heads:
                scorer = dense
            scorer.compile(batches)  # at once, but for the first time
            sparse.set_budgets(budgets)
            nll = np.zeros(len(items))
            for batch in batches:
                found = scorer.score(batch)[_LABEL].nll
                for row, tokens in zip(batch.rows, found, strict=True):
                    nll[row.item] = tokens.sum(dtype=np.float64)
            journal[key] = nll.tolist()
        return np.array(journal[key])

    return evaluate


class _Budgeted(Scorer):
    """A scorer of one policy whose budgets change without another compilation."""

    def __init__(
        self,
        params: Params,
        policy: Policy,
        thresholds: Thresholds | None,
        **options: Any,
    ) -> None:
        config, self._thresholds = params.config, thresholds
        # Bound as if every layer but the first were sparse: all routers are there.
        lowest = (config.kv_heads, *(1,) * (config.layers - 1))
        every = with_learned(params, budgets=lowest, adaptive=False, neuron_budgets=())
        if thresholds:
            every = with_learned(
                every, adaptive=True, thresholds=tuple(map(float, lowest))
            )
        super().__init__(every, {_LABEL: policy.flexing()}, **options)
        self.set_budgets((config.kv_heads,) * config.layers)

    def set_budgets(self, budgets: Budgets) -> None:
        weights, bound = self._bound[_LABEL]
        k, passing = self.params.config.kv_heads, ()
        if self._thresholds:
            # Layers that are not sparse are compiled like the others: all scores pass.
            found = zip(self._thresholds(budgets), budgets, strict=True)
            all_pass = float(np.finfo(np.float32).min)
            passing = [x if n < k else all_pass for x, n in found]
        self._bound[_LABEL] = weights, bound.budgeted(budgets, passing)
