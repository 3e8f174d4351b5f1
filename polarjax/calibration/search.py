"""Per-layer budgets by measured loss: a greedy search over sets of sparse layers.

What a layer's groups are worth depends on which other layers have lost theirs: costs of
single layers do not add up. So every candidate is measured as the whole setting that it
would make, on the same windows as the dense model.

Two domains count by the one that loses more. A model that is not at its best on a text
may gain by losing heads there; by the mean over domains a search takes just those
heads, at the price of the others: on SmolLM2-135M-Instruct it gained 1.4 % on books,
and lost 0.3 % on manuals and 1.2 % on WikiText-2, which it had not seen. The divergence
from the dense model is no better guide: of two settings that had moved the next-token
odds of WikiText-2 alike, one had lost 0.3 %, the other 2.4 %.

From three domains on, what counts is what a further domain may lose: where decoding
will read text that nobody calibrated on, the worst of a few domains is too good. It is
bounded by how the known ones differ, and what a domain gained on the path before is no
credit for what it loses now.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from polarjax.evaluation.batches import Continuation, Mode
from polarjax.evaluation.measure import Journal, Progress
from polarjax.evaluation.scoring import Scorer
from polarjax.evaluation.statistics import Interval, further_bound, mean_interval
from polarjax.params import Params
from polarjax.planning.cost import StepCost, step_cost
from polarjax.policies import HeadBudget, Oracle, Polar, Random
from polarjax.policy import Dense

Budgets = tuple[float, ...]
"""KV groups that each sequence reads, by layer; layer 0 reads all of them. Means over
tokens, if they are no whole numbers."""

Thresholds = Callable[[Budgets], tuple[float, ...]]
"""Budgets -> the router score from which on a group is read, by layer."""

Evaluate = Callable[[Budgets], np.ndarray]
"""Budgets -> float64[windows], negative log-likelihood of each window, in nats."""

_LABEL = "sparse"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Budgets, and what they were found to cost and to save.

    Attributes:
      budgets: KV groups by layer.
      drop: perplexity / dense - 1 on the calibration windows of the domain that loses
        most, with its paired 95 % interval. The search has chosen by it: as a promise
        it is too good.
      step_bytes: that one decode step reads, see `StepCost`.
      saved_bytes: of them, against dense.
      further: perplexity / dense - 1 that a further domain will hardly exceed: the
        upper end of the prediction interval over the calibration domains, of which
        each counts from its best setting so far; None for less than three of them.
    """

    budgets: Budgets
    drop: Interval
    step_bytes: int
    saved_bytes: int
    further: float | None = None

    @property
    def most(self) -> float:
        """The increase of perplexity that calibration has to reckon with."""
        value = self.drop.value
        return value if self.further is None else max(value, self.further)

    @property
    def density(self) -> float:
        """KV groups read / KV groups there, mean over layers."""
        return sum(self.budgets) / (len(self.budgets) * self.budgets[0])


def search_budgets(
    params: Params,
    domains: Mapping[str, Sequence[Continuation]],
    *,
    max_drop: float,
    batch: int,
    context: int,
    policy: Polar | Oracle | Random | None = None,
    mode: Mode = "mask",
    rows: int = 16,
    width: int = 4,
    step: float | None = None,
    reach: float = 1.5,
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
      max_drop: relative increase of perplexity that will be allowed in each domain.
      batch: sequences of the decode step whose bytes are to be saved.
      context: tokens in the cache of each of them.
      policy: that picks the groups, without densities of its own; None for `Polar()`.
      mode: how windows are scored, see `polarjax.evaluation.scoring`. "mask" is the
        fastest without a GPU; as what comes before the scored tokens is sparse in it
        too, "decode" tells better what decoding will cost.
      rows: windows computed together.
      width: most candidates that are measured for a step of the path but the first,
        for which all are.
      step: groups by which a layer is lowered at a time; None for an eighth of them,
        one at the least, or a twelfth with thresholds.
      reach: how far beyond `max_drop` the path goes, as a multiple of it.
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
      `max_drop`.

    Raises:
      ValueError: if a number is out of range, there is nothing to score, or the policy
        does not fit the model.
    """
    config, k = params.config, params.config.kv_heads
    if step is None:
        step = k / 12 if thresholds else max(1, k // 8)
    for name, value in (
        ("max_drop", max_drop),
        ("rows", rows),
        ("width", width),
        ("step", step),
        ("reach", reach),
    ):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not thresholds and step != int(step):
        raise ValueError(f"step {step}: a part of a group needs thresholds")
    if thresholds and not isinstance(policy or Polar(), Polar):
        raise ValueError(
            "thresholds are of routers' scores: they need the policy Polar"
        )
    if not domains or not all(domains.values()):
        raise ValueError("there is no calibration window to measure budgets on")
    items = [item for windows in domains.values() for item in windows]
    cost = step_cost(params, batch=batch, context=context)
    evaluate = _evaluator(
        params,
        items,
        policy or Polar(),
        mode,
        min(rows, len(items)),
        thresholds,
        implementation,
        {} if journal is None else journal,
    )
    # The first step measures every layer, each further one a few.
    steps = (config.layers - 1) * math.ceil((k - 1) / step)
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
    limit = reach * max_drop
    return search_path(counted, cost, scored, limit=limit, width=width, step=step)


def search_path(
    evaluate: Evaluate,
    cost: StepCost,
    scored: Sequence[np.ndarray],
    *,
    limit: float,
    width: int,
    step: float,
) -> tuple[Setting, ...]:
    """The search itself, on whatever measures budgets.

    Lazy greedy: what a candidate cost when it was last measured, with fewer layers
    sparse, is mostly less than what it costs now (Minoux 1978 for costs that only
    grow). So the cheapest of old are measured anew, until one that is new leads or
    `width` of them are. A candidate is never taken on an old measurement.

    Args:
      evaluate: called once for each setting, the dense one first.
      cost: bytes of settings.
      scored: by domain, int[windows], tokens scored in each window; the domains'
        windows follow one another.
      limit: relative increase of perplexity at which the path ends.
      width: most candidates measured for a step, but the first.
      step: groups by which a layer is lowered.

    Returns:
      As `search_budgets`.

    Raises:
      ValueError: if a log-likelihood is not finite.
    """
    layers = len(cost.group)
    dense: Budgets = (cost.kv_heads,) * layers
    dense_bytes, dense_nll = cost.bytes_read(dense), _finite(evaluate(dense), dense)
    ends = np.cumsum([len(counts) for counts in scored])[:-1]

    def measured(budgets: Budgets) -> tuple[np.ndarray, list[np.ndarray]]:
        """Losses in nats a token, by domain, and what each one's windows lose."""
        more = np.split(_finite(evaluate(budgets), budgets) - dense_nll, ends)
        pairs = zip(more, scored, strict=True)
        return np.array([part.sum() / counts.sum() for part, counts in pairs]), more

    path = [Setting(dense, Interval(0.0, 0.0, 0.0), dense_bytes, 0)]
    now, now_loss = dense, 0.0
    losses = best = np.zeros(len(scored))
    ranks: dict[int, tuple[float, float]] = {  # the least first; -inf: never measured
        layer: (-np.inf, -np.inf)
        for layer in range(1, layers)
        if _lowered(dense, layer, step, cost)
    }
    while ranks:
        most = width if len(path) > 1 else len(ranks)
        fresh: dict[int, tuple[Budgets, np.ndarray, list[np.ndarray]]] = {}
        while (layer := min(ranks, key=ranks.__getitem__)) not in fresh:
            if len(fresh) == most:
                layer = min(fresh, key=ranks.__getitem__)
                break
            candidate = _lowered(now, layer, step, cost)
            assert candidate is not None
            found = measured(candidate)
            further = further_loss(found[0], best)
            if further is None:
                more = float(found[0].max()) - now_loss
            else:  # no gain to harm what was less harmed than the rest
                mean = float((found[0] - losses).mean())
                more = max(further - now_loss, mean)
            saved = cost.bytes_read(now) - cost.bytes_read(candidate)
            # Noise makes some losses negative: those bytes are free, none freer by
            # being few.
            ranks[layer] = max(more, 0.0) / saved, more
            fresh[layer] = candidate, *found
        now, losses, windows = fresh[layer]
        further = further_loss(losses, best)
        best = np.minimum(best, losses)
        worst = int(losses.argmax())
        now_loss = float(losses[worst]) if further is None else further
        interval = mean_interval(windows[worst] / scored[worst], scored[worst])
        drop = Interval(*(float(np.expm1(x)) for x in interval))
        read = cost.bytes_read(now)
        bound = None if further is None else float(np.expm1(further))
        setting = Setting(now, drop, read, dense_bytes - read, bound)
        if setting.most > limit:
            break
        path.append(setting)
        if not _lowered(now, layer, step, cost):
            del ranks[layer]
    return tuple(path)


def further_loss(
    losses: np.ndarray, best: np.ndarray, confidence: float = 0.95
) -> float | None:
    """What a further domain will hardly lose more than: see the module.

    Args:
      losses: float[domains], nats a token against dense.
      best: float[domains], the least that any setting before had, at most 0.
      confidence: of the prediction interval, two-sided.

    Returns:
      Nats a token; None for less than three domains, which do not tell.
    """
    if len(losses) < 3:
        return None
    return further_bound(losses - np.minimum(best, losses), confidence)


def _lowered(now: Budgets, layer: int, step: float, cost: StepCost) -> Budgets | None:
    """Budgets with one layer lower, by as much as saves bytes; None if none does.

    A layer's first group may save less than the router rows that it brings.
    """
    n = now[layer]
    while n > 1:
        n = max(1, n - step)
        # Thirds do not add up in binary.
        n = round(n) if abs(n - round(n)) < 1e-6 else n
        lower = (*now[:layer], n, *now[layer + 1 :])
        if cost.bytes_read(lower) < cost.bytes_read(now):
            return lower
    return None


def _finite(nll: np.ndarray, budgets: Budgets) -> np.ndarray:
    if not np.isfinite(nll).all():
        raise ValueError(
            f"budgets {budgets} yield no finite log-likelihood: the model's weights "
            "are damaged, or its dtype has too small a range"
        )
    return nll


def _evaluator(
    params: Params,
    items: Sequence[Continuation],
    policy: Polar | Oracle | Random,
    mode: Mode,
    rows: int,
    thresholds: Thresholds | None,
    implementation: Implementation | None,
    journal: Journal,
) -> Evaluate:
    """Scores items under one budget after another; compiles on first need."""
    if policy.density is not None:
        raise ValueError(
            f"the policy has density {policy.density}: a search finds it, leave it out"
        )
    # The policy at all heads may still differ from dense: by recovery's updates.
    dense = Scorer(
        params,
        {_LABEL: Dense()},
        mode=mode,
        batch=rows,
        implementation=implementation,
    )
    sparse = _Budgeted(params, policy, mode, rows, thresholds, implementation)
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
        policy: Polar | Oracle | Random,
        mode: Mode,
        batch: int,
        thresholds: Thresholds | None,
        implementation: Implementation | None,
    ) -> None:
        config, self._thresholds = params.config, thresholds
        # Bound as if every layer but the first were sparse: all routers are there.
        lowest = (config.kv_heads, *(1,) * (config.layers - 1))
        every = dataclasses.replace(config, budgets=lowest, neuron_budgets=())
        super().__init__(
            dataclasses.replace(params, config=every),
            {_LABEL: policy},
            mode=mode,
            batch=batch,
            implementation=implementation,
        )
        self.set_budgets((config.kv_heads,) * config.layers)

    def set_budgets(self, budgets: Budgets) -> None:
        weights, bound = self._bound[_LABEL]
        assert isinstance(bound, Polar | Oracle | Random)
        # The limits, which are compiled, leave room for every group.
        k = self.params.config.kv_heads
        limits = (None, *(k if k > 1 else None,) * (len(budgets) - 1))
        counts = np.repeat(np.array(budgets, np.int32)[:, None], self._rows, axis=1)
        passing = None
        if self._thresholds:
            # Layers that are not sparse are compiled like the others: all scores pass.
            found = zip(self._thresholds(budgets), budgets, strict=True)
            all_pass = float(np.finfo(np.float32).min)
            passing = jnp.array([x if n < k else all_pass for x, n in found])
        budget = HeadBudget(tuple(map(jnp.asarray, counts)), limits, passing)
        self._bound[_LABEL] = weights, dataclasses.replace(bound, budget=budget)
