"""Text in, text out: tokenizer, sampling, the compiled loop and the public calls."""

from polarjax.engine.stats import Stats
from polarjax.engine.tokenizer import Tokenizer, start_token

__all__ = ["Stats", "Tokenizer", "start_token"]
