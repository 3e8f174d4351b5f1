"""Feed-forward layer over the neurons selected for the batch."""

from pallas_kernels.mlp.api import gathered_mlp

__all__ = ["gathered_mlp"]
