"""The residual stream's sum and the normalisation that follows it, in one pass."""

from pallas_kernels.norm.api import add_norm, normalize

__all__ = ["add_norm", "normalize"]
