"""What an engine says of a load that it served: groups and bytes read, compilations."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from polarjax import Engine, Params, Stats
from polarjax.bench.loads import Ask
from polarjax.engine.stats import Tally
from polarjax.planning.cost import kv_row_bytes


@dataclasses.dataclass(frozen=True)
class Reached:
    """What decode steps read, counted by themselves.

    Attributes:
      density: by layer, KV groups read over KV groups there, over live requests.
      kv_bytes: KV bytes that the steps had to read.
      kv_bytes_dense: what they would have been with every group.
      steps: that had a live request.
    """

    density: tuple[float, ...]
    kv_bytes: float
    kv_bytes_dense: float
    steps: int

    @property
    def mean_density(self) -> float:
        """Over layers, layer 0 with them."""
        return sum(self.density) / len(self.density)

    @property
    def kv_fraction(self) -> float:
        """Of the KV bytes of dense steps, those read."""
        return self.kv_bytes / self.kv_bytes_dense


@dataclasses.dataclass
class Compilations:
    """Programs that XLA was asked for.

    Attributes:
      count: of them.
      seconds: that they took, those that a cache on disk had included.
    """

    count: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
    """Count what is compiled within."""
    found = Compilations()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            found.count += 1
            found.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def counted(engine: Engine) -> Iterator[Callable[[], Reached | None]]:
    """Count what an engine's decode steps read within.

    Args:
      engine: with `Engine.counting`; of one without, nothing is known.

    Yields:
      What returns it; None where nothing is known, or no step was taken.
    """
    counting = getattr(engine, "counting", None)
    if counting is None:
        yield lambda: None
        return
    with counting() as tally:
        yield lambda: reached(engine.params, tally)


def reached(params: Params, tally: Tally) -> Reached | None:
    """What decode steps read; None if no request was live in them.

    Args:
      params: the model.
      tally: of the steps.
    """
    if not tally.density:
        return None
    row = kv_row_bytes(params.config, params.dtype)
    read, whole = float(tally.kv_read * row), float(tally.kv_whole * row)
    return Reached(tally.density, read, whole, tally.busy)


def reached_static(
    stats: Sequence[Stats], load: Sequence[Ask], batch: int
) -> Reached | None:
    """What batches of `play_static` read; None if none took a step.

    Args:
      stats: of each.
      load: of all. No request ends but by its length: each of its tokens but the first
        is a step in which it is live.
      batch: as in `play_static`.
    """
    decoded = [
        [ask.new_tokens - 1 for ask in load[i : i + batch]]
        for i in range(0, len(load), batch)
    ]
    live = [sum(each) for each in decoded]
    if not any(live):
        return None
    densities = [one.density for one in stats if one.density]
    weights = [n for n in live if n]
    return Reached(
        density=tuple(np.average(densities, axis=0, weights=weights).tolist()),
        kv_bytes=sum(one.kv_bytes for one in stats),
        kv_bytes_dense=sum(one.kv_bytes_dense for one in stats),
        steps=sum(map(max, decoded)),
    )
