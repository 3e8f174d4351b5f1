"""Quality, measured on the code that is fast."""

from polarjax.evaluation.batches import Continuation, Mode
from polarjax.evaluation.damage import Damage, measure_damage
from polarjax.evaluation.measure import Measured, measure
from polarjax.evaluation.perplexity import (
    Perplexity,
    perplexity,
    rolling_items,
    strided_items,
    window_items,
)
from polarjax.evaluation.recall import Recall, router_recall
from polarjax.evaluation.run import Settings, evaluate
from polarjax.evaluation.scoring import Scorer
from polarjax.evaluation.statistics import (
    Interval,
    difference_interval,
    fraction_interval,
    mcnemar,
    mean_interval,
    share_interval,
)
from polarjax.evaluation.tasks import grade, read_rows, task_items

__all__ = [
    "Continuation",
    "Damage",
    "Interval",
    "Measured",
    "Mode",
    "Perplexity",
    "Recall",
    "Scorer",
    "Settings",
    "difference_interval",
    "evaluate",
    "fraction_interval",
    "grade",
    "mcnemar",
    "mean_interval",
    "measure",
    "measure_damage",
    "perplexity",
    "read_rows",
    "rolling_items",
    "router_recall",
    "share_interval",
    "strided_items",
    "task_items",
    "window_items",
]
