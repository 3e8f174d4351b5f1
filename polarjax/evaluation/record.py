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
import numpy as np

from polarjax.mesh.cut import mesh_of, whole_routers
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
    """Which weights were measured, and where: checkpoint, dtype, digest of routers.

    Args:
      params: the model.
      adapter: folder that its routers came from.
    """
    routers, mesh = None, mesh_of(params.weights)
    if params.routers:
        numbers = params.policy.learned.numbers()
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(whole_routers(params)):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf).tobytes())
        routers = {
            "name": None if adapter is None else Path(adapter).name,
            "sha256": digest.hexdigest(),
            "budgets": numbers["budgets"],
            "neuron_budgets": numbers["neuron_budgets"],
            "thresholds": numbers["thresholds"],
        }
    return {
        "checkpoint": Path(params.config.folder).name,
        "model_hash": params.config.model_hash,
        "architecture": _short(repr(params.config.architecture)),
        "dtype": str(params.dtype),
        "mesh": None if mesh is None else dict(mesh.shape),
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
        "commit": commit(),
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


def commit() -> str | None:
    """Of the repository that this file is in, with a digest of changes to it."""
    git = ("git", "-C", str(Path(__file__).resolve().parent))

    def ask(*command: str) -> str:
        done = subprocess.run((*git, *command), capture_output=True, check=True)
        return done.stdout.decode(errors="replace").strip()

    try:
        ask("ls-files", "--error-unmatch", Path(__file__).name)
        head, changes = ask("rev-parse", "--short=7", "HEAD"), ask("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+{_short(changes)}" if changes else head


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
