"""Attention: of decode over selected KV groups, of prefill over pages."""

from pallas_kernels.attention.api import append_and_attend, select_head_attention
from pallas_kernels.attention.chunk import attend_chunk

__all__ = ["append_and_attend", "attend_chunk", "select_head_attention"]
