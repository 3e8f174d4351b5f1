"""What is known of a device before anything runs on it: memory, bandwidth, link."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from polarjax.planning.bandwidth import read_bandwidth
from polarjax.planning.host_memory import host_memory

# From NVIDIA's datasheets: bytes of memory, bytes per second that it is read at.
GPUS = {
    "a100-40gb": (40e9, 1.555e12),
    "a100-80gb": (80e9, 2.039e12),
    "h100": (80e9, 3.35e12),
    "h100-pcie": (80e9, 2.0e12),
    "h200": (141e9, 4.8e12),
    "l4": (24e9, 300e9),
    "l40s": (48e9, 864e9),
    "rtx-3090": (24e9, 936e9),
    "rtx-4090": (24e9, 1008e9),
}
# Bytes per second that one of them sends over NVLink, by the datasheets of the SXM
# modules: half of what is said of both directions. As named there, and by JAX.
LINKS = {
    "a100-40gb": 300e9,
    "a100-80gb": 300e9,
    "h100": 450e9,
    "h200": 450e9,
    "NVIDIA H100 80GB HBM3": 450e9,
    "NVIDIA H200": 450e9,
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """A device, as far as a plan knows it.

    Attributes:
      name: of the device.
      limit: bytes that XLA may take.
      bandwidth: bytes per second that its memory is read at.
      source: where these numbers come from.
      platform: "gpu", "cpu", ...
      link: bytes per second that it sends to others of its kind; None if unknown.
    """

    name: str
    limit: float
    bandwidth: float
    source: str
    platform: str
    link: float | None = None


def known_gpu(name: str) -> Memory:
    """A GPU that is not at hand, by its name.

    Raises:
      ValueError: if it is not in the table.
    """
    if name.lower() not in GPUS:
        raise ValueError(
            f"device {name!r} is not known: there are {', '.join(GPUS)}; or leave it "
            "out for the device that is here"
        )
    total, bandwidth = GPUS[name.lower()]
    share = _xla_share()
    return Memory(
        name=name.lower(),
        limit=total * share,
        bandwidth=bandwidth,
        source=f"datasheet values, not measured; XLA takes {share:g} of the memory "
        "(XLA_PYTHON_CLIENT_MEM_FRACTION)",
        platform="gpu",
        link=LINKS.get(name.lower()),
    )


def live(device: Any) -> Memory:
    """A device that is here, the first for None; its bandwidth is measured.

    Raises:
      ValueError: if it does not say how much memory it has.
    """
    device = jax.devices()[0] if device is None else device
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        limit, source = stats["bytes_limit"], "memory as the device says"
    elif device.platform == "cpu" and (host := host_memory()):
        limit = host.limit
        source = "memory of this machine"
    else:
        raise ValueError(
            f"{device.device_kind} does not say how much memory it has; name a GPU: "
            f"{', '.join(GPUS)}"
        )
    return Memory(
        name=device.device_kind,
        limit=limit,
        bandwidth=read_bandwidth(device),
        source=f"{source}, bandwidth measured",
        platform=device.platform,
        link=LINKS.get(device.device_kind),
    )


def check_link(link_gb_s: Any) -> float:
    """A rate between devices, in GB per second.

    Raises:
      ValueError: if it is no number above 0.
    """
    number = isinstance(link_gb_s, int | float) and not isinstance(link_gb_s, bool)
    if not number or not 0 < link_gb_s < float("inf"):
        raise ValueError(f"link_gb_s must be GB per second above 0, got {link_gb_s!r}")
    return float(link_gb_s)


def sending_ms(sent: int, memory: Memory) -> float:
    """Milliseconds to send so many bytes to other devices.

    Raises:
      ValueError: if nothing is known of the link.
    """
    if not sent:
        return 0.0
    if memory.link is None:
        raise ValueError(
            f"how fast {memory.name} sends to others of its kind is not known: pass "
            "link_gb_s, --link-gb-s, the GB per second that one device sends"
        )
    return sent / memory.link * 1e3


def _xla_share() -> float:
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
