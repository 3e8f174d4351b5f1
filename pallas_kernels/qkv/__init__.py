"""From the QKV product's parts to heads: added up, rotated, each where it is read."""

from pallas_kernels.qkv.api import split_heads
from pallas_kernels.qkv.reference import rotate

__all__ = ["rotate", "split_heads"]
