"""Quality, measured on the code that is fast."""

from polarjax.evaluation.perplexity import (
    Perplexity,
    decode_perplexity,
    window_perplexity,
)
from polarjax.evaluation.recall import router_recall
from polarjax.evaluation.statistics import paired_bootstrap
from polarjax.evaluation.tasks import TaskResult, evaluate_task, read_rows

__all__ = [
    "Perplexity",
    "TaskResult",
    "decode_perplexity",
    "evaluate_task",
    "paired_bootstrap",
    "read_rows",
    "router_recall",
    "window_perplexity",
]
