"""Batched decoding of language models in JAX, made cheaper by contextual sparsity."""

import importlib

TYPE_CHECKING = False  # of typing, which costs time to import
if TYPE_CHECKING:
    from polarjax.public import (
        Adaptive,
        AsyncEngine,
        Dense,
        Engine,
        ModelConfig,
        Oracle,
        Output,
        Params,
        Piece,
        Plan,
        Polar,
        Policy,
        QueueFull,
        Random,
        Request,
        RequestFailed,
        Rope,
        Settings,
        Stats,
        TopTokens,
        calibrate,
        generate,
        load,
        logits,
        plan,
        recover,
        save,
    )

__version__ = "0.1.0"

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


def __getattr__(name: str):  # PEP 562
    """The public names, and the modules behind them, at the first use of one.

    jax takes seconds to import, and `polarjax --help` needs nothing of it.
    """
    if not name.startswith("_"):
        # Not `from polarjax`, which would ask here again.
        loaded = vars(importlib.import_module("polarjax.public"))
        globals().update({each: loaded[each] for each in __all__ if each in loaded})
        if name in globals():  # a module that is loaded now is there too
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
