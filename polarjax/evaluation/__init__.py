"""Quality, measured on the code that is fast."""

from polarjax.evaluation.perplexity import (
    Perplexity,
    decode_perplexity,
    window_perplexity,
)
from polarjax.evaluation.recall import router_recall
from polarjax.evaluation.statistics import paired_bootstrap

__all__ = [
    "Perplexity",
    "decode_perplexity",
    "paired_bootstrap",
    "router_recall",
    "window_perplexity",
]
