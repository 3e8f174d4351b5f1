"""The memory of this machine, as far as this process may have it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Memory that is not a device's own.

    Attributes:
      limit: bytes that this process may have, if nobody else needs any.
      in_use: of these, what is taken, by whomever; what can be had back, such as
        copies of files, is not counted.
    """

    limit: int
    in_use: int


def host_memory(root: str = "/") -> HostMemory | None:
    """What the kernel says of the machine, and of this process' control groups.

    Args:
      root: where /proc and /sys are.

    Returns:
      None where nobody says, as on what is no Linux.
    """
    found = [_machine(Path(root)), *_groups(Path(root))]
    known = [memory for memory in found if memory is not None]
    if not known:
        return None
    limit = min(memory.limit for memory in known)
    return HostMemory(limit, limit - min(m.limit - m.in_use for m in known))


def _machine(root: Path) -> HostMemory | None:
    text = _read(root / "proc/meminfo")
    kilobytes = {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    if not {"MemTotal", "MemAvailable"} <= kilobytes.keys():
        return None
    total, free = (kilobytes[name] << 10 for name in ("MemTotal", "MemAvailable"))
    return HostMemory(total, total - free)


def _groups(root: Path) -> list[HostMemory | None]:
    """The control groups of this process and those above them that have a limit."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if not kinds:  # version 2
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        # In a container the path may be the host's: its own is where it is mounted.
        above = [group, *group.parents] if group.is_dir() else [mount]
        for folder in above:
            found.append(_group(folder, *names))
            if folder == mount:
                break
    return found


def _group(folder: Path, limit: str, usage: str) -> HostMemory | None:
    most, used = (_read(folder / name).strip() for name in (limit, usage))
    if not most.isdecimal() or not used.isdecimal():  # "max", or none
        return None
    stat = _read(folder / "memory.stat")
    again = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.M)
    return HostMemory(int(most), max(0, int(used) - int(again[1] if again else 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
