"""From the QKV product's parts to heads: added up, rotated, each where it is read."""

from pallas_kernels.heads.api import split_heads
from pallas_kernels.heads.reference import rotate

__all__ = ["rotate", "split_heads"]
