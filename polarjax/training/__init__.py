"""Routers from text, and what sparsity broke mended."""

from polarjax.training.loop import Progress, Resume
from polarjax.training.recovery import Recovery, train_updates
from polarjax.training.self_text import write_blocks
from polarjax.training.text import Corpus, Source, read_corpus, token_blocks
from polarjax.training.train import RouterTraining, train_routers

__all__ = [
    "Corpus",
    "Progress",
    "Recovery",
    "Resume",
    "RouterTraining",
    "Source",
    "read_corpus",
    "token_blocks",
    "train_routers",
    "train_updates",
    "write_blocks",
]
