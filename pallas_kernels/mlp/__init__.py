"""Feed-forward layer over the neurons selected for the batch."""

from pallas_kernels.mlp.api import gathered_mlp, partial_mlp, partial_product
from pallas_kernels.mlp.reference import activate, masked_mlp

__all__ = ["activate", "gathered_mlp", "masked_mlp", "partial_mlp", "partial_product"]
