"""What the options offer, without loading the code that knows it.

`tests/cli/test_arguments.py` holds every name here against that code.
"""

from __future__ import annotations

POLICIES = ("dense", "polar", "adaptive", "oracle", "random")
# Of `polarjax.evaluation`.
MODES = ("decode", "kernel", "mask")
PERPLEXITIES = ("windows", "strided", "words")
# Of `polarjax.training`.
HEAD_LOSSES = ("bce", "ranking")
ROUTERS = (*HEAD_LOSSES, "slopes", "nothing")
# Of `pallas_kernels`, without those that are for debugging.
IMPLEMENTATIONS = ("xla", "triton")
# Of `polarjax.planning.memory`.
MEMORY_FRACTION = 0.95
# Of `polarjax.planning.devices`, and which of them have NVLink.
GPUS = (
    "a100-40gb",
    "a100-80gb",
    "h100",
    "h100-pcie",
    "h200",
    "l4",
    "l40s",
    "rtx-3090",
    "rtx-4090",
)
LINKED = ("a100-40gb", "a100-80gb", "h100", "h200")
# Of `polarjax.bench`: what is played, and what of it may have limits.
LOADS = ("chat", "uniform", "reasoning", "long", "shared-prefix")
LATENCIES = ("ttft", "tpot", "e2el")
# Of `polarjax.planning.plan`.
BATCHES = (1, 4, 16, 64, 256)
DENSITIES = (1.0, 0.5)
