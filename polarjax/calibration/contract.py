"""A promise about quality: the sparsest budgets that held-out text allows.

The promise is that on each domain the perplexity of the sparse model is at most
(1 + max_drop) times the dense model's. Three things keep it honest:

* Settings are found, ordered and thinned on calibration text alone. They are tested on
  text that had no say in that, so no luck of the search reaches the tests.
* A setting passes only if it passes on every domain. Each domain's test has the whole
  error: to promise a bad setting, the test of the very domain in which it is bad must
  err (intersection-union test; Berger 1982, doi 10.1080/00401706.1982.10487790).
* Settings are tested in one fixed sequence, densest first, which ends at the first that
  fails; what passed last is promised. No correction for the number of tests is needed:
  to promise any bad setting, the first bad one of the sequence must pass its own test
  (Maurer, Hothorn and Lehmacher 1995; Westfall and Krishen 2001,
  doi 10.1016/S0378-3758(01)00077-5). Taking the sparsest that passes, of all, would be
  a selection effect.

A text of another kind than all of the domains may still lose more. From three domains
on a setting must therefore also keep what a further domain would lose within the drop,
as far as one that differs from them like they differ from each other can tell. A domain
counts from the best that any setting before had on it: what removing heads mends on one
text is no credit for what it breaks.

A test asks whether the upper end of the paired two-sided interval stays within the
drop, so that a promise is wrong with probability (1 - confidence) / 2 at most, as far
as windows are independent and the bootstrap's interval covers what it says.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels import Implementation
from polarjax.calibration.path import Budgets, Setting, further_loss
from polarjax.calibration.search import Thresholds
from polarjax.evaluation.batches import Continuation, Mode
from polarjax.evaluation.measure import Journal, Progress
from polarjax.evaluation.perplexity import Perplexity, perplexity
from polarjax.evaluation.statistics import Interval, mean_interval
from polarjax.params import Params
from polarjax.planning.sizes import positive
from polarjax.policies import named, with_learned
from polarjax.policy import Dense, Policy

# How far the tests go, in calibration drop, as a multiple of the allowed one: a little
# beyond. As the sequence ends by itself, to test what may fail risks nothing.
_FARTHEST = 1.2


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a contract asks for.

    Attributes:
      max_drop: allowed relative increase of perplexity on each domain.
      confidence: of the two-sided intervals.
      mode: how windows are scored, see `polarjax.evaluation.scoring`.
      batch: windows decoded together.
      context: tokens in the cache, for the bytes that budgets save.
      adaptive: budgets are means over tokens, and each token reads the groups that
        score above a threshold; needs routers trained by "bce".
    """

    max_drop: float
    confidence: float = 0.95
    mode: Mode = "decode"
    batch: int = 16
    context: int = 2048
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not self.max_drop > 0:
            raise ValueError(f"max_drop must be positive, got {self.max_drop}")
        if not 0 < self.confidence < 1:
            raise ValueError(
                f"confidence must be between 0 and 1, got {self.confidence}"
            )
        positive("the promise's batch (--decode-batch)", self.batch)
        positive("the promise's context (--decode-context)", self.context)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a setting did on one domain.

    Attributes:
      ratio: perplexity / dense, with its paired interval at the contract's confidence.
      density: KV groups read / KV groups there, mean over layers, as measured.
      windows: that were scored.
      tokens: that were scored in them.
    """

    ratio: Interval
    density: float
    windows: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Tested:
    """A setting that was put to the test.

    Attributes:
      setting: with what calibration found.
      domains: by name.
      passed: whether it stays inside the drop on every domain, and on a further one.
      further: perplexity / dense - 1 that a further domain will hardly exceed, see the
        module; None for less than three domains.
    """

    setting: Setting
    domains: Mapping[str, Outcome]
    passed: bool
    further: float | None = None

    @property
    def most(self) -> float:
        """The increase of perplexity that cannot be excluded."""
        highs = [found.ratio.high - 1 for found in self.domains.values()]
        return max(*highs, self.further or 0.0)


@dataclasses.dataclass(frozen=True)
class Contract:
    """What may be promised, and the tests that it rests on.

    Attributes:
      max_drop: allowed relative increase of perplexity, on each domain.
      confidence: of the two-sided intervals.
      mode: how the windows were scored.
      batch: windows computed together.
      domains: their names.
      sequence: the settings to be tested, in their order, densest first.
      tested: those of them that were: all up to the first that failed.
    """

    max_drop: float
    confidence: float
    mode: Mode
    batch: int
    domains: tuple[str, ...]
    sequence: tuple[Setting, ...]
    tested: tuple[Tested, ...]

    @property
    def chosen(self) -> Tested | None:
        """The sparsest setting that may be promised; None if only dense may."""
        passed = [t for t in self.tested if t.passed]
        return passed[-1] if passed else None

    @property
    def budgets(self) -> Budgets | None:
        """Of the chosen setting."""
        return self.chosen.setting.budgets if self.chosen else None

    @property
    def kept(self) -> bool:
        """Whether any sparse setting may be promised."""
        return self.chosen is not None

    def __str__(self) -> str:
        """The verdict in a sentence, for people."""
        terms = (
            f"a drop of {self.max_drop:.2%} at {self.confidence:.0%} confidence on "
            f"{', '.join(self.domains)} (mode {self.mode}, batch {self.batch})"
        )
        if self.chosen:
            reached = [found.density for found in self.chosen.domains.values()]
            density = float(np.mean(reached))
            return f"kept within {terms}: KV group density {density:.3f}"
        if not self.tested:
            why = "the search found no sparse setting within it on calibration text"
        else:
            why = (
                f"of {len(self.sequence)} settings the densest "
                f"({self.tested[0].setting.density:.3f}) may cost "
                f"{self.tested[0].most:.2%}"
            )
        return f"only dense passes {terms}: {why}"

    def card(self) -> dict[str, Any]:
        """What an adapter's card says of it, as JSON values."""

        def bounds(found: Interval) -> list[float | None]:
            # One may be infinite, which JSON is not.
            return [x if np.isfinite(x) else None for x in found]

        def domain(found: Outcome) -> dict[str, Any]:
            return {**dataclasses.asdict(found), "ratio": bounds(found.ratio)}

        def setting(setting: Setting) -> dict[str, Any]:
            return {
                "budgets": list(setting.budgets),
                "density": setting.density,
                "calibration_drop": bounds(setting.drop),
                "calibration_further": setting.further,
                "step_bytes": setting.step_bytes,
                "saved_bytes": setting.saved_bytes,
            }

        return {
            "verdict": str(self),
            "kept": self.kept,
            "budgets": list(self.budgets) if self.budgets else None,
            "max_drop": self.max_drop,
            "confidence": self.confidence,
            "mode": self.mode,
            "batch": self.batch,
            "sequence": [setting(s) for s in self.sequence],
            "tested": [
                {
                    **setting(t.setting),
                    "passed": t.passed,
                    "further_domain": t.further,
                    "domains": {name: domain(d) for name, d in t.domains.items()},
                }
                for t in self.tested
            ],
        }


def keep_promise(
    params: Params,
    path: Sequence[Setting],
    domains: Mapping[str, Sequence[Continuation]],
    terms: Terms,
    *,
    tests: int = 8,
    thresholds: Thresholds | None = None,
    implementation: Implementation | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Contract:
    """Find the sparsest budgets that keep within a drop of quality on held-out text.

    Each setting runs as `generate` would run it: its own compiled program, the routers
    of `params` and the budgets of the setting.

    Args:
      params: the model with its routers.
      path: from `search_budgets`, densest first.
      domains: windows of held-out text, by name. Nothing of it may have been used to
        train the routers or to search.
      terms: what is asked for.
      tests: most settings that are tested.
      thresholds: those of the search, if its budgets are means over tokens.
      implementation: of the kernels; None chooses by device.
      journal: batches found there are not scored again; others are added to it. It
        must be of this model, these routers, thresholds and this text.
      progress: called as the work goes on.

    Returns:
      The contract. That only dense passes is a result, not an error.

    Raises:
      ValueError: if a number is out of range, there is no domain, one has less than
        the two windows that an interval needs, or the path is out of order.
    """
    sequence = choose_sequence(path, terms.max_drop, tests)
    _check_domains(domains)

    def measured(name: str, policy: Policy, budgets: Budgets) -> Perplexity:
        model = with_learned(
            params,
            budgets=budgets,
            adaptive=thresholds is not None,
            thresholds=thresholds(budgets) if thresholds else (),
        )
        label = ",".join(map(str, budgets))
        found = perplexity(
            model,
            domains[name],
            {label: policy},
            mode=terms.mode,
            batch=terms.batch,
            implementation=implementation,
            name=f"contract/{name}/{label}",
            journal=journal,
            progress=progress,
        )
        return found[label]

    dense: dict[str, Perplexity] = {}

    def compare(name: str, budgets: Budgets) -> tuple[Perplexity, Perplexity]:
        if name not in dense:
            whole = (params.config.kv_heads,) * params.config.layers
            dense[name] = measured(name, Dense(), whole)
        return measured(name, named("polar"), budgets), dense[name]

    names, drop, sure = tuple(domains), terms.max_drop, terms.confidence
    tested = run_tests(sequence, names, compare, max_drop=drop, confidence=sure)
    return Contract(drop, sure, terms.mode, terms.batch, names, sequence, tested)


def choose_sequence(
    path: Sequence[Setting], max_drop: float, tests: int = 8
) -> tuple[Setting, ...]:
    """The settings to be tested, by what calibration found, and nothing else.

    A few of the path, as each further one before a good one is a further chance to stop
    too early: the sparsest within each of some drops. These are evenly spread from the
    least that calibration found, which is the surest to pass (below 0 where the model
    is better without some groups), to a little more than is allowed. From three domains
    on it is the bound for a further one that is spread.

    Args:
      path: from `search_budgets`, densest first.
      max_drop: allowed relative increase of perplexity.
      tests: most settings.

    Raises:
      ValueError: if a number is out of range, or the path is out of order.
    """
    if not max_drop > 0 or tests < 1:
        raise ValueError(f"max_drop {max_drop} and tests {tests} must be positive")
    read = [setting.step_bytes for setting in path]
    dense = path and not path[0].saved_bytes
    if not dense or any(a <= b for a, b in itertools.pairwise(read)):
        raise ValueError(
            "the path must start dense and read less and less: pass what "
            "search_budgets returned"
        )
    last = _FARTHEST * max_drop
    # Dense is not tested: it is dense.
    sparse = [s for s in path if s.saved_bytes and s.most <= last]
    chosen = {}
    for most in np.linspace(min((s.most for s in sparse), default=0), last, tests):
        for setting in [s for s in sparse if s.most <= most][-1:]:
            chosen[setting.budgets] = setting
    return tuple(chosen.values())


def run_tests(
    sequence: Sequence[Setting],
    domains: Sequence[str],
    compare: Callable[[str, Budgets], tuple[Perplexity, Perplexity]],
    *,
    max_drop: float,
    confidence: float,
) -> tuple[Tested, ...]:
    """Test settings in their order until one fails; see the module.

    Args:
      sequence: the settings, fixed before anything was compared.
      domains: names of them.
      compare: (domain, budgets) -> perplexity of the sparse and of the dense model, on
        the same windows.
      max_drop: allowed relative increase of perplexity.
      confidence: of the two-sided intervals.
    """
    tested, best = [], np.zeros(len(domains))
    for setting in sequence:
        outcomes = {}
        for name in domains:
            sparse, dense = compare(name, setting.budgets)
            change = (sparse.nll - dense.nll) / sparse.scored
            interval = mean_interval(change, sparse.scored, confidence)
            outcomes[name] = Outcome(
                Interval(*(float(np.exp(x)) for x in interval)),
                sparse.density,
                len(sparse.nll),
                int(sparse.scored.sum()),
            )
        # Not "any ... > ": what is not a number does not pass.
        passed = all(d.ratio.high <= 1 + max_drop for d in outcomes.values())
        losses = np.log([d.ratio.value for d in outcomes.values()])
        further = further_loss(losses, best, confidence)
        best = np.minimum(best, losses)
        if further is not None:
            further = float(np.expm1(further))
            passed = passed and further <= max_drop
        tested.append(Tested(setting, outcomes, passed, further))
        if not passed:
            break
    return tuple(tested)


def _check_domains(domains: Mapping[str, Sequence[Continuation]]) -> None:
    if not domains:
        raise ValueError("no domain: a promise needs held-out text to rest on")
    for name, items in domains.items():
        if len(items) < 2:
            raise ValueError(
                f"domain {name!r} has {len(items)} window(s): an interval needs two at "
                "the least, and many to be narrow; give it more text"
            )
