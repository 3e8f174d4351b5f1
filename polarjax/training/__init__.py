"""Routers from text."""

from polarjax.training.text import token_blocks
from polarjax.training.train import Progress, RouterTraining, train_routers

__all__ = ["Progress", "RouterTraining", "token_blocks", "train_routers"]
