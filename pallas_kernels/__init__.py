"""Decode kernels that read only what contextual sparsity selected.

`select_head_attention` reads the KV cache of each sequence's selected KV groups
(`append_and_attend` writes the newest token's keys and values on the way),
`gathered_mlp` the weight rows of the batch's selected neurons; `top_heads` and
`union_neurons` turn router scores into those selections, `needed_neurons` a router's
hidden state. Nothing here knows of models: arrays in, arrays out. `product` is the
matrix product of the dense model; `partial_product`, `split_heads`, `partial_mlp` and
`add_norm` are what a decode step makes of it. `attend_chunk` is the attention of
prompts that are read in pieces, over pages.
"""

from pallas_kernels._backend import Implementation, resolve, runnable, traced_gpu
from pallas_kernels._dot import product
from pallas_kernels._put import put
from pallas_kernels.attention import (
    append_and_attend,
    attend_chunk,
    select_head_attention,
)
from pallas_kernels.mlp import (
    activate,
    gathered_mlp,
    masked_mlp,
    partial_mlp,
    partial_product,
)
from pallas_kernels.norm import add_norm, normalize
from pallas_kernels.qkv import rotate, split_heads
from pallas_kernels.select import (
    needed_neurons,
    needed_totals,
    top_heads,
    union_neurons,
)

__all__ = [
    "Implementation",
    "activate",
    "add_norm",
    "append_and_attend",
    "attend_chunk",
    "gathered_mlp",
    "masked_mlp",
    "needed_neurons",
    "needed_totals",
    "normalize",
    "partial_mlp",
    "partial_product",
    "product",
    "put",
    "resolve",
    "rotate",
    "runnable",
    "select_head_attention",
    "split_heads",
    "top_heads",
    "traced_gpu",
    "union_neurons",
]
