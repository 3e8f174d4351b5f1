"""Perplexity: of the dense model over whole windows, of a policy by decoding.

`decode_perplexity` goes through the same decode step and kernels as `generate`. Its
windows start with a dense prefix, as a prompt would be.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from polarjax.config import ModelConfig
from polarjax.evaluation.scoring import score_continuations
from polarjax.evaluation.statistics import paired_bootstrap
from polarjax.generation.loop import all_logits
from polarjax.params import Params, Tree
from polarjax.policy import SelectionPolicy


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
      nll: float64[windows], negative log-likelihood of each window's scored tokens,
        summed, in nats.
      scored: tokens scored in each window.
      density: KV groups read / KV groups there, mean over layers.
    """

    nll: np.ndarray
    scored: int
    density: float = 1.0

    @property
    def value(self) -> float:
        """Exponential of the mean negative log-likelihood per token."""
        return math.exp(self.nll.mean() / self.scored)

    def ratio(self, baseline: Perplexity) -> tuple[float, float, float]:
        """This perplexity / a baseline's on the same windows, with a 95 % interval.

        The interval is a paired bootstrap over windows.
        """
        difference = (self.nll - baseline.nll) / self.scored
        low, high = paired_bootstrap(difference)
        return math.exp(difference.mean()), math.exp(low), math.exp(high)


def window_perplexity(
    params: Params, tokens: np.ndarray, window: int = 1024, batch: int = 2
) -> Perplexity:
    """Dense perplexity over non-overlapping windows, each from its second token on.

    Args:
      params: the model.
      tokens: int[n]; an incomplete last window is dropped.
      window: tokens per window.
      batch: windows per forward pass.

    Raises:
      ValueError: if there is not one window, or the context is shorter.
    """
    windows = _windows(tokens, window, params.config)
    nll = [
        _dense_nll(params.weights, jnp.asarray(part), config=params.config.architecture)
        for part in _groups(windows, batch)
    ]
    total = np.concatenate([np.asarray(part, np.float64) for part in nll])
    return Perplexity(total[: len(windows)], window - 1)


def decode_perplexity(
    params: Params,
    tokens: np.ndarray,
    policy: SelectionPolicy,
    *,
    window: int = 256,
    prefix: int = 64,
    batch: int = 16,
    implementation: Implementation | None = None,
) -> Perplexity:
    """Perplexity of a policy, token by token through the decode step.

    Args:
      params: the model.
      tokens: int[n]; an incomplete last window is dropped.
      policy: not yet bound.
      window: tokens per window.
      prefix: tokens at the start of each window that are not scored; all but the last
        of them are read by dense prefill, so that every scored token is sparse.
      batch: windows decoded together; a group that lacks windows is filled up.
      implementation: of the kernels; None chooses by device.

    Raises:
      ValueError: if there is not one window, or the prefix leaves nothing to score.
    """
    if not 2 <= prefix < window:
        raise ValueError(f"prefix must be from 2 to {window - 1}, got {prefix}")
    windows = _windows(tokens, window, params.config)
    batch = min(batch, len(windows))
    weights, bound = policy.bind(params, batch)
    lengths = jnp.full(batch, prefix - 1, jnp.int32)
    counts = jnp.full(batch, window - prefix, jnp.int32)
    results = [
        score_continuations(
            *(weights, bound, jnp.asarray(part[:, : prefix - 1]), lengths),
            *(jnp.asarray(part[:, prefix - 1 :]), counts),
            config=params.config.architecture,
            implementation=implementation,
        )
        for part in _groups(windows, batch)
    ]
    nll = np.concatenate(
        [np.asarray(part, np.float64).sum(1) for part, _, _ in results]
    )
    density = float(np.mean([float(density) for _, _, density in results]))
    return Perplexity(nll[: len(windows)], window - prefix, density)


def _windows(tokens: np.ndarray, window: int, config: ModelConfig) -> np.ndarray:
    if not 2 <= window <= config.context:
        raise ValueError(
            f"window must be from 2 to the model's context {config.context}: {window}"
        )
    count = len(tokens) // window
    if not count:
        raise ValueError(f"{len(tokens)} tokens are less than one window of {window}")
    return np.asarray(tokens[: count * window], np.int32).reshape(count, window)


def _groups(windows: np.ndarray, batch: int) -> Iterable[np.ndarray]:
    """Groups of one shape: the last one repeats its windows."""
    for start in range(0, len(windows), batch):
        yield np.resize(windows[start : start + batch], (batch, windows.shape[1]))


@functools.partial(jax.jit, static_argnames=("config",))
def _dense_nll(weights: Tree, tokens: jax.Array, *, config: ModelConfig) -> jax.Array:
    logits = all_logits(weights, tokens, config=config)
    return _nll(logits[:, :-1], tokens[:, 1:]).sum(axis=1)


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
