"""What `polarjax` offers by name: imported as a whole, when the first is asked for."""

from polarjax.storage.siblings import check_ours

check_ours("pallas_kernels")

from polarjax.calibration.calibrate import calibrate  # noqa: E402
from polarjax.calibration.recover import recover  # noqa: E402
from polarjax.config import ModelConfig, Rope  # noqa: E402
from polarjax.engine.alternatives import TopTokens  # noqa: E402
from polarjax.engine.async_engine import AsyncEngine  # noqa: E402
from polarjax.engine.checks import Settings  # noqa: E402
from polarjax.engine.engine import Engine  # noqa: E402
from polarjax.engine.errors import QueueFull, RequestFailed  # noqa: E402
from polarjax.engine.generate import generate, logits  # noqa: E402
from polarjax.engine.output import Output  # noqa: E402
from polarjax.engine.request import Piece, Request  # noqa: E402
from polarjax.engine.stats import Stats  # noqa: E402
from polarjax.loading import load  # noqa: E402
from polarjax.params import Params, save  # noqa: E402
from polarjax.planning.plan import Plan, plan  # noqa: E402
from polarjax.policies import Adaptive, Oracle, Polar, Random  # noqa: E402
from polarjax.policy import Dense, Policy  # noqa: E402

__all__ = [
    "Adaptive",
    "AsyncEngine",
    "Dense",
    "Engine",
    "ModelConfig",
    "Oracle",
    "Output",
    "Params",
    "Piece",
    "Plan",
    "Polar",
    "Policy",
    "QueueFull",
    "Random",
    "Request",
    "RequestFailed",
    "Rope",
    "Settings",
    "Stats",
    "TopTokens",
    "calibrate",
    "generate",
    "load",
    "logits",
    "plan",
    "recover",
    "save",
]
