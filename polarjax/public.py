"""What `polarjax` offers by name: imported as a whole, when the first is asked for."""

from polarjax.storage.siblings import check_ours

check_ours("pallas_kernels")

from polarjax.calibration.calibrate import calibrate  # noqa: E402
from polarjax.calibration.recover import recover  # noqa: E402
from polarjax.config import ModelConfig, Rope  # noqa: E402
from polarjax.engine.generate import Output, generate, logits  # noqa: E402
from polarjax.engine.stats import Stats  # noqa: E402
from polarjax.loading import load  # noqa: E402
from polarjax.params import Params, save  # noqa: E402
from polarjax.planning.plan import Plan, plan  # noqa: E402
from polarjax.policies import Oracle, Polar, Random  # noqa: E402
from polarjax.policy import Dense, SelectionPolicy  # noqa: E402

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
    "calibrate",
    "generate",
    "load",
    "logits",
    "plan",
    "recover",
    "save",
]
