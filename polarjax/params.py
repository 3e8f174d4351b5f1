"""A model as one pytree, and the folder it is kept in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from polarjax.config import ModelConfig

Tree = dict[str, Any]

CONFIG_FILE = "config.json"
CARD_FILE = "card.json"
CHECKSUMS_FILE = "checksums.json"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_WEIGHTS, _ROUTERS = "weights", "routers"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """A model: weights, routers and what they are.

    Attributes:
      weights: nested dict of arrays, the Linen parameters of `model.Decoder`.
      routers: nested dict of arrays, empty without an adapter: per sparse layer
        `layers_3/heads/{weight [k, m], bias [k]}`, and for ReLU models optionally
        `layers_3/neurons/{down [r, m], up [f, r]}`.
      config: static and hashable.
    """

    weights: Tree
    routers: Tree
    config: ModelConfig = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self):
        """Of the weights."""
        return self.weights["embed"]["tokens"].dtype


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a temporary folder beside `path` and renames it on success. On any error,
    and for the leftovers of an earlier process that was killed, it is deleted.

    Args:
      path: where the folder shall be.
      overwrite: replace what is there, if it is polarjax's own.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten.
    """
    path = Path(path)
    check_destination(path, overwrite)
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        _remove(path)
        partial.rename(path)
    except BaseException:
        _remove(partial)
        raise


def check_destination(path: str | Path, overwrite: bool) -> None:
    """Raise unless a checkpoint or adapter may be written to a place.

    Args:
      path: the folder to make.
      overwrite: whether an older checkpoint or adapter there may be replaced.

    Raises:
      FileExistsError: if there is one and it may not, or if there is something else.
    """
    path = Path(path)
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists: choose another place, or overwrite it (--overwrite)"
        )
    empty = path.is_dir() and not any(path.iterdir())
    if not empty and not any(map(_has_format, (path / CONFIG_FILE, path / CARD_FILE))):
        raise FileExistsError(
            f"{path} is no polarjax checkpoint or adapter: it will not be overwritten"
        )


def _has_format(file: Path) -> bool:
    try:
        return "format_version" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_folder(
    path: str | Path,
    config: ModelConfig,
    weights: Tree,
    routers: Tree | None = None,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
      path: the folder.
      config: what the model is.
      weights: nested dict of numpy or jax arrays.
      routers: nested dict, or None.
      files: further text files by name (tokenizer, chat template).
      overwrite: replace what is there.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten.
      OSError: if the disk is too small or cannot be written.
    """
    parts = {_WEIGHTS: weights, **({_ROUTERS: routers} if routers else {})}
    with new_folder(path, overwrite) as partial:
        # Compression may save some of it, but orbax's own failure on a full disk is
        # pages of traces from its threads: ask first.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise OSError(
                f"no space for {path}: it needs {needed / 1e6:,.1f} MB "
                f"and {free / 1e6:,.1f} MB are free"
            )
        for name, tree in parts.items():
            try:  # around it all: its threads' errors come when it closes
                with _quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save((partial / name).absolute(), tree)
            except Exception as error:  # of many types
                raise OSError(f"cannot write {path}: {_first_line(error)}") from None
        for name, text in (files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        sums = {
            file.relative_to(partial).as_posix(): _checksum(file)
            for name in parts
            for file in sorted((partial / name).rglob("*"))
            if file.is_file()
        }
        (partial / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n")
        # Last: a folder without it does not load.
        (partial / CONFIG_FILE).write_text(config.to_json() + "\n", encoding="utf-8")


def save(params: Params, path: str | Path, *, overwrite: bool = False) -> None:
    """Write `params`, its routers and its tokenizer to a folder that `load` reads.

    Args:
      params: the model.
      path: the folder to make.
      overwrite: replace what is there.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten.
      OSError: if the disk is too small or cannot be written.
    """
    files = {}
    if params.config.folder:
        for name in (TOKENIZER_FILE, CHAT_TEMPLATE_FILE):
            source = Path(params.config.folder) / name
            if source.exists():
                files[name] = source.read_text(encoding="utf-8")
    write_folder(
        path, params.config, params.weights, params.routers, files, overwrite=overwrite
    )


def read_folder(path: str | Path, dtype=None) -> Params:
    """Read a checkpoint folder onto the default device.

    Args:
      path: what `save` or `python -m convert` wrote.
      dtype: of the weights in memory, or None for that of the file. Routers stay
        float32.

    Raises:
      FileNotFoundError: if there is no such folder, or no checkpoint in it.
      ValueError: if the checkpoint is damaged or of another format.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {path}")
    if not (path / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{path} has no {CONFIG_FILE}: not a polarjax checkpoint, or one whose "
            f"writing was interrupted. Make one with `python -m convert SRC {path}`"
        )
    if not (path / _WEIGHTS).is_dir():
        raise FileNotFoundError(
            f"{path} holds no polarjax weights. If it is a Hugging Face folder, "
            f"convert it first: `python -m convert {path} DST`"
        )
    text = (path / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    config = ModelConfig.from_json(text, folder=str(path.absolute()))
    _check_files(path)
    weights = _restore(path / _WEIGHTS, dtype)
    routers = _restore(path / _ROUTERS) if (path / _ROUTERS).is_dir() else {}
    return Params(weights, routers, config)


def _check_files(path: Path) -> None:
    """Raise unless weights and routers are byte for byte what was written.

    The weights' own format notices some damage, and no changed bit of an array.
    """
    try:
        sums = dict(json.loads((path / CHECKSUMS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path / CHECKSUMS_FILE} is missing or damaged: convert the model again"
        ) from error
    for name, checksum in sums.items():
        if not (path / name).is_file():
            raise ValueError(f"{path} is damaged: {name} is missing")
        if _checksum(path / name) != checksum:
            raise ValueError(f"{path} is damaged: {name} is not what was written")


def _checksum(file: Path) -> str:
    """CRC-32 in hexadecimal: against accidents, at the speed of a disk."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _restore(path: Path, dtype=None) -> Tree:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(leaf) -> jax.ShapeDtypeStruct:
        kind = dtype if dtype is not None else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)

    with _quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path.absolute()).item_metadata
            if stored is None:
                raise ValueError("its metadata are missing")
            target = jax.tree.map(abstract, stored.tree)
            return checkpointer.restore(path.absolute(), target)
        except Exception as error:  # orbax and tensorstore raise many types
            raise ValueError(f"{path} is damaged: {_first_line(error)}") from error


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Errors reach the caller as exceptions; keep their traces off the terminal."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def check_finite(name: str, array) -> None:
    """Raise if an array holds NaN or infinity.

    Args:
      name: of the tensor, for the message.
      array: a jax or numpy array of floats.

    Raises:
      ValueError: naming the tensor.
    """
    module = jnp if isinstance(array, jax.Array) else np
    if not bool(module.isfinite(array).all()):
        raise ValueError(f"{name} holds NaN or infinity: the file is damaged")
