"""Times decode steps of `transformers` on the shape and with the batch of a case.

    python -m benchmarks.against_transformers MODEL [--batch B] [--context S] [--toy]

Two modes: eager (its default cache and torch's `scaled_dot_product_attention`), and a
static cache with `torch.compile(mode="reduce-overhead")`, which replays CUDA graphs.
Prints one JSON object. `benchmarks.decode` runs it as a process of its own, so that
torch and jax never share the device's memory.
"""

import argparse
import gc
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from benchmarks.shapes import parse_model
from polarjax import ModelConfig

MODES = ("eager", "static cache, torch.compile")
STEPS = 16
REPEATS = 5


def transformers_config(config: ModelConfig) -> Any:
    """Ours as theirs; no hub.

    Raises:
      ValueError: if the model is not of LLaMA's architecture.
    """
    if config.family not in ("llama", "mistral"):
        raise ValueError(
            f"transformers is timed on LLaMA's architecture, not on {config.family}'s"
        )
    transformers: Any = importlib.import_module("transformers")
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.neurons,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        tie_word_embeddings=config.tied_embeddings,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def measure(
    config: ModelConfig, batch: int, context: int, mode: str, repeats: int = REPEATS
) -> dict[str, Any]:
    """Times of chunks of steps that go on from a filled cache.

    Args:
      config: of the model.
      batch: b.
      context: tokens in the cache at the end of the last chunk.
      mode: one of `MODES`.
      repeats: chunks.

    Returns:
      step_ms of each chunk, visible (mean tokens in the cache over the steps timed),
      and compile_s, what the first steps took.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    dtype = torch.bfloat16 if cuda else torch.float32
    theirs, static = transformers_config(config), mode != "eager"
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(theirs).eval()
    torch.set_default_dtype(torch.float32)
    if static:
        cache = transformers.StaticCache(config=theirs, max_cache_len=context)
    else:
        cache = transformers.DynamicCache(config=theirs)
    wants_positions = "cache_position" in inspect.signature(model.forward).parameters
    positions = torch.arange(context, device=device)

    def read(call: Callable[..., Any], tokens: Any, start: int) -> Any:
        where = positions[start : start + tokens.shape[1]].clone()
        given: dict[str, Any] = {"position_ids": where[None]}
        if wants_positions:  # before transformers 5
            given["cache_position"] = where
        out = call(
            *(tokens,),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **given,
        )
        return out.logits[:, -1:].argmax(-1)

    warm = STEPS  # a static cache's graphs are recorded within a few steps
    start = context - warm - STEPS * repeats
    if start < 1:
        raise ValueError(f"a context of {context} has no room for {repeats} chunks")
    tokens = torch.randint(config.vocab_size, (batch, start), device=device)
    token = read(model, tokens, 0)
    del tokens
    step = torch.compile(model, mode="reduce-overhead") if static else model

    def chunk(token: Any, start: int) -> tuple[Any, float]:
        begin = time.perf_counter()
        for i in range(STEPS):
            if static and cuda:
                torch.compiler.cudagraph_mark_step_begin()
            token = read(step, token, start + i)
        if cuda:
            torch.cuda.synchronize()
        token.sum().item()
        return token, time.perf_counter() - begin

    token, compile_s = chunk(token, start)
    times = []
    for i in range(repeats):
        token, seconds = chunk(token, start + warm + i * STEPS)
        times.append(seconds / STEPS * 1e3)
    visible = context - STEPS * repeats / 2 + 0.5
    return {"step_ms": times, "visible": visible, "compile_s": compile_s}


def transformers_times(
    model: str, batch: int, context: int, toy: bool = False, timeout: float = 300
) -> dict[str, Any]:
    """What the process below prints, or an "error" that says why there is nothing.

    Args:
      model: name in `benchmarks.shapes`.
      batch: b.
      context: tokens.
      toy: whether to do it on a CPU.
      timeout: seconds; then what was timed until then is lost.
    """
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        return {"error": f"{' and '.join(missing)} not installed", "modes": {}}
    command = [
        *(sys.executable, "-m", "benchmarks.against_transformers", model),
        *("--batch", str(batch), "--context", str(context)),
        *(["--toy"] if toy else []),
    ]
    # It imports our shapes, and with them jax, which must leave the device alone.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"transformers took more than {timeout:.0f} s", "modes": {}}
    if done.returncode:
        error = f"transformers: its process ended with {done.returncode}"
        return {"error": error, "modes": {}}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_transformers",
        description="Time decode steps of transformers.",
    )
    parser.add_argument("model", help="such as llama-2-7b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--toy", action="store_true", help="on a CPU too")
    args = parser.parse_args()
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    found = parse_model(args.model)
    if found is None or found[1]:
        parser.error(f"{args.model} is no whole model of benchmarks.shapes")
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "error": "",
        "modes": {},
    }
    if not (args.toy or torch.cuda.is_available()):
        report["error"] = "torch sees no CUDA device"
    else:
        with torch.no_grad():  # as in its generate
            for mode in MODES:
                try:
                    timed = measure(found[0], args.batch, args.context, mode)
                except Exception as error:  # what a library refuses is itself a result
                    lines = str(error).splitlines() or [""]
                    timed = {"error": f"{type(error).__name__}: {lines[0]}"}
                report["modes"][mode] = timed
                print(mode, timed, file=sys.stderr, flush=True)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
