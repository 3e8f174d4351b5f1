"""How long it takes until an engine is ready: a process of its own each time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.promises.common import (
    finish,
    make_engine,
    make_params,
    settings,
)
from benchmarks.promises.sizes import Sizes, Wanted
from polarjax.bench import counts

READY = (Wanted("cold_seconds", most=90), Wanted("cached_seconds", most=20))


def ready(shape: str, sizes: Sizes) -> dict[str, Any]:
    """Make an engine with no compiled program at hand, and again with all of them.

    No other program of this process may hold the device's memory meanwhile.

    Args:
      shape: of the model.
      sizes: of the engine.

    Returns:
      Seconds from the call of the constructor to its return, both times; the bytes of
      the compiled programs on disk; and, of the second process, the seconds of a
      request's first token and what was compiled for it.

    Raises:
      RuntimeError: if such a process fails, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        cold, cached = (_process(shape, sizes, folder) for _ in range(2))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
    return {
        "cold_seconds": cold["ready_seconds"],
        "cached_seconds": cached["ready_seconds"],
        "cache_bytes": size,
        "first_token_seconds": cached["first_token_seconds"],
        "weights_seconds": cached["weights_seconds"],
        "compilations": cold["compilations"] + cached["compilations"],
    }


def _process(shape: str, sizes: Sizes, folder: str) -> dict[str, Any]:
    """What another process says of its engine, which keeps programs in a folder."""
    known = {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "CUDA_CACHE_PATH": str(Path(folder) / "cuda"),
    }
    numbers = json.dumps(dataclasses.asdict(sizes))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.promises.ready", shape, numbers],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | known,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"making an engine in a process fails: {done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.promises.ready",
        description="Make an engine, and print how long that took as a line of JSON.",
    )
    parser.add_argument("shape")
    parser.add_argument("sizes", type=json.loads, help="fields of Sizes, as JSON")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    params = jax.block_until_ready(make_params(args.shape))
    drawn = time.perf_counter()
    engine = make_engine(args.shape, params, Sizes(**args.sizes))
    made = time.perf_counter()
    with counts.compilations() as compiled:
        request = engine.add([1, 2, 3], settings(2))
        while not request.tokens:
            engine.step()
        first = time.perf_counter()
        finish(engine)
    found = {
        "weights_seconds": drawn - start,
        "ready_seconds": made - drawn,
        "first_token_seconds": first - made,
        "compilations": compiled.count,
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
