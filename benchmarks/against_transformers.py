"""Times decode steps of `transformers` on the shape and with the batch of a case.

    python -m benchmarks.against_transformers MODEL MODE [--batch B] [--context S]

Two modes: eager (its default cache and torch's `scaled_dot_product_attention`), and a
static cache with `torch.compile(mode="reduce-overhead")`, which replays CUDA graphs.
Prints one JSON object. `benchmarks.decode` runs it as a process of its own, so that
torch and jax never share the device's memory.
"""

import argparse
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

from polarjax import ModelConfig
from polarjax.bench.shapes import parse_model

MODES = {"eager": "eager", "static": "static cache, torch.compile"}
VERSIONS = ("torch", "transformers")
STEPS = 16
REPEATS = 5


def is_timed(model: str) -> bool:
    """Whether a model is a whole one of LLaMA's architecture."""
    found = parse_model(model)
    return bool(found and not found[1] and found[0].family in ("llama", "mistral"))


def transformers_config(config: ModelConfig) -> Any:
    """Ours, of LLaMA's architecture, as theirs; no hub."""
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
      mode: a key of `MODES`.
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
    theirs, static = transformers_config(config), mode == "static"
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(theirs).eval()
    torch.set_default_dtype(torch.float32)
    if static:
        cache = transformers.StaticCache(config=theirs, max_cache_len=context)
    else:
        cache = transformers.DynamicCache(config=theirs)
    names = inspect.signature(model.forward).parameters
    wants_positions = "cache_position" in names
    kept = "cache" if "cache" in names else "past_key_values"  # newer versions, older
    positions = torch.arange(context, device=device)

    def read(call: Callable[..., Any], tokens: Any, start: int) -> Any:
        where = positions[start : start + tokens.shape[1]].clone()
        given: dict[str, Any] = {"position_ids": where[None], kept: cache}
        if wants_positions:  # before transformers 5
            given["cache_position"] = where
        out = call(
            tokens,
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
    model: str, batch: int, context: int, toy: bool = False, timeout: float = 240
) -> dict[str, Any]:
    """Each mode in a process of its own, which leaves the device empty.

    Args:
      model: name in `benchmarks.shapes`.
      batch: b.
      context: tokens.
      toy: whether to do it on a CPU.
      timeout: seconds for a mode.

    Returns:
      modes: by name, what `measure` found, or an "error"; versions; and an error, if
      there is nothing to run.
    """
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        return {"error": f"{' and '.join(missing)} not installed", "modes": {}}
    report: dict[str, Any] = {"error": "", "modes": {}}
    # It imports our shapes, and with them jax, which must leave the device alone.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for mode, name in MODES.items():
        command = [
            sys.executable,
            "-m",
            "benchmarks.against_transformers",
            model,
            mode,
            "--batch",
            str(batch),
            "--context",
            str(context),
            *(["--toy"] if toy else []),
        ]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            found = {"error": f"it took more than {timeout:.0f} s"}
        else:
            found = {"error": f"its process ended with {done.returncode}"}
            if not done.returncode:
                found = json.loads(done.stdout.splitlines()[-1])
        report |= {key: found.pop(key) for key in VERSIONS if key in found}
        report["modes"][name] = found
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_transformers",
        description="Time decode steps of transformers.",
    )
    parser.add_argument("model", help="such as llama-2-7b")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--toy", action="store_true", help="on a CPU too")
    args = parser.parse_args()
    if not is_timed(args.model):
        parser.error(f"{args.model} is no whole LLaMA or Mistral of benchmarks.shapes")
    found = parse_model(args.model)
    assert found
    libraries = {name: importlib.import_module(name) for name in VERSIONS}
    torch: Any = libraries["torch"]
    timed: dict[str, Any] = {"error": "torch sees no CUDA device"}
    if args.toy or torch.cuda.is_available():
        try:
            with torch.no_grad():  # as in its generate
                timed = measure(found[0], args.batch, args.context, args.mode)
        except Exception as error:  # what a library refuses is itself a result
            lines = str(error).splitlines() or [""]
            timed = {"error": f"{type(error).__name__}: {lines[0]}"}
    versions = {name: module.__version__ for name, module in libraries.items()}
    print(json.dumps({**versions, **timed}))


if __name__ == "__main__":
    main()
