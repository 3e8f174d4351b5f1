"""Decode kernels that read only what contextual sparsity selected.

`select_head_attention` reads the KV cache of each sequence's selected KV groups,
`gathered_mlp` the weight rows of the batch's selected neurons; `top_heads` and
`union_neurons` turn router scores into those selections. Nothing here knows of
models: arrays in, arrays out.
"""

from pallas_kernels._backend import Implementation
from pallas_kernels.attention import select_head_attention
from pallas_kernels.mlp import gathered_mlp
from pallas_kernels.select import top_heads, union_neurons

__all__ = [
    "Implementation",
    "gathered_mlp",
    "select_head_attention",
    "top_heads",
    "union_neurons",
]
