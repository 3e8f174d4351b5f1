"""Which heads and neurons to compute: routers, budgets and policies."""

from polarjax.sparsity.adapter import load_adapter, save_adapter
from polarjax.sparsity.card import read_card
from polarjax.sparsity.polar import Oracle, Polar, Random
from polarjax.sparsity.select import Density, HeadBudget, head_budget

__all__ = [
    "Density",
    "HeadBudget",
    "Oracle",
    "Polar",
    "Random",
    "head_budget",
    "load_adapter",
    "read_card",
    "save_adapter",
]
