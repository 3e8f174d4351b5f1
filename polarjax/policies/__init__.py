"""The policies: one file each; and what they learn, are bound to and saved as."""

from polarjax.policies.adapter import (
    load_adapter,
    of_learned,
    save_adapter,
    with_density,
    with_learned,
)
from polarjax.policies.adaptive import Adaptive
from polarjax.policies.budgets import Density
from polarjax.policies.card import read_card
from polarjax.policies.names import named
from polarjax.policies.oracle import Oracle
from polarjax.policies.polar import Polar
from polarjax.policies.random import Random

__all__ = [
    "Adaptive",
    "Density",
    "Oracle",
    "Polar",
    "Random",
    "load_adapter",
    "named",
    "of_learned",
    "read_card",
    "save_adapter",
    "with_density",
    "with_learned",
]
