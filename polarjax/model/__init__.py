"""Dense model code: it reads like the papers and knows no routers."""

from polarjax.mesh.share import Share
from polarjax.model.attention import Gates, Prefix, Read
from polarjax.model.decoder import (
    BLOCK_TOKENS,
    Decoder,
    Observe,
    Step,
    Whole,
    check_weights,
    extend,
    logits,
    make_decoder,
    read,
    weight_shapes,
    whole,
)
from polarjax.model.pick import Pick

__all__ = [
    "BLOCK_TOKENS",
    "Decoder",
    "Gates",
    "Observe",
    "Pick",
    "Prefix",
    "Read",
    "Share",
    "Step",
    "Whole",
    "check_weights",
    "extend",
    "logits",
    "make_decoder",
    "read",
    "weight_shapes",
    "whole",
]
