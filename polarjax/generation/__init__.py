"""Text in, text out: tokenizer, sampling, the compiled loop and the public calls."""

from polarjax.generation.api import Output, generate, logits
from polarjax.generation.stats import Stats
from polarjax.generation.tokenizer import Tokenizer, start_token

__all__ = ["Output", "Stats", "Tokenizer", "generate", "logits", "start_token"]
