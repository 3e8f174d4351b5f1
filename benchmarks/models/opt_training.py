"""Train an OPT from random weights: 16-bit products, float32 everything else."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.models.books_text import batches, blocks
from polarjax.config import ModelConfig
from polarjax.model import Decoder, whole
from polarjax.model import logits as logits_of
from polarjax.model.linear import linear
from polarjax.params import Tree
from polarjax.settings import draw_key

_LOGIT_ROWS = 8192  # tokens whose logits are in memory at once
_IN_FLIGHT = 8  # steps given to the device before the host waits for one


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of a training.

    Attributes:
      steps: of the optimiser.
      batch: sequences of a step.
      learning_rate: its peak; it warms up over 4 % of the steps and decays to 0 by a
        cosine.
      weight_decay: of AdamW, for matrices; norms and biases do not decay.
      clip: largest norm of a gradient.
      head_sparsity: weight of a penalty on heads that do a little of everything: the
        share of a token's head norms that the smaller half of the heads holds, and, so
        that no head is given up for good, how unevenly all tokens together use them;
        means over layers from 1. Small models trained without it use all heads for
        each token; large ones do not (Polar Sparsity, section 3).
      seed: of the initial weights and of the order of the text.
      compute: dtype of activations and products; the weights and the residual stream
        are float32.
    """

    steps: int = 5000
    batch: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    head_sparsity: float = 0.0
    seed: int = 0
    compute: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative: {self.seed}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive: {self.learning_rate}")
        if not (math.isfinite(self.head_sparsity) and self.head_sparsity >= 0):
            raise ValueError(
                f"head_sparsity must not be negative: {self.head_sparsity}"
            )

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW on clipped gradients."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, max(1, self.steps // 25), self.steps + 1
        )

        def matrices(tree: Tree) -> Any:
            return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

        decay = self.weight_decay
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(schedule, b2=0.95, weight_decay=decay, mask=matrices),
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training gives.

    Attributes:
      weights: float32, the Linen parameters of `Decoder`.
      losses: of each step before its update, nats per token.
      seconds: in all, compilation included.
      tokens_per_second: compilation left out.
    """

    weights: Tree
    losses: list[float]
    seconds: float
    tokens_per_second: float


@functools.partial(jax.jit, static_argnames="config")
def initial_weights(key: jax.Array, *, config: ModelConfig) -> Tree:
    """Normal, 0.02; less where a layer adds to the residual stream (GPT-2)."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    weights = Decoder(config).init(key, tokens)["params"]
    scale = (2 * config.layers) ** -0.5

    def rescale(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf * scale if path[-1].key in ("out", "down") else leaf

    return jax.tree_util.tree_map_with_path(rescale, weights)


def token_losses(
    weights: Tree, tokens: jax.Array, *, config: ModelConfig, dtype: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of each token but the first, and how sparse the model is.

    Args:
      weights: float32.
      tokens: [b, t + 1].
      config: of the model.
      dtype: of activations and products.

    Returns:
      float32[b, t], nats; and float32[layers, b], means over the tokens that were read:
      "active", the share of MLP neurons above 0, and "lesser_heads", the share of the
      heads' norms that the smaller half of the heads holds. "heads", the share of each
      head, is float32[layers, b, h].
    """
    model = Decoder(config, jnp.dtype(dtype))

    def narrow(tree: Tree) -> Tree:
        return jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, tree)

    def observe(layer: int, _: jax.Array, o: jax.Array, z: jax.Array) -> Any:
        mlp = layers[f"layers_{layer}"]["mlp"]
        active = (linear(z, mlp["up"], mlp["up_bias"]) > 0).mean((1, 2))
        lesser, each = head_shares(o)
        return {
            "active": active,
            "lesser_heads": lesser.mean(1),
            "heads": each.mean(1),
        }

    tokens = tokens.astype(jnp.int32)
    layers = narrow({k: v for k, v in weights.items() if k != "embed"})
    # The embeddings stay float32, and so does the residual stream: what the tokens add
    # to an embedding's gradient is too little, one by one, for a sum in 16 bit.
    mixed = {**layers, "embed": weights["embed"]}
    made = whole(model, mixed, tokens[:, :-1], observe=observe)
    x, seen = made.x, made.observed

    @jax.checkpoint  # logits are computed again, not kept
    def losses(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        head = narrow({name: weights[name] for name in ("embed", "final_norm")})
        logits = logits_of(model, head, args[0])
        # Not a gather, whose gradient is a scatter.
        wanted = args[1][..., None] == jnp.arange(config.vocab_size)
        chosen = jnp.where(wanted, logits, 0.0).sum(-1)
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    rows = max(1, _LOGIT_ROWS // x.shape[1])
    nll = jax.lax.map(losses, (x, tokens[:, 1:]), batch_size=min(rows, len(x)))
    return nll, jax.tree.map(lambda *layers: jnp.stack(layers), *seen)


def head_shares(o: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What heads hold of the sum of their norms.

    Args:
      o: [..., h, d], head outputs.

    Returns:
      float32[...], the share of the smaller half of them, from 0 (half of the heads
      would do) to a half (all count alike); and float32[..., h], of each.
    """
    squares = jnp.square(o.astype(jnp.float32)).sum(axis=-1)
    norms = jnp.sqrt(squares + 1e-12)  # which has a slope at 0 too
    shares = norms / norms.sum(axis=-1, keepdims=True)
    lesser = jax.lax.top_k(-shares, o.shape[-2] // 2)[0]
    return -lesser.sum(axis=-1), shares


def imbalance(shares: jax.Array) -> jax.Array:
    """How unevenly heads are used: 0 if alike, 1 if half of them alike and no other.

    As the balancing losses of mixtures of experts, from the shares of a whole batch: a
    token may need few heads, and the next one others.

    Args:
      shares: float32[..., h], which sum to 1.

    Returns:
      float32[...], the squared coefficient of variation.
    """
    return shares.shape[-1] * jnp.square(shares).sum(axis=-1) - 1


@functools.partial(
    jax.jit, static_argnames=("config", "training"), donate_argnums=(0, 1)
)
def _train_step(
    weights: Tree,
    state: optax.OptState,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    training: Training,
) -> tuple[Tree, optax.OptState, jax.Array]:
    def mean_loss(weights: Tree) -> tuple[jax.Array, jax.Array]:
        found = token_losses(weights, tokens, config=config, dtype=training.compute)
        loss = found[0].mean()
        if not training.head_sparsity:  # then the shares need not be computed
            return loss, loss
        shares = {name: share[1:].mean(1) for name, share in found[1].items()}
        penalty = shares["lesser_heads"].mean() + imbalance(shares["heads"]).mean()
        return loss + training.head_sparsity * penalty, loss

    gradient, loss = jax.grad(mean_loss, has_aux=True)(weights)
    updates, state = training.optimizer().update(gradient, state, weights)
    return optax.apply_updates(weights, updates), state, loss  # type: ignore


def train(
    config: ModelConfig,
    tokens: np.ndarray,
    training: Training,
    progress: Callable[[int, float, float], None] | None = None,
) -> Trained:
    """Train a model from random weights.

    One seed gives one model, bit for bit on a CPU. A GPU adds some gradients up in
    any order; XLA_FLAGS=--xla_gpu_deterministic_ops=true forbids it that.

    Args:
      config: of the model.
      tokens: uint16[n], the text; n > context * (batch + 1).
      training: settings.
      progress: called after each step with its number from 1, its loss, and tokens
        per second since the first.

    Raises:
      FloatingPointError: if the loss is no number any more.
    """
    begin = time.perf_counter()
    weights = initial_weights(draw_key(training.seed), config=config)
    state = training.optimizer().init(weights)
    stream = batches(tokens, config.context, training.batch, training.seed)
    losses: list[float] = []
    flying: collections.deque[jax.Array] = collections.deque()
    first, rate = 0.0, 0.0

    def land() -> None:
        nonlocal first, rate
        losses.append(float(flying.popleft()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss of step {len(losses)} is {losses[-1]}: lower the learning "
                "rate"
            )
        now = time.perf_counter()
        first = first or now  # the first step compiled
        done = (len(losses) - 1) * training.batch * config.context
        rate = done / (now - first) if done else 0.0
        if progress:
            progress(len(losses), losses[-1], rate)

    for batch in itertools.islice(stream, training.steps):
        weights, state, loss = _train_step(
            weights, state, batch, config=config, training=training
        )
        flying.append(loss)
        if len(flying) > _IN_FLIGHT:
            land()
    while flying:
        land()
    return Trained(weights, losses, time.perf_counter() - begin, rate)


_measure = jax.jit(token_losses, static_argnames=("config", "dtype"))


def evaluate(
    config: ModelConfig, weights: Tree, tokens: np.ndarray, batch: int, dtype: str
) -> tuple[float, dict[str, list[Any]], int]:
    """Score a text in blocks that do not overlap.

    Args:
      config: of the model.
      weights: float32.
      tokens: uint16[n], n > context.
      batch: blocks at a time.
      dtype: of activations and products.

    Returns:
      Perplexity per token; the shares of `token_losses` by layer; tokens scored.
    """
    rows = blocks(tokens, config.context)
    nll, shares = [], []
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        filled = np.resize(part, (batch, config.context + 1))  # one shape for all
        losses, found = _measure(weights, filled, config=config, dtype=dtype)
        nll.append(np.asarray(losses)[: len(part)].mean(axis=1))
        shares.append({k: np.asarray(v)[:, : len(part)] for k, v in found.items()})
    perplexity = math.exp(np.concatenate(nll).mean())
    means = {
        name: np.concatenate([part[name] for part in shares], axis=1).mean(axis=1)
        for name in shares[0]
    }
    by_layer = {name: mean.tolist() for name, mean in means.items()}
    return perplexity, by_layer, rows.size - len(rows)
