"""Dense model code: it reads like the papers and knows no routers."""

from polarjax.mesh.share import Share
from polarjax.model.attention import Gates, Prefix, Read
from polarjax.model.decoder import (
    Decoder,
    Observe,
    Reading,
    Step,
    Whole,
    check_weights,
    extend,
    last_logits,
    logits,
    make_decoder,
    read,
    weight_shapes,
    whole,
)
from polarjax.model.pick import Pick

__all__ = [
    "Decoder",
    "Gates",
    "Observe",
    "Pick",
    "Prefix",
    "Read",
    "Reading",
    "Share",
    "Step",
    "Whole",
    "check_weights",
    "extend",
    "last_logits",
    "logits",
    "make_decoder",
    "read",
    "weight_shapes",
    "whole",
]
