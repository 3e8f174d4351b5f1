"""When a tokenizer cannot be had exactly."""

from __future__ import annotations


class NoTextError(Exception):
    """A tokenizer that cannot be rebuilt token for token; the message says why.

    The checkpoint is converted without one and serves token ids: a tokenizer that is
    nearly right is wrong without a word.
    """
