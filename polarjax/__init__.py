"""Batched decoding of language models in JAX, made cheaper by contextual sparsity."""

from polarjax.config import ModelConfig, Rope
from polarjax.generation import Output, Stats, generate, logits
from polarjax.hub import load
from polarjax.params import Params, save
from polarjax.planning import Plan, plan
from polarjax.policy import Dense, SelectionPolicy
from polarjax.sparsity import Oracle, Polar, Random

__version__ = "0.1.0"

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
