"""`transformers`' continuous batching: how it is set up, asked, and held to its word.

Its versions differ in what they call things; what is here goes with 5.17 to 5.24.
"""

import contextlib
import dataclasses
import heapq
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.against_transformers import transformers_config
from polarjax import ModelConfig
from polarjax.bench.latencies import Trace
from polarjax.bench.loads import Ask

ATTENTIONS = ("flash_attention_3", "flash_attention_2", "sdpa")
_WAIT = 1.0  # seconds between two looks whether the engine is alive
_CPU_TOKENS = 512  # computed at once on a CPU


def play(
    manager: Any,
    load: Sequence[Ask],
    due: Sequence[float],
    most_open: int | None = None,
    ended: Callable[[], None] = lambda: None,
) -> list[Trace]:
    """Send requests as they arrive to a manager that runs in a thread of its own.

    Tokens count from when its thread has them, by the timestamps that it records: what
    a client would see of them comes later.

    Args:
      manager: of continuous batching, running.
      load: what the requests ask for.
      due: when each arrives, in seconds from the beginning, ascending.
      most_open: as in `polarjax.bench.serve.play`.
      ended: called when a request has ended.

    Raises:
      RuntimeError: if the manager stops, or a request fails or gets too few tokens.
    """
    prompts = [ask.prompt.tolist() for ask in load]
    traces: list[Trace | None] = [None] * len(load)
    going: dict[str, tuple[int, float]] = {}
    free = [0.0] * (most_open or 0)
    number, start = 0, time.perf_counter()
    while number < len(load) or going:
        at = time.perf_counter() - start
        while number < len(load) and due[number] <= at and (free or not most_open):
            sent = max(due[number], heapq.heappop(free) if most_open else 0.0)
            name = manager.add_request(
                prompts[number],
                max_new_tokens=load[number].new_tokens,
                record_timestamps=True,
                eos_token_id=-1,
            )
            if name is None:
                raise RuntimeError("transformers takes no requests any more")
            going[name] = number, sent
            number += 1
        may_send = number < len(load) and (free or not most_open)
        wait = max(0.0, due[number] - at) if may_send else _WAIT
        if not going:
            time.sleep(wait)
            continue
        found = manager.get_result(timeout=min(max(wait, 1e-4), _WAIT))
        if found is None:
            if not manager.is_running():
                raise RuntimeError("transformers' thread has ended: see its log")
            continue
        i, sent = going.pop(found.request_id)
        traces[i] = _trace(found, load[i], i, sent, start)
        if most_open:
            heapq.heappush(free, time.perf_counter() - start)
        ended()
    return [trace for trace in traces if trace is not None]


def _trace(found: Any, ask: Ask, number: int, sent: float, start: float) -> Trace:
    """What a result says of when its tokens came."""
    tokens = len(found.generated_tokens)
    if found.error is not None or tokens != ask.new_tokens:
        raise RuntimeError(
            f"request {number} ended after {tokens} tokens of {ask.new_tokens}: "
            f"{found.error or found.status}"
        )
    chunks = tuple((at - start, 1) for at in found.timestamps)
    return Trace(len(ask.prompt), sent, chunks)


def cb_config(
    names: Collection[str],
    level: int,
    block_size: int,
    requests: int,
    longest: int,
    cuda: bool,
) -> dict[str, Any]:
    """Arguments of its `ContinuousBatchingConfig`, which versions name otherwise.

    Args:
      names: of the fields that it has.
      level: `default_compile_level`.
      block_size: tokens of a block of the cache.
      requests: that are continued at once, at most.
      longest: tokens of the longest request.
      cuda: whether on a GPU; else the cache is sized here, as it would take the
        machine's whole memory.
    """
    blocks = math.ceil(longest / block_size) + 1
    blocks += blocks % 2  # as its generate_batch sizes them
    given: dict[str, Any] = {
        "page_size" if "page_size" in names else "block_size": block_size,
        "default_compile_level": level,
        "max_requests_per_batch": requests,
        "max_blocks_per_request": blocks,
    }
    if "auto_switch_to_flash" in names:
        given["auto_switch_to_flash"] = False
    if not cuda:
        given |= {"num_blocks": blocks * requests, "max_batch_tokens": _CPU_TOKENS}
        del given["max_blocks_per_request"]  # of a path that is CUDA's alone
    return given


def fields(transformers: Any) -> set[str]:
    """Names that its `ContinuousBatchingConfig` has."""
    known = dataclasses.fields(transformers.ContinuousBatchingConfig)
    return {field.name for field in known}


def requested(attention: str, names: Collection[str]) -> str:
    """What a model is to be set to, so that it is served with an attention.

    Args:
      attention: one of `ATTENTIONS`.
      names: of the fields of `ContinuousBatchingConfig`: versions that cannot be told
        to leave sdpa alone know it by another name.
    """
    old = "auto_switch_to_flash" not in names
    return f"paged|{attention}" if attention == "sdpa" and old else attention


def check_attention(used: str, asked: str) -> None:
    """Raise unless a model is served with the attention that was asked for.

    Raises:
      RuntimeError: naming both.
    """
    if used.removeprefix("paged|") != asked:
        raise RuntimeError(
            f"transformers serves with the attention {used}, where {asked} was asked "
            "for: figures of it would be of something else"
        )


def memory_percent(torch: Any, share: float) -> float:
    """Of the memory that is free, what a share of all of it leaves for the cache.

    Args:
      torch: with CUDA, and the model on the device.
      share: of the device, weights included.

    Raises:
      ValueError: if the weights take more.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    left = share * total - (total - free)
    if left <= 0:
        raise ValueError(
            f"--memory-fraction {share:g} is {share * total / 1e9:.1f} GB, and the "
            f"weights take {(total - free) / 1e9:.1f}: take more"
        )
    return left / free


def random_model(config: ModelConfig, torch: Any, transformers: Any) -> Any:
    """A model of random weights: bfloat16 on a GPU, else float32."""
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    try:
        with torch.device("cuda" if cuda else "cpu"):
            return transformers.LlamaForCausalLM(transformers_config(config)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def served(
    model: Any, attention: str, settings: Mapping[str, Any], transformers: Any
) -> Iterator[Any]:
    """A manager that serves a model, with the attention asked for or not at all."""
    model.set_attn_implementation(requested(attention, fields(transformers)))
    greedy = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, max_new_tokens=1
    )
    with model.continuous_batching_context_manager(
        generation_config=greedy,
        continuous_batching_config=transformers.ContinuousBatchingConfig(**settings),
    ) as manager:
        check_attention(model.config._attn_implementation, attention)
        yield manager
