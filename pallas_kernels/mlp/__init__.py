"""Feed-forward layer over the neurons selected for the batch."""

from pallas_kernels.mlp.api import gathered_mlp
from pallas_kernels.mlp.reference import masked_mlp

__all__ = ["gathered_mlp", "masked_mlp"]
