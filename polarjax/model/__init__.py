"""Dense model code: it reads like the papers and knows no routers."""

from polarjax.mesh.share import Share
from polarjax.model.attention import Gates, Prefix
from polarjax.model.decoder import (
    BLOCK_TOKENS,
    Decoder,
    Observe,
    check_weights,
    make_decoder,
    run,
    weight_shapes,
)

__all__ = [
    "BLOCK_TOKENS",
    "Decoder",
    "Gates",
    "Observe",
    "Prefix",
    "Share",
    "check_weights",
    "make_decoder",
    "run",
    "weight_shapes",
]
