"""What the kernel benchmark writes: rows, the rate to hold them against, the file."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import Attention, Mlp, Select
from polarjax.bench.rows import write_json
from polarjax.evaluation import record

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Result:
    """One row.

    Attributes:
        kernel: "attention", "mlp" or "select".
        shape: a name in `benchmarks.cases`.
        what: the implementation.
        read: KV groups, neurons or scores read, per sequence or batch.
        of: how many there are.
        bytes: what one call must read.
        ms: median time of one call; None if it could not run.
        gb_s: bytes over time, in 10^9 bytes per second.
        of_r: gb_s as a fraction of R.
        of_stream: gb_s as a fraction of the streaming sum's rate.
        error: why it could not run.
    """

    kernel: str
    shape: str
    what: str
    read: int
    of: int
    bytes: int
    ms: float | None = None
    gb_s: float | None = None
    of_r: float | None = None
    of_stream: float | None = None
    error: str = ""

    def finish(self, r: float, stream: float) -> "Result":
        """Fill in the rates; r and stream in bytes per second."""
        if self.ms is not None:
            self.gb_s = self.bytes / self.ms * 1e-6
            self.of_r = self.gb_s * 1e9 / r
            self.of_stream = self.gb_s * 1e9 / stream
        return self

    def __str__(self) -> str:
        line = f"{self.shape:20} {self.what:18} {self.read:6}/{self.of:<6}"
        line += f" {self.bytes / 1e6:8.1f} MB"
        if self.ms is None:
            return f"{line}  {self.error}"
        line += f" {self.ms * 1e3:9.2f} us {self.gb_s:7.1f} GB/s"
        return f"{line} {self.of_r:6.1%} of R"


def best_rates(
    cases: Mapping[str, Attention | Mlp | Select],
    torch_rows: Iterable[Result],
    stream: float,
) -> dict[str, float]:
    """R of each shape in bytes per second.

    That of the streaming sum, or of torch's dense attention if it is higher: on the
    same shape, and on any for shapes that are not attention.

    Args:
        cases: by name.
        torch_rows: timed.
        stream: rate of the streaming sum, in bytes per second.
    """
    dense: dict[tuple, float] = {}
    for row in torch_rows:
        case = cases[row.shape]
        if isinstance(case, Attention) and row.ms is not None:
            rate = row.bytes / row.ms * 1e3
            dense[case.dims] = max(dense.get(case.dims, stream), rate)
    best = max([stream, *dense.values()])
    return {
        name: dense.get(case.dims, stream) if isinstance(case, Attention) else best
        for name, case in cases.items()
    }


def commit() -> str:
    """The repository's, with a digest of changes to it; "unknown" outside of git."""
    return record.commit() or "unknown"


def write(path: Path, report: Mapping[str, Any], results: Iterable[Result]) -> None:
    """Write what there is so far: a kernel that takes the process down loses no row."""
    write_json(path, {**report, "results": [dataclasses.asdict(r) for r in results]})
