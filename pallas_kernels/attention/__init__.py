"""Decode attention over the KV groups selected for each sequence."""

from pallas_kernels.attention.api import append_and_attend, select_head_attention

__all__ = ["append_and_attend", "select_head_attention"]
