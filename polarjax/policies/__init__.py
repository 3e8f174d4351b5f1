"""Which heads and neurons to compute: routers, budgets and policies."""

from polarjax.policies.adapter import load_adapter, save_adapter
from polarjax.policies.budgets import Density, HeadBudget, head_budget
from polarjax.policies.card import read_card
from polarjax.policies.polar import Oracle, Polar, Random

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
