"""What results say of where they come from."""

from __future__ import annotations

import datetime
import hashlib
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from polarjax.params import Params


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def about(
    params: Params, adapter: str | Path | None, command: Sequence[str]
) -> dict[str, Any]:
    """What a record of results says of where they come from.

    Args:
      params: the model.
      adapter: folder that its routers came from.
      command: that was given.
    """
    made = {"command": list(command), "finished": now(), **environment()}
    return {"made": made, "setup": model(params, adapter)}


def model(params: Params, adapter: str | Path | None) -> dict[str, Any]:
    """Which weights were measured: checkpoint, dtype, and the adapter's digest.

    Args:
      params: the model.
      adapter: folder that its routers came from.
    """
    routers = None
    if adapter is not None:
        file = digest_of(Path(adapter) / "routers.safetensors")
        name, budgets = Path(adapter).name, list(params.config.budgets)
        routers = {"name": name, "sha256": file["sha256"], "budgets": budgets}
    return {
        "checkpoint": Path(params.config.folder).name,
        "model_hash": params.config.model_hash,
        "dtype": str(params.dtype),
        "adapter": routers,
    }


def digest_of(path: str | Path) -> dict[str, str]:
    """Name and SHA-256 of a file."""
    path = Path(path)
    with open(path, "rb") as file:
        return {
            "file": path.name,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def environment() -> dict[str, Any]:
    """Commit, device and versions."""
    names = ("polarjax", "jax", "jaxlib", "flax", "numpy", "tokenizers")
    return {
        "commit": _commit(),
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in names},
        },
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a folder that is not installed
        return None


def _commit() -> str | None:
    """Of the repository that this file is in; "+" behind it where that was changed."""
    folder = Path(__file__).resolve().parent
    git = ("git", "-C", str(folder))
    try:
        tracked = (*git, "ls-files", "--error-unmatch", Path(__file__).name)
        subprocess.run(tracked, capture_output=True, check=True)
        head, changes = (
            subprocess.run((*git, *args), capture_output=True, text=True, check=True)
            for args in (("rev-parse", "--short=7", "HEAD"), ("diff", "HEAD", "--stat"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
