"""What `polarjax` offers by name: imported as a whole, when the first is asked for."""

from polarjax.siblings import check_ours

check_ours("pallas_kernels")

from polarjax.config import ModelConfig, Rope  # noqa: E402
from polarjax.generation import Output, Stats, generate, logits  # noqa: E402
from polarjax.hub import load  # noqa: E402
from polarjax.params import Params, save  # noqa: E402
from polarjax.planning import Plan, plan  # noqa: E402
from polarjax.policy import Dense, SelectionPolicy  # noqa: E402
from polarjax.sparsity import Oracle, Polar, Random  # noqa: E402

__all__ = [
    "Dense",
    "ModelConfig",
    "Oracle",
    "Output",
    "Params",
    "Plan",
    "Polar",
    "Random",
    "Rope",
    "SelectionPolicy",
    "Stats",
    "generate",
    "load",
    "logits",
    "plan",
    "save",
]
