"""Decode attention over the KV groups selected for each sequence."""

from pallas_kernels.attention.api import select_head_attention

__all__ = ["select_head_attention"]
