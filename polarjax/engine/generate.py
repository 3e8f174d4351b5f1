"""`generate` and `logits`: what users call."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from pallas_kernels import Implementation
from polarjax.engine import places, programs
from polarjax.engine.checks import (
    encode_prompts,
    make_sampling,
    stop_strings,
    stop_tokens,
)
from polarjax.engine.request import Request
from polarjax.engine.stats import Stats, make_stats
from polarjax.engine.tokenizer import Tokenizer
from polarjax.mesh.cut import DP, axis_size, mesh_of, shard
from polarjax.mesh.processes import from_main, to_host
from polarjax.model import BLOCK_TOKENS
from polarjax.params import Params
from polarjax.planning.crossover import bind_where_it_pays
from polarjax.planning.memory import MEMORY_FRACTION, cache_capacity
from polarjax.planning.sizes import bucket, positive
from polarjax.policies import Density, Polar
from polarjax.policy import Dense, SelectionPolicy
from polarjax.settings import default_numbers

Stream = Callable[[int, str, list[int]], None]

# Kept at once of each of generation's functions, one for each shape of a batch: some
# 10 MB each. Beyond that all are dropped: to compile anew now and then is better than
# memory that grows with every kind of call.
MOST_PROGRAMS = 64


@dataclasses.dataclass(frozen=True)
class Output:
    """What `generate` returns; lists have one entry per prompt.

    Attributes:
      tokens: new token ids, the stop token excluded.
      texts: their text, cut before a stop string; None without a tokenizer.
      logprobs: natural log-probability of each token under the model.
      finish_reasons: "stop" (stop token or string) or "length".
      stats: times, bytes and densities.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    logprobs: list[list[float]]
    finish_reasons: list[str]
    stats: Stats


@default_numbers
def generate(
    params: Params,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    density: Density = None,
    policy: SelectionPolicy | None = None,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    stream: Stream | None = None,
    chunk: int = 16,
    prefill_tokens: int = BLOCK_TOKENS,
    memory_fraction: float = MEMORY_FRACTION,
    mesh: Mesh | None = None,
    implementation: Implementation | None = None,
) -> Output:
    """Continue a batch of prompts.

    Sparse if `params` carries routers, else dense. Settings that say "or one per
    request" take a number or a sequence as long as `prompts`.

    What a request gets depends on itself alone up to rounding, neuron sparsity apart,
    whose neurons the batch shares: in float32 the tokens are those that it would get
    alone. In 16 bit a sum in another order may round otherwise, and with it a near tie
    end otherwise. The order depends on the number of requests, and on how many prompts
    are of the same width, the next power of two from 16 on, but not on what the others
    say, nor on their place. Each prompt is read at its own width. On a CPU other widths
    of the others change nothing, nor does the room in the cache; on a GPU attention is
    split by that room, the longest request's tokens up to the next power of two.

    Args:
      params: the model, from `polarjax.load`.
      prompts: a list of str, or of lists or arrays of token ids (taken verbatim),
        whose lengths may differ; or an array int[b, t].
      max_new_tokens: most tokens to add to each prompt. Less are added where the
        model's context ends.
      density: fraction of KV groups to read from layer 1 on, in (0, 1], or one per
        request; 1.0 is dense, of the weights that an adapter of `recover` has mended:
        `policy=Dense()` is the original model. None means the adapter's budgets; where
        measurements of this kind of device predict that selecting heads, or neurons,
        costs more than it saves, all of them are read, and `stats.notes` says so.
      policy: another selection policy (`Dense()`, `Oracle(0.5)`, ...), not together
        with `density`.
      temperature: 0 for greedy, or one per request.
      top_k: most probable tokens to draw from, 0 for all, or one per request.
      top_p: probability mass to draw from, in (0, 1], or one per request.
      seed: of the draws: one per request, or a number s that gives request i the seed
        s + i.
      stop: strings that end a text; they are cut off. A special token's own text, such
        as "<|im_end|>", does so too, although texts do not show special tokens.
      stop_ids: token ids that end a text; None means the model's own.
      stream: called as stream(request, text, tokens) with what is new, between chunks.
      chunk: most decode steps between two looks of the host: stop strings, streaming
        and stop tokens of all requests take effect at its multiples. After the last
        token that any request may have no step is taken, but that a GPU ends its last
        chunk; one is as many as are needed up to the next power of two, where that is
        less.
      prefill_tokens: prompt tokens, padding included, that are computed at once: fewer
        need less memory.
      memory_fraction: of the memory that XLA may take on a device
        (XLA_PYTHON_CLIENT_MEM_FRACTION), how much may be filled; on a CPU, of what the
        machine has available.
      mesh: of `polarjax.mesh.cut.make_mesh`: the model is cut over its axis "tp", the
        batch over "dp". None for where `params` is: on one device, or on the mesh that
        it was loaded on, which spares each call the moving. Where it spans processes
        (`polarjax.mesh.processes`), all of them call this alike; the prompts are those
        of process 0.
      implementation: of the kernels: "xla", "triton" or "mosaic" (attention alone, on
        Hopper, Triton beside it); None chooses by device.

    Returns:
      Tokens, texts, log-probabilities and statistics.

    Raises:
      TypeError: if prompts are no list of str or token ids.
      ValueError: if a prompt or setting is out of range; it is named. If the batch
        does not fit into the device's memory; what would fit is named.
    """
    params = shard(params, mesh) if mesh is not None else _on_devices(params)
    mesh = mesh_of(params.weights)
    many = mesh is not None and mesh.is_multi_process
    config, tokenizer = params.config, Tokenizer.load(params.config)
    encoded = encode_prompts(prompts, tokenizer, config)
    if many:
        encoded = from_main(encoded)
    batch = len(encoded)
    most = min(positive("max_new_tokens", max_new_tokens), config.context)
    chunk = min(positive("chunk", chunk), config.context)
    prefill_tokens = positive("prefill_tokens", prefill_tokens)
    stops = stop_strings(stop, tokenizer)
    end_ids = stop_tokens(stop_ids, config)
    sampling = make_sampling(config, batch, temperature, top_k, top_p, seed)
    asked = density is not None or policy is not None
    policy = _choose_policy(params, density, policy)

    lengths = np.array([len(ids) for ids in encoded], np.int32)
    remaining = np.minimum(most, config.context - lengths).astype(np.int32)
    visible = math.ceil((lengths + remaining / 2).mean())
    weights, bound, notes = bind_where_it_pays(params, policy, asked, batch, visible)
    rows = batch + -batch % axis_size(mesh, DP)
    if rows > batch:  # each part of the batch is as large: dead rows fill the last one
        bound, sampling = places.widen(bound, rows), places.widen(sampling, rows)
        remaining = np.pad(remaining, (0, rows - batch), constant_values=1)
    capacity = cache_capacity(
        *(params, rows, int((lengths + remaining[:batch]).max())),
        prefill_tokens=prefill_tokens,
        prompt_tokens=int(lengths.max()),
        memory_fraction=memory_fraction,
    )
    if many:
        capacity = from_main(capacity)

    requests = [
        Request(ids, limit, tokenizer, stops)
        for ids, limit in zip(encoded, remaining[:batch].tolist(), strict=True)
    ]
    common = {"config": config.architecture, "implementation": implementation}
    clock = _Clock()
    # Prompts are read as the dense model reads them, with the original weights.
    filled = [*encoded, *[encoded[int(lengths.argmin())]] * (rows - batch)]
    state, drawn = programs.read_prompts(
        *(params.weights, filled, remaining, sampling, end_ids),
        **{"capacity": capacity, "most": prefill_tokens, **common},
        call=clock.run,
    )
    drawn, real = jax.tree.map(lambda x: x[None], drawn), np.arange(rows) < batch
    live = to_host(state.live) & real
    clock.lap("prefill")
    counted, go_on, steps = [], real, 0
    whole = programs.takes_whole_chunks(params.weights)
    if whole:
        chunk = min(chunk, bucket(int(remaining[:batch].max()) - 1, 1))
    while True:
        if stops:  # the host has to look before it knows who goes on
            seen = _deliver(requests, drawn, live, stream)
            live = np.zeros(rows, bool)
            live[:batch] = [request.going for request in requests]
            go_on = live
        more = live.any()
        if more:
            # As many as the requests may still draw, of those that go on.
            count = min(chunk, int(remaining[live].max()) - 1 - steps)
            steps += chunk if whole else count
            state, following = clock.run(
                *(
                    programs.decode_chunk,
                    weights,
                    bound,
                    state,
                    go_on,
                    sampling,
                    end_ids,
                ),
                None if whole else np.int32(count),
                **{"steps": chunk, "mesh": mesh, **common},
            )
        if not stops:  # while the device is at the next chunk
            seen = _deliver(requests, drawn, live, stream)
        counted.append(seen)
        if not more:
            break
        drawn, live = following, to_host(state.live)
    clock.lap("decode")

    stats = make_stats(
        *(params, weights, bound, counted[1:], steps, clock.seconds),
        prompt_tokens=int(lengths.sum()),
        new_tokens=sum(len(request.tokens) for request in requests),
        notes=notes,
    )
    return Output(
        tokens=[request.tokens for request in requests],
        texts=None if tokenizer is None else [request.text for request in requests],
        logprobs=[request.logprobs for request in requests],
        finish_reasons=[request.finish_reason for request in requests],
        stats=stats,
    )


@default_numbers
def logits(
    params: Params,
    tokens: Any,
    lengths: Any = None,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Logits of every position, dense prefill with the original weights.

    It may be called inside `jax.jit`, whose traced ids and lengths have no values that
    could be checked: an id out of range then yields NaN.

    Args:
      params: the model.
      tokens: int[b, t] token ids, padded at the end with any valid id.
      lengths: int[b], tokens of each row; None for all t. Positions beyond a length
        are undefined.
      implementation: of the kernels; None chooses by device.

    Returns:
      float32[b, t, v].

    Raises:
      ValueError: if shapes, lengths or ids are out of range.
    """
    if not isinstance(tokens, Tracer):
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise ValueError("the rows of tokens differ in length: pad them") from None
    config = params.config
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers of shape [b, t], got {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    b, t = tokens.shape
    if not b or not 1 <= t <= config.context:
        raise ValueError(
            f"tokens has shape [{b}, {t}]; t may be 1 to {config.context}, the context"
        )
    values = isinstance(tokens, np.ndarray)
    if values and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
        raise ValueError(
            f"token ids go from 0 to {config.vocab_size - 1}, got {tokens.min()} to "
            f"{tokens.max()}"
        )
    if lengths is not None and not isinstance(lengths, Tracer):
        # Causality alone keeps padding out of what comes before it.
        lengths = np.asarray(lengths)
        whole = np.issubdtype(lengths.dtype, np.integer) and lengths.shape == (b,)
        if not whole or lengths.min() < 1 or lengths.max() > t:
            raise ValueError(f"lengths must be {b} integers from 1 to {t}: {lengths}")
    return programs.all_logits(
        *(params.weights, jnp.asarray(tokens, jnp.int32)),
        config=config.architecture,
        implementation=implementation,
        mesh=mesh_of(params.weights),
    )


def _on_devices(params: Params) -> Params:
    """The model as it is, or where its arrays are the host's, on the default device."""

    def put(leaf: Any) -> jax.Array:
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)

    return jax.tree.map(put, params)


def _choose_policy(
    params: Params, density: Density, policy: SelectionPolicy | None
) -> SelectionPolicy:
    if policy is not None:
        if density is not None:
            raise ValueError("pass either policy or density, not both")
        if isinstance(policy, type) or not hasattr(policy, "bind"):
            raise TypeError(f"policy must be a policy like Dense(), got {policy!r}")
        return policy
    if density is not None:
        return Polar(density)
    return Polar() if params.routers else Dense()


class _Clock:
    """Wall time by kind of work, compilation apart."""

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self._since, self._compiled = time.perf_counter(), set()

    def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a jitted function; the first time for such arguments, compile it."""
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(args))
        if (function, shapes) not in self._compiled:
            start = time.perf_counter()
            if function._cache_size() >= MOST_PROGRAMS:
                function.clear_cache()  # what is running stays until it ends
            function.lower(*args, **kwargs).compile()  # kept: the call finds it
            self._compiled.add((function, shapes))
            taken = time.perf_counter() - start
            self.seconds["compile"] += taken
            self._since += taken
        return function(*args, **kwargs)

    def lap(self, kind: str) -> None:
        """Since the last one, or the start, it was this kind of work."""
        now = time.perf_counter()
        self.seconds[kind] += now - self._since
        self._since = now


def _deliver(
    requests: list[Request],
    drawn: programs.Drawn,
    live: np.ndarray,
    stream: Stream | None,
) -> programs.Drawn:
    """Hand on what a chunk brought; returns it, fetched from the devices."""
    drawn = to_host(drawn)
    token, logprob, valid = drawn.token, drawn.logprob, drawn.valid
    for i, request in enumerate(requests):
        if not request.going:
            continue
        keep = valid[:, i]
        if np.isnan(logprob[keep, i]).any():
            raise ValueError(
                f"the model yields NaN for prompt {i}: its weights are damaged"
            )
        request.add(
            token[keep, i].tolist(), logprob[keep, i].tolist(), ended=not live[i]
        )
        if stream:
            text, tokens = request.news()
            if text or tokens:
                stream(i, text, tokens)
    return drawn
