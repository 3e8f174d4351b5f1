"""Router scores to selections: heads per sequence, neurons per batch."""

from pallas_kernels.select.heads import top_heads
from pallas_kernels.select.neurons import union_neurons

__all__ = ["top_heads", "union_neurons"]
