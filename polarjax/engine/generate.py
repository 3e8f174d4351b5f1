"""`generate` and `logits`: what users call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from pallas_kernels import Implementation, runnable
from polarjax.engine import programs
from polarjax.engine.checks import (
    check_errors,
    check_params,
    encode_or_say_why,
    encode_prompts,
    settings_of,
    variant_of,
)
from polarjax.engine.engine import Engine, Errors, Stream
from polarjax.engine.output import Output
from polarjax.engine.places import on_devices
from polarjax.engine.progress import Progress
from polarjax.engine.room import prefill_tokens_of, room_for
from polarjax.engine.tokenizer import Tokenizer
from polarjax.mesh.cut import mesh_of, shard
from polarjax.mesh.processes import from_main
from polarjax.model import make_decoder
from polarjax.params import Params
from polarjax.planning.memory import MEMORY_FRACTION, check_sizes
from polarjax.planning.sizes import bucket, positive
from polarjax.policies import Density, named
from polarjax.policies.budgets import count
from polarjax.policy import Dense, Load, Policy, check_policy
from polarjax.settings import default_numbers

Biases = Mapping[int, float] | None
TokenIds = Sequence[int] | None
Count = int | Sequence[int | None] | None


@default_numbers
def generate(
    params: Params,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    density: Density = None,
    policy: Policy | None = None,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    min_p: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
    presence_penalty: float | Sequence[float] = 0.0,
    frequency_penalty: float | Sequence[float] = 0.0,
    logit_bias: Biases | Sequence[Biases] = None,
    allowed_token_ids: TokenIds | Sequence[TokenIds] = None,
    min_tokens: int | Sequence[int] = 0,
    ignore_eos: bool | Sequence[bool] = False,
    n: int | Sequence[int] = 1,
    logprobs: Count = None,
    prompt_logprobs: Count = None,
    echo: bool | Sequence[bool] = False,
    stream: Stream | None = None,
    progress: bool | Progress = False,
    errors: Errors = "raise",
    prefill_tokens: int | None = None,
    memory_fraction: float = MEMORY_FRACTION,
    mesh: Mesh | None = None,
    implementation: Implementation | None = None,
) -> Output:
    """Continue a batch of prompts.

    Sparse if `params` carries routers, else dense. Settings that say "or one per
    request" take a number or a sequence as long as `prompts`.

    What a request gets depends on itself alone, to the last bit, neuron sparsity apart,
    whose neurons the batch shares: in an `Engine` it is the same alone or in any
    company. A call makes an engine of its own size: its slots, its context and
    `prefill_tokens`, all powers of two, go with the number of requests, the longest of
    them and the prompts' tokens. In float32 an engine of another size gives the same
    tokens; in 16 bit its sums may round otherwise, and a near tie end otherwise.

    Args:
      params: the model, from `polarjax.load`.
      prompts: a list of str, or of lists or arrays of token ids (taken verbatim),
        whose lengths may differ; or an array int[b, t].
      max_new_tokens: most tokens to add to each prompt, or one per request. Less are
        added where the model's context ends.
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
      stop: strings that end a text, 64 at most, of at most 256 characters; they are
        cut off. A special token's own text, such as "<|im_end|>", does so too, although
        texts do not show special tokens.
      stop_ids: token ids that end a text, 64 at most; None means the model's own.
      min_p: how probable a token must be, as a part of what the best is, in [0, 1], or
        one per request. In which order all these apply, `polarjax.Settings` says.
      repetition_penalty: what logits of tokens of prompt and output are divided by
        where they are positive, and multiplied by where not, from 0.01 to 100, or one
        per request.
      presence_penalty: what is taken from the logits of tokens of the output, from -2
        to 2, or one per request.
      frequency_penalty: as much for each time that they occur there, from -2 to 2, or
        one per request.
      logit_bias: dict from token ids, 300 at most, to what is added to their logits,
        from -100 to 100; or a list of one per request.
      allowed_token_ids: list of the only tokens that may be drawn, None for all; or a
        list of one per request.
      min_tokens: tokens before which none of the stop ids is drawn, at most
        `max_new_tokens`, or one per request.
      ignore_eos: whether the model's own end tokens are as any others, or one per
        request; `stop_ids` that are given end a text all the same.
      n: samples of each prompt, at most 128, each an entry of the output; or one per
        request. Greedy ones are all alike.
      logprobs: how many of the most probable tokens to tell at each step, at most 20,
        or one per request: `Output.alternatives`. None for none.
      prompt_logprobs: as many at each token of the prompts, with the log-probability of
        the token itself: `Output.prompt_logprobs` and `prompt_alternatives`.
      echo: whether texts begin with their prompts, or one per request. Where `logprobs`
        are told, those of prompts are too.
      stream: called as stream(entry, text, tokens) with what is new of an entry of the
        output, after each step.
      progress: True for a bar on stderr, if that is a terminal; or a function, called
        after each step as progress(requests that ended, requests, new tokens).
      errors: "raise" if one request that fails shall end the call; "keep" if it shall
        fail alone, as a wrong or too long prompt does, or one for which the model
        yields NaN: its `finish_reasons` is "error", and `Output.errors` says why.
      prefill_tokens: prompt tokens that one program reads, of each part of the batch;
        None for all, but at most what the device is good at: 2048 on a GPU.
      memory_fraction: of the memory that XLA may take on a device
        (XLA_PYTHON_CLIENT_MEM_FRACTION), how much may be filled; on a CPU, of what the
        machine has available.
      mesh: of `polarjax.mesh.cut.make_mesh`: the model is cut over its axis "tp", the
        batch over "dp". None for where `params` is: on one device, or on the mesh that
        it was loaded on, which spares each call the moving. Where it spans processes
        (`polarjax.mesh.processes`), all of them call this alike; the prompts are those
        of process 0.
      implementation: of the kernels: "xla" or "triton"; None chooses by device.

    Returns:
      Tokens, texts, log-probabilities and statistics.

    Raises:
      TypeError: if prompts are no list, or, unless kept, not of str or token ids.
      ValueError: if a setting is out of range, or, unless kept, a prompt; it is named.
        If the model yields NaN, and that is not kept. If not even the longest request
        fits into the device's memory. Where not all fit at once, some wait.
    """
    params = check_params(params)
    params = shard(params, mesh) if mesh is not None else on_devices(params)
    config, tokenizer = params.config, Tokenizer.load(params.config)
    if check_errors(errors) == "keep":
        encoded, wrong = encode_or_say_why(prompts, tokenizer, config)
    else:
        encoded = encode_prompts(prompts, tokenizer, config)
        wrong = [None] * len(encoded)
    mesh = mesh_of(params.weights)
    many = mesh is not None and mesh.is_multi_process
    if many:
        encoded, wrong = from_main((encoded, wrong))
    batch, lengths = len(encoded), [len(ids) or 1 for ids in encoded]
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "density": density,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "stop_ids": stop_ids,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": logit_bias,
        "allowed_token_ids": allowed_token_ids,
        "min_tokens": min_tokens,
        "ignore_eos": ignore_eos,
        "n": n,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "echo": echo,
    }
    asked = settings_of(config, tokenizer, batch, settings)
    pairs = zip(lengths, asked, strict=True)
    limits = [min(one.max_new_tokens, config.context - n) for n, one in pairs]
    ends = [n + limit for n, limit in zip(lengths, limits, strict=True)]
    middles = [n + limit / 2 for n, limit in zip(lengths, limits, strict=True)]
    policy = _choose_policy(params, density, policy)
    k, mean = config.kv_heads, None
    if policy and all(one.density and count(one.density, k) == k for one in asked):
        # Nothing is to be chosen, for which there would have to be routers.
        policy = policy.asking(()) if params.routers else Dense()
        density, settings["density"] = None, None
    if density is not None:
        mean = sum(count(one.density or 1, k) for one in asked) / k / batch
    # Which is promised an exact MLP.
    dense = any(one.density and count(one.density, k) == k for one in asked)
    if policy is not None and dense and "neurons" in policy.asks:
        policy = policy.asking(tuple(x for x in policy.asks if x != "neurons"))
    if prefill_tokens is not None:
        prefill_tokens = positive("prefill_tokens", prefill_tokens)
        check_sizes(params, 1, prefill_tokens, memory_fraction)
    else:
        prefill_tokens = min(bucket(sum(lengths)), prefill_tokens_of(params))
    needs = [end for end, one in zip(ends, asked, strict=True) for _ in range(one.n)]
    slots, context = room_for(
        params,
        needs,
        prefill_tokens=prefill_tokens,
        memory_fraction=memory_fraction,
    )
    if many:  # each looks at its own host's memory
        slots, context = from_main((slots, context))
    with Engine(
        params,
        policy=policy,
        slots=slots,
        context=context,
        prefill_tokens=prefill_tokens,
        memory_fraction=memory_fraction,
        load=Load(min(slots, len(needs)), math.ceil(sum(middles) / batch), mean),
        densities=density is not None,
        implementation=implementation,
        variants=[variant_of(asked)],
        logprobs=any(one.logprobs is not None for one in asked),
        prompt_logprobs=any(one.told_of_prompt is not None for one in asked),
    ) as engine:
        out = engine.generate(
            encoded, stream=stream, progress=progress, errors=errors, **settings
        )
    # The engine was given no tokens of those.
    pairs = zip(out.prompts, out.errors, strict=True)
    why = [wrong[number] or error for number, error in pairs]
    return dataclasses.replace(out, errors=why)


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
    config = check_params(params).config
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
    runnable(implementation)
    model = make_decoder(
        config.architecture, params.weights, implementation=implementation
    )
    ids = jnp.asarray(tokens, jnp.int32)
    return programs.all_logits(params.weights, ids, model=model)


def _choose_policy(
    params: Params, density: Density, policy: Policy | None
) -> Policy | None:
    """What the user chose; None for what the model came with."""
    if policy is not None:
        if density is not None:
            raise ValueError("pass either policy or density, not both")
        return check_policy(policy)
    if density is not None:
        return params.policy if params.routers else named("polar")
    return None
