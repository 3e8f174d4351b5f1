"""Compiled programs kept on disk, so that a command's second start need not compile."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

OFF = "POLARJAX_NO_COMPILE_CACHE"


def use_compile_cache() -> None:
    """Keep compiled programs in a folder of the user's, unless one is set already.

    jax's own settings (`JAX_COMPILATION_CACHE_DIR`, `jax_compilation_cache_dir`) win,
    and `POLARJAX_NO_COMPILE_CACHE=1` turns it off.
    """
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if chosen or os.environ.get(OFF, "0") != "0":
        return
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"note: compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: a start makes dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder() -> Path:
    """`polarjax/xla` in the user's cache: XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative ones ignored.
    cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return cache / "polarjax" / "xla"
