"""Results of serving: a record of each, the file that keeps them, and their table.

A file holds runs, each with what it was run on, the sizes of its load and its results;
those of other engines on the same load have the same form. It is written after every
result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from polarjax.bench.counts import Compilations, Reached
from polarjax.bench.latencies import Served, Spread
from polarjax.bench.rows import read_runs, write_json
from polarjax.storage.writing import try_file

CONTINUOUS, STATIC = "continuous", "static"


@dataclasses.dataclass(frozen=True)
class Result:
    """A load that was played once.

    Attributes:
      how: "continuous", in "static" batches, or by what else.
      policy: what was read, in words.
      density: of the KV groups that every request asked for; None for no such wish.
      rate: requests per second that arrived; None for all at once.
      most_open: requests that the client had open at once, at most; None for no limit.
      slots: requests that can be continued at once; None if that is not known.
      served: what the clients saw.
      reached: what the decode steps read; None where it was not counted.
      compilations: programs compiled meanwhile, which the figures hold; None where
        that is not known.
      settings: of the engine, beside these.
    """

    how: str
    policy: str
    density: float | None
    rate: float | None
    most_open: int | None
    slots: int | None
    served: Served
    reached: Reached | None
    compilations: Compilations | None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Runs:
    """The results of a run, kept behind those of earlier ones as they come.

    Args:
      about: what the file says of this run: device, versions, command, load.
      path: of the file, continued if it exists; None for none.

    Raises:
      ValueError: if there is a file that holds something else.
      OSError: if it cannot be written.
    """

    def __init__(self, about: Mapping[str, Any], path: Path | None) -> None:
        self.path, self.results = path, list[Result]()
        self._about, self._earlier = dict(about), list[dict[str, Any]]()
        if path is not None:
            try_file(path)  # before the first result, not after
            if path.exists():
                self._earlier = read(path)

    def add(self, result: Result) -> None:
        """Keep a result, and write the file."""
        self.results.append(result)
        if self.path is not None:
            write_json(self.path, {"serving": [*self._earlier, self.run]})

    @property
    def run(self) -> dict[str, Any]:
        """This run as the file has it."""
        results = [dataclasses.asdict(result) for result in self.results]
        return {**self._about, "results": results}


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file.

    Raises:
      ValueError: if it is no file of this benchmark.
    """
    return read_runs(path, "serving", "`polarjax bench serve`")


def table(results: Sequence[Result]) -> Table:
    """What was measured, one row a result; times in milliseconds."""
    goodput = any(result.served.goodput for result in results)
    made = Table(box=None)
    for name in ("", "policy"):
        made.add_column(name)
    columns = ("rate", "req/s", "tokens/s", "queued", "TTFT p50", "p99")
    columns += ("TPOT p50", "p99", "ITL p99", "E2EL p50", "p99", "density", "KV read")
    for name in (*columns, *(("good req/s",) if goodput else ())):
        made.add_column(name, justify="right")
    for result in results:
        made.add_row(*_cells(result), *([_good(result)] if goodput else []))
    return made


def _cells(result: Result) -> list[str]:
    served, reached = result.served, result.reached
    return [
        result.how,
        result.policy,
        "inf" if result.rate is None else f"{result.rate:g}",
        f"{served.requests_per_second:,.2f}",
        f"{served.tokens_per_second:,.0f}",
        f"{served.queued_tokens_per_second:,.0f}",
        *_spread(served.ttft_ms),
        *_spread(served.tpot_ms),
        _spread(served.itl_ms)[1],
        *_spread(served.e2el_ms),
        f"{reached.mean_density:.3f}" if reached else "unknown",
        f"{reached.kv_fraction:.3f}" if reached else "unknown",
    ]


def _spread(spread: Spread | None) -> tuple[str, str]:
    """Median and 99th percentile."""
    if spread is None:
        return "", ""
    return _ms(spread.p50), _ms(spread.p99)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _good(result: Result) -> str:
    good = result.served.goodput
    return f"{good.requests_per_second:,.2f}" if good else ""


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader of the table should know."""
    found = []
    for result in results:
        rate = "" if result.rate is None else f" at {result.rate:g} requests/s"
        compiled = result.compilations
        if compiled and compiled.count:
            found.append(
                f"{compiled.count} programs were compiled while {result.policy}, "
                f"{result.how}{rate}, was timed ({compiled.seconds:.1f} s, which its "
                "figures hold): a larger --warmup may leave them out"
            )
    return found
