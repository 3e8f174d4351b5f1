"""The search for a kernel's fastest config at one shape."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tuning.problems import Inputs, Mlp, Problem
from pallas_kernels.tuning.timing import Chain, make_chain, median_ms

# A measured config is worth an entry where it beats the heuristic by more than noise.
_MARGIN = 0.98
# Largest error, relative to the largest output of the reference.
_TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}
# Fractions of the neurons at which gathering is timed against the dense product.
_FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass
class Search:
    """How a search stands.

    Attributes:
        us: microseconds of each config that ran.
        failed: configs that did not compile or run, and the first line of why.
        wrong: configs that were fast and whose results were wrong.
        known: configs timed or waiting to be.
    """

    us: dict[Any, float] = dataclasses.field(default_factory=dict)
    failed: dict[Any, str] = dataclasses.field(default_factory=dict)
    wrong: list[Any] = dataclasses.field(default_factory=list)
    known: int = 0

    @property
    def tried(self) -> int:
        """Configs that are done with."""
        return len(self.us) + len(self.failed)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The fastest correct config, and how it compares in a second measurement.

    Attributes:
        config: None if the heuristic's is as good.
        us: microseconds of the fastest.
        heuristic_us: microseconds of the heuristic's.
        search: what was tried.
    """

    config: Any
    us: float
    heuristic_us: float
    search: Search


def variations(config: Any) -> list[Any]:
    """The configs that differ in one number: halved, doubled, one more or less.

    A number that is 0 turns something off and stays: only a kernel's own `candidates`
    know what else it could be.
    """
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            others = {not value}
        elif value == 0:
            continue
        else:
            others = {value // 2, value * 2}
            if value <= 8 and "warps" not in field.name:  # those double
                others |= {value - 1, value + 1}
        for other in sorted(others - {0, value}):
            change = {field.name: other}
            found.append(dataclasses.replace(config, **change))
    return found


def search(
    problem: Problem,
    pool: Executor,
    *,
    seconds: float,
    per_round: int | None = None,
    interpret: bool = False,
    show: Callable[[Search], None] = lambda search: None,
) -> Outcome:
    """Time the heuristic, the kernel's candidates, then variations of the best.

    It ends where no variation is faster, or when the time is over.

    Args:
        problem: kernel and shape.
        pool: compiles configs side by side.
        seconds: after which nothing new is begun.
        per_round: configs to try at most of the candidates, and of each variation.
        interpret: whether the kernels are interpreted.
        show: called after each config.

    Raises:
        RuntimeError: if the heuristic's config does not run.
        ValueError: if its results are wrong.
    """
    deadline = time.monotonic() + seconds
    inputs = problem.inputs(_calls(interpret))
    state = Search()
    default = problem.default

    def measure(configs: Iterable[Any]) -> None:
        new = [c for c in dict.fromkeys(configs) if not _seen(state, c)]
        waiting = new[:per_round]
        state.known += len(waiting)
        chains = _compile(problem, waiting, inputs, pool, interpret)
        for config, chain in zip(waiting, chains, strict=True):
            if state.us and time.monotonic() > deadline:
                state.known = state.tried
                return
            try:
                state.us[config] = median_ms(chain.result(), repeats=3) * 1e3
            except Exception as error:  # what does not compile is no candidate
                state.failed[config] = (str(error).splitlines() or [repr(error)])[0]
            show(state)

    measure([default])
    if default not in state.us:
        raise RuntimeError(
            f"the heuristic's config fails for {problem}: {state.failed[default]}"
        )
    best = None
    measure(problem.candidates())
    while best != (best := min(state.us, key=lambda c: state.us[c])):
        if time.monotonic() > deadline:
            break
        measure(variations(best))
    return _decide(problem, state, inputs, interpret)


def _calls(interpret: bool) -> int:
    """Calls in a chain at most: interpreted ones cost seconds to compile."""
    return 1 if interpret else 32


def _seen(state: Search, config: Any) -> bool:
    return config in state.us or config in state.failed


def _compile(
    problem: Problem,
    configs: Sequence[Any],
    inputs: Inputs,
    pool: Executor,
    interpret: bool,
) -> list[Future[Chain]]:
    chains = [
        pool.submit(make_chain, problem.function(config, interpret), *inputs)
        for config in configs
    ]
    wait(chains)  # so that nothing compiles while another is timed
    return chains


def _decide(
    problem: Problem, state: Search, inputs: Inputs, interpret: bool
) -> Outcome:
    """Check the fastest configs until one is right, and time it beside the default."""
    default = problem.default
    start, arguments = inputs
    expected = _values(problem.function(None), start, arguments[0])
    limit = _TOLERANCE[jnp.dtype(problem.dtype).name] * np.max(np.abs(expected))

    def is_right(config: Any) -> bool:
        function = problem.function(config, interpret)
        error = np.max(np.abs(_values(function, start, arguments[0]) - expected))
        return bool(error <= limit)  # NaN is wrong

    if not is_right(default):
        raise ValueError(f"the heuristic's config is wrong for {problem}: {default}")
    ranked = sorted(state.us, key=lambda c: state.us[c])
    config = next(c for c in ranked if c == default or is_right(c))
    state.wrong = ranked[: ranked.index(config)]
    if config == default:
        return Outcome(None, state.us[default], state.us[default], state)
    times = {}
    for each in (config, default):
        chain = make_chain(problem.function(each, interpret), *inputs)
        times[each] = median_ms(chain, repeats=9) * 1e3
    faster = times[config] < _MARGIN * times[default]
    return Outcome(config if faster else None, times[config], times[default], state)


def _values(function: Callable[..., Any], start: Any, arguments: tuple) -> np.ndarray:
    return np.asarray(jax.jit(function)(start, *arguments), np.float64)


def dense_above(
    problem: Mlp,
    pool: Executor,
    config_for: Callable[[Mlp], Any],
    *,
    interpret: bool = False,
) -> float:
    """The fraction of the neurons above which XLA's dense product is faster.

    Args:
        problem: which layer; its n does not matter.
        pool: compiles side by side.
        config_for: the config that a problem is served with.
        interpret: whether the kernels are interpreted.

    Returns:
        From 0.0, if gathering never pays, to 1.0, if it always does.
    """
    layers = [
        dataclasses.replace(problem, n=max(1, int(fraction * problem.f)))
        for fraction in _FRACTIONS
    ]
    dense = dataclasses.replace(problem, n=problem.f)
    most = _calls(interpret)
    start, arguments = dense.inputs(most)
    reference = problem.function(None)
    everything = make_chain(
        lambda x, weights: reference(x, weights, None),
        start,
        [(weights,) for weights, _ in arguments],
    )
    limit = median_ms(everything)
    gathered = []
    for layer in layers:
        [chain] = _compile(
            layer, [config_for(layer)], layer.inputs(most), pool, interpret
        )
        gathered.append(median_ms(chain.result()))
    rising = np.maximum.accumulate(gathered)
    crossing = np.interp(limit, rising, _FRACTIONS, left=0.0, right=1.0)
    return round(float(crossing), 3)
