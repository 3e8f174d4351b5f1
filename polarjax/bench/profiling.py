"""What a device did in some decode steps, from jax's profiler.

Events become a small summary: how long kernels ran, how long none did, which of them
took the time, and what was copied.
"""

import collections
import dataclasses
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

LONG_GAP_NS = 5_000  # between kernels of one launch some hundred ns pass
TOP = 12
# Of a kernel's place in the model, else its name: the first that is found.
PLACES = {
    "selection": ("top_heads", "_rank", "needed_neurons", "_needs", "_compact"),
    "attention": (
        "select_head_attention",
        "_attend",
        "append_and_attend",
        "fold_pieces",
    ),
    "norm": ("add_norm",),
    "qkv": ("product_rows", "split_heads", "attention.project"),
    "out": ("product_columns", "attention.output"),
    "mlp": ("mlp", "_both_products"),
    "head": ("logits", "embed", "sample", "argmax", "final_norm"),
    "products": ("gemm", "nvjet", "xmma", "cutlass", "cublas", "dot"),
}
GROUPS = (*PLACES, "collectives", "copies", "rest")
# What each of n devices sends of a collective's result, in rings.
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel or copy on the device.

    Attributes:
      name: of the kernel.
      start: nanoseconds.
      duration: nanoseconds.
      op: HLO instruction that it belongs to, if known.
      copied: bytes, of a copy.
      graph: whether it ran in a CUDA graph.
    """

    name: str
    start: float
    duration: float
    op: str = ""
    copied: int = 0
    graph: bool = False


def profile(run: Callable[[], Any], steps: int, texts: Sequence[str]) -> dict[str, Any]:
    """Trace a warm call and summarise it.

    Args:
      run: the call; it ends when the device is done.
      steps: decode steps in it.
      texts: HLO of the compiled programs.

    Returns:
      What `summarise` found; or an "error" where the trace has no GPU's plane.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        [path] = Path(folder).rglob("*.xplane.pb")
        found = events(jax.profiler.ProfileData.from_file(str(path)))
    if not found:
        return {"error": f"no GPU in the trace: it ran on {jax.default_backend()}"}
    return summarise(found, steps, op_names(*texts))


def events(data: Any) -> list[Event]:
    """What ran on the streams of the first GPU that ran anything.

    Args:
      data: a `jax.profiler.ProfileData`.
    """
    found = []
    for plane in data.planes:
        if found or not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                size = re.search(r"size:(\d+)", str(stats.get("memcpy_details", "")))
                graph = stats.get("cuda_graph_exec_id") or stats.get("cuda_graph_id")
                found.append(
                    Event(
                        event.name,
                        event.start_ns,
                        event.duration_ns,
                        op=str(stats.get("hlo_op", "")),
                        copied=int(size[1]) if size else 0,
                        graph=bool(graph),
                    )
                )
    return found


def op_names(*texts: str) -> dict[str, str]:
    """By instruction, and by the name of its kernel, the place in the model's code.

    Args:
      *texts: HLO of compiled programs; of a name that several have the first's counts,
        as an event does not say of which it is.
    """
    found: dict[str, str] = {}
    for line in "\n".join(texts).splitlines():
        match = re.match(r'\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', line)
        if match:
            found.setdefault(match[1], match[2])
            # XLA calls a fusion's kernel as the fusion, without the dots.
            found.setdefault(re.sub(r"\W", "_", match[1]), match[2])
    return found


def group(event: Event, places: Mapping[str, str]) -> str:
    """Which part of the model an event belongs to, one of `GROUPS`."""
    if _is_copy(event):
        return "copies"
    if "nccl" in event.name or event.op.startswith(tuple(SENT)):
        return "collectives"
    place = places.get(event.op) or places.get(event.name, "")
    for text in (place, event.name):
        for name, marks in PLACES.items():
            if any(mark in text for mark in marks):
                return name
    return "rest"


def summarise(
    found: Sequence[Event], steps: int, places: Mapping[str, str]
) -> dict[str, Any]:
    """Times per step in microseconds, and shares.

    Args:
      found: at least one event.
      steps: decode steps in which they happened.
      places: where in the model each operation is from, by its name.

    Returns:
      step_us: from the first event's start to the last one's end.
      busy_us: with something running.
      gap_share: of the time, with nothing running.
      long_gap_share: of the time, in gaps of at least `LONG_GAP_NS`, in which the
        device waits for the host.
      largest_gap_us: not per step.
      kernels: a step.
      graph_share: of the kernels, in CUDA graphs.
      copies, copied_bytes: a step, by the copy engines.
      groups: by group, us and share of the time that kernels ran.
      top: the kernels that took most, with calls, us and share.
    """
    first = min(e.start for e in found)
    span = max(e.start + e.duration for e in found) - first
    gaps, end = [], first
    for event in sorted(found, key=lambda e: e.start):
        if event.start > end:
            gaps.append(event.start - end)
        end = max(end, event.start + event.duration)
    total = sum(e.duration for e in found) or 1.0
    by_group = dict.fromkeys(GROUPS, 0.0)
    by_name: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in found:
        part = group(event, places)
        by_group[part] += event.duration
        by_name[event.name, part].append(event.duration)
    largest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP]
    kernels = [e for e in found if not _is_copy(e)]

    def timed(duration: float) -> dict[str, float]:
        return {"us": duration / steps / 1e3, "share": duration / total}

    return {
        "step_us": span / steps / 1e3,
        "busy_us": (span - sum(gaps)) / steps / 1e3,
        "gap_share": sum(gaps) / span,
        "long_gap_share": sum(g for g in gaps if g >= LONG_GAP_NS) / span,
        "largest_gap_us": max(gaps, default=0.0) / 1e3,
        "kernels": len(kernels) / steps,
        "graph_share": _share(e.graph for e in kernels),
        "copies": sum(map(_is_copy, found)) / steps,
        "copied_bytes": sum(e.copied for e in found) / steps,
        "groups": {name: timed(t) for name, t in by_group.items() if t},
        "top": [
            {"name": name, "group": part, "calls": len(t) / steps, **timed(sum(t))}
            for (name, part), t in largest
        ],
    }


def cache_copies(hlo: str, shape: Sequence[int]) -> int:
    """Instructions of a compiled program that copy a whole cache buffer.

    Args:
      hlo: its text.
      shape: of one layer's keys, [b, k, s, d].
    """
    dims = ",".join(map(str, shape))
    return len(re.findall(rf"= \(?\w+\[{dims}\][^=]* copy(?:-start)?\(", hlo))


def collectives(*texts: str) -> dict[str, dict[str, float | None]]:
    """What the devices of compiled programs say to each other in one run of each.

    Args:
      *texts: their HLO.

    Returns:
      By kind, how many collectives there are, and the bytes that a device sends in
      them, in rings; None where the text does not say between which devices. Those in
      a loop count as often as it runs.
    """
    found: dict[str, dict[str, float | None]] = {}
    for text in texts:
        _add_collectives(text, found)
    return found


def _add_collectives(hlo: str, found: dict[str, dict[str, float | None]]) -> None:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = bodies[start[2]] = []
            entry = start[2] if start[1] else entry
        else:
            lines.append(line)
    kinds = "|".join(SENT)

    def add(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if match := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
                kind, n, size = match[2], _group_size(line), _type_bytes(match[1])
                if n and match[3] and kind == "all-gather":
                    size *= n / (n + 1)  # the operand stands beside the result
                count, sent = found.get(kind, {"count": 0, "bytes": 0}).values()
                known = n is not None and sent is not None
                found[kind] = {
                    "count": (count or 0) + times,
                    "bytes": sent + times * size * SENT[kind](n) if known else None,
                }
                continue
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for callee in re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", line):
                add(callee, times * (int(trips[1]) if trips else 1))

    add(entry, 1)


def _group_size(line: str) -> int | None:
    """Devices that a collective is of, in any of XLA's ways to write its groups."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{('[\w',]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", match[2]))
    return None


def _type_bytes(text: str) -> int:
    """Bytes of an HLO type, such as (f32[2,3]{1,0}, s32[])."""
    total = 0
    for name, bits, dims in re.findall(
        r"\b(pred|[a-z]+(?=\d))(\d*)\w*\[([\d,]*)\]", text
    ):
        size = 1 if name == "pred" else int(bits) // 8
        total += size * math.prod(map(int, filter(None, dims.split(","))))
    return total


def _is_copy(event: Event) -> bool:
    return event.name.startswith(("Memcpy", "Memset", "MemCpy", "MemSet"))


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0
