"""Router scores to selections: heads per sequence, neurons per batch."""

from pallas_kernels.select.heads import top_heads
from pallas_kernels.select.neurons import needed_neurons, union_neurons

__all__ = ["needed_neurons", "top_heads", "union_neurons"]
