"""Router scores to selections: heads per sequence, neurons per batch."""

from pallas_kernels.select.heads import top_heads
from pallas_kernels.select.neurons import (
    needed_neurons,
    needed_totals,
    union_neurons,
)

__all__ = ["needed_neurons", "needed_totals", "top_heads", "union_neurons"]
