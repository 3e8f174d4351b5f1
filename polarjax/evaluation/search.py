"""Per-layer budgets by measured loss: a greedy search over sets of sparse layers.

What a layer's groups are worth depends on which other layers have lost theirs: costs of
single layers do not add up. So every candidate is measured as the whole setting that it
would make, on the same windows as the dense model.

Several domains count by the one that loses most. A model that is not at its best on a
text may gain by losing heads there; by the mean over domains a search takes just those
heads, at the price of the others: on SmolLM2-135M-Instruct it gained 1.4 % on books,
and lost 0.3 % on manuals and 1.2 % on WikiText-2, which it had not seen. The divergence
from the dense model is no better guide: of two settings that had moved the next-token
odds of WikiText-2 alike, one had lost 0.3 %, the other 2.4 %.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from polarjax.evaluation.batches import Continuation, Mode
from polarjax.evaluation.measure import Journal, Progress
from polarjax.evaluation.scoring import Scorer
from polarjax.evaluation.statistics import Interval, mean_interval
from polarjax.params import Params
from polarjax.policy import Dense
from polarjax.sparsity import HeadBudget, Oracle, Polar, Random
from polarjax.sparsity.cost import StepCost, step_cost

Budgets = tuple[int, ...]
"""KV groups that each sequence reads, by layer; layer 0 reads all of them."""

Evaluate = Callable[[Budgets], np.ndarray]
"""Budgets -> float64[windows], negative log-likelihood of each window, in nats."""

_Worst = tuple[float, np.ndarray, np.ndarray]
"""Of the domain that loses most: nats a token, each window's, and tokens of each."""

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
    """

    budgets: Budgets
    drop: Interval
    step_bytes: int
    saved_bytes: int

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
    step: int | None = None,
    reach: float = 1.5,
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
      step: groups by which a layer is lowered at a time; None for an eighth of them.
      reach: how far beyond `max_drop` the path goes, as a multiple of it.
      implementation: of the kernels; None chooses by device.
      journal: settings found there are not measured again; others are added to it. It
        must be of this model, these routers and these windows.
      progress: called as progress("searching budgets", settings measured, most).

    Returns:
      The path: all-dense first, each setting within the one before it, up to the last
      whose calibration drop is at most `reach` x `max_drop`.

    Raises:
      ValueError: if a number is out of range, there is nothing to score, or the policy
        does not fit the model.
    """
    config, k = params.config, params.config.kv_heads
    step = max(1, k // 8) if step is None else step
    for name, value in (
        *(("max_drop", max_drop), ("rows", rows), ("width", width)),
        *(("step", step), ("reach", reach)),
    ):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not domains or not all(domains.values()):
        raise ValueError("there is no calibration window to measure budgets on")
    items = [item for windows in domains.values() for item in windows]
    cost = step_cost(params, batch=batch, context=context)
    evaluate = _evaluator(
        *(params, items, policy or Polar(), mode, min(rows, len(items))),
        implementation,
        {} if journal is None else journal,
    )
    # The first step measures every layer, each further one a few.
    steps = (config.layers - 1) * -(-(k - 1) // step)
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
    step: int,
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

    def worst(budgets: Budgets) -> _Worst:
        more = _finite(evaluate(budgets), budgets) - dense_nll
        found = []
        for part, counts in zip(np.split(more, ends), scored, strict=True):
            found.append((float(part.sum() / counts.sum()), part / counts, counts))
        return max(found, key=lambda domain: domain[0])

    path = [Setting(dense, Interval(0.0, 0.0, 0.0), dense_bytes, 0)]
    now, now_loss = dense, 0.0
    ranks: dict[int, tuple[float, float]] = {  # the least first; -inf: never measured
        layer: (-np.inf, -np.inf)
        for layer in range(1, layers)
        if _lowered(dense, layer, step, cost)
    }
    while ranks:
        most = width if len(path) > 1 else len(ranks)
        fresh: dict[int, tuple[Budgets, _Worst]] = {}
        while (layer := min(ranks, key=ranks.__getitem__)) not in fresh:
            if len(fresh) == most:
                layer = min(fresh, key=ranks.__getitem__)
                break
            candidate = _lowered(now, layer, step, cost)
            assert candidate is not None
            found = worst(candidate)
            more = found[0] - now_loss
            saved = cost.bytes_read(now) - cost.bytes_read(candidate)
            # Noise makes some losses negative: those bytes are free, none freer by
            # being few.
            ranks[layer] = max(more, 0.0) / saved, more
            fresh[layer] = candidate, found
        now, (now_loss, change, counts) = fresh[layer]
        drop = Interval(*(float(np.expm1(x)) for x in mean_interval(change, counts)))
        if drop.value > limit:
            break
        read = cost.bytes_read(now)
        path.append(Setting(now, drop, read, dense_bytes - read))
        if not _lowered(now, layer, step, cost):
            del ranks[layer]
    return tuple(path)


def _lowered(now: Budgets, layer: int, step: int, cost: StepCost) -> Budgets | None:
    """Budgets with one layer lower, by as much as saves bytes; None if none does.

    A layer's first group may save less than the router rows that it brings.
    """
    for n in range(now[layer] - step, 1 - step, -step):
        lower = (*now[:layer], max(1, n), *now[layer + 1 :])
        if lower != now and cost.bytes_read(lower) < cost.bytes_read(now):
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
        *(params, {_LABEL: Dense()}),
        mode=mode,
        batch=rows,
        implementation=implementation,
    )
    sparse = _Budgeted(params, policy, mode, rows, implementation)
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
        implementation: Implementation | None,
    ) -> None:
        config = params.config
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
        counts = np.repeat(np.array(budgets, np.int32)[:, None], self.batch, axis=1)
        budget = HeadBudget(jnp.asarray(counts), limits)
        self._bound[_LABEL] = weights, dataclasses.replace(bound, budget=budget)
