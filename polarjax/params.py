"""A model as one pytree, and the folder it is kept in.

Weights and routers lie in safetensors files of some hundred megabytes each: they are
written while the next ones are made, and every device reads its own rows alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding, SingleDeviceSharding

from polarjax.config import ModelConfig
from polarjax.policy import Dense, Learned, Policy, Tree
from polarjax.storage.checksums import (
    CHECKSUMS_FILE,
    REASON_BYTES,
    check_files,
    check_text,
    checksum,
    file_checksum,
    read_checksums,
    write_checksums,
)
from polarjax.storage.files import LARGEST_CONFIG, FileError, is_there, read_text
from polarjax.storage.folder import CONFIG_FILE, new_folder, write_tensors
from polarjax.storage.tensors import (
    TENSORS,
    narrowed,
    open_tensors,
    shapes_of,
    weight_dtype,
)
from polarjax.summary import summary


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a weight goes.

    Attributes:
      sharding: the devices, and how it is cut over them.
      rows: int[n], those of the file that it then has, in this order; None for all.
    """

    sharding: Sharding
    rows: np.ndarray | None = None


Place = Callable[[str, tuple[int, ...], ModelConfig], Placement]
"""(path in `Params.weights`, joined by "/", shape, model) -> where it goes."""

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"  # roles of tokens, named templates
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_WEIGHTS, _ROUTERS = "weights", "routers"

# Of arrays in one file. Two such groups are in memory at a time: one is written while
# the next is filled.
GROUP_BYTES = 384 << 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Params:
    """A model: weights, the policy that it came with, and what it is.

    Attributes:
      weights: nested dict of arrays, the Linen parameters of `model.Decoder`.
      policy: of the adapter, not yet bound; `Dense()` without one.
      config: static and hashable.
    """

    weights: Tree
    policy: Policy
    config: ModelConfig = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self):
        """Of the weights."""
        return self.weights["embed"]["tokens"].dtype

    @property
    def routers(self) -> Tree:
        """The arrays that the policy learned; empty without an adapter."""
        return self.policy.learned.routers

    def __repr__(self) -> str:
        """A few lines: a notebook shows them, and not every number."""
        return summary(self.weights, self.policy.learned, self.config)


def taught(params: Params, routers: Tree, **numbers: Any) -> Params:
    """The model whose policy has learned something else.

    Args:
      params: the model.
      routers: the arrays in place of those it had.
      **numbers: further fields of `polarjax.policy.Learned` to replace.
    """
    learned = dataclasses.replace(params.policy.learned, routers=routers, **numbers)
    policy: Any = params.policy
    if routers or params.routers:
        policy = dataclasses.replace(policy, learned=learned)
    return dataclasses.replace(params, policy=policy)


class CheckpointWriter:
    """Arrays on their way into a folder; a thread writes while others are made.

    `new_checkpoint` makes one.
    """

    def __init__(self, folder: Path, pool: ThreadPoolExecutor):
        self._folder, self._pool = folder, pool
        self._group: dict[str, np.ndarray] = {}
        self._bytes = 0
        self._writing: Future[tuple[str, str]] | None = None
        self._sums: dict[str, str] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Take one array, which must not change any more.

        Args:
          name: "weights/" or "routers/" and its path in the tree.
          array: outputs first.

        Raises:
          OSError: if the disk cannot be written.
        """
        if self._bytes + array.nbytes > GROUP_BYTES:
            self._flush()
        self._group[name] = np.ascontiguousarray(array)
        self._bytes += array.nbytes
        if self._bytes > GROUP_BYTES:  # never two of the largest at once
            self._flush()
            self._wait()

    def finish(
        self,
        config: ModelConfig,
        files: Mapping[str, str],
        learned: Learned | None = None,
    ) -> None:
        """Write what is left, and that it is a checkpoint.

        Args:
          config: what the model is.
          files: further text files by name (tokenizer, chat template).
          learned: what an adapter brought, whose arrays were added; None for nothing.

        Raises:
          OSError: if the disk cannot be written.
        """
        self._flush()
        self._wait()
        text = config.to_json((learned or Learned()).numbers()) + "\n"
        sums = {**self._sums, CONFIG_FILE: checksum(text.encode())}
        write_checksums(self._folder, sums)
        # The last of them is what a folder does not load without.
        for name, content in {**files, CONFIG_FILE: text}.items():
            (self._folder / name).write_text(content, encoding="utf-8")

    def _flush(self) -> None:
        self._wait()
        if self._group:
            path = self._folder / TENSORS.format(f"{len(self._sums) + 1:05}")
            self._writing = self._pool.submit(_write_group, path, self._group)
            self._group, self._bytes = {}, 0

    def _wait(self) -> None:
        if self._writing:
            name, checksum = self._writing.result()
            self._sums[name] = checksum
            self._writing = None


def _write_group(path: Path, group: dict[str, np.ndarray]) -> tuple[str, str]:
    write_tensors(path, group)
    return path.name, file_checksum(path)


@contextlib.contextmanager
def new_checkpoint(
    path: str | Path, nbytes: int, overwrite: bool = False
) -> Iterator[CheckpointWriter]:
    """A checkpoint folder that appears whole or not at all.

    Args:
      path: the folder.
      nbytes: of all arrays that will be written.
      overwrite: replace what is there.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten, or another process
        is writing it.
      OSError: if the disk is too small.
    """
    with new_folder(path, overwrite) as partial, ThreadPoolExecutor(1) as pool:
        free = shutil.disk_usage(partial).free
        if free < nbytes:
            raise OSError(
                f"no space for {path}: it needs {nbytes / 1e6:,.1f} MB "
                f"and {free / 1e6:,.1f} MB are free"
            )
        yield CheckpointWriter(partial, pool)


def write_folder(
    path: str | Path,
    config: ModelConfig,
    weights: Tree,
    learned: Learned | None = None,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
      path: the folder.
      config: what the model is.
      weights: nested dict of numpy or jax arrays.
      learned: what an adapter brought; None for nothing.
      files: further text files by name (tokenizer, chat template).
      overwrite: replace what is there.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten.
      OSError: if the disk is too small or cannot be written.
    """
    learned = learned or Learned()
    trees = {_WEIGHTS: weights, _ROUTERS: learned.routers}
    leaves: dict[str, Any] = flatten_dict(trees, sep="/")
    nbytes = sum(leaf.nbytes for leaf in leaves.values())
    with new_checkpoint(path, nbytes, overwrite) as checkpoint:
        for name, leaf in leaves.items():
            checkpoint.add(name, np.asarray(leaf))
        checkpoint.finish(config, files or {}, learned)


def save(params: Params, path: str | Path, *, overwrite: bool = False) -> None:
    """Write `params`, its routers and its tokenizer to a folder that `load` reads.

    Args:
      params: the model.
      path: the folder to make.
      overwrite: replace what is there.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten.
      OSError: if the disk is too small or cannot be written.
      ValueError: if the model is cut over devices.
    """
    for leaf in jax.tree.leaves(params.weights):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            raise ValueError(
                "the model is cut over devices, its rows in their order: save "
                "polarjax.mesh.cut.whole(params)"
            )
    write_folder(
        path,
        params.config,
        params.weights,
        params.policy.learned,
        files=text_files(params.config),
        overwrite=overwrite,
    )


def text_files(config: ModelConfig) -> dict[str, str]:
    """The tokenizer and chat template of a checkpoint, where it has them, by name."""
    if not config.folder:
        return {}
    names = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE)
    paths = [Path(config.folder, name) for name in names]
    return {path.name: read_text(path) for path in paths if is_there(path)}


def read_description(path: str | Path) -> ModelConfig:
    """What the model in a checkpoint folder is; no tensor is looked at.

    Args:
      path: what `save` or `polarjax convert` wrote.

    Raises:
      FileNotFoundError: if there is no such folder, or no checkpoint in it.
      ValueError: if its description is damaged or of another format.
    """
    return _read_description(Path(path))[0]


def _read_description(path: Path) -> tuple[ModelConfig, Learned]:
    """And the numbers of the policy that it was saved with."""
    if path.suffix == ".gguf" and path.is_file():
        raise FileNotFoundError(
            f"{path} is a GGUF file: convert it first: `polarjax convert {path} DST`"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {path}")
    if not is_there(path / CONFIG_FILE):
        raise FileNotFoundError(
            f"{path} has no {CONFIG_FILE}: not a polarjax checkpoint, or one whose "
            f"writing was interrupted. Make one with `polarjax convert SRC {path}`"
        )
    text = read_text(path / CONFIG_FILE, LARGEST_CONFIG)
    try:
        config = ModelConfig.from_json(text, folder=str(path.absolute()))
        learned = Learned.from_json(text)
    except ValueError as error:
        if is_there(path / CHECKSUMS_FILE):
            raise FileError(f"{path}: {error}") from None
        raise FileNotFoundError(
            f"{path} is no polarjax checkpoint. If it is a Hugging Face folder, "
            f"convert it first: `polarjax convert {path} DST`"
        ) from None
    check_text(path, CONFIG_FILE, text, _checksums(path))
    return config, learned


def read_folder(
    path: str | Path,
    dtype=None,
    place: Place | None = None,
    check: Callable[[Params], None] | None = None,
    policy: Callable[[Learned], Policy] = lambda _: Dense(),
) -> Params:
    """Read a checkpoint folder, each device its own rows.

    Args:
      path: what `save` or `polarjax convert` wrote.
      dtype: of the weights in memory, or None for that of the file. Routers stay
        float32.
      place: where each weight goes; None for the default device. Routers go there in
        any case.
      check: called before any array is read, with `jax.ShapeDtypeStruct` in their
        places, as the files' headers have them; to raise ValueError.
      policy: makes the policy of what was learned; else the model has none.

    Raises:
      FileNotFoundError: if there is no such folder, or no checkpoint in it.
      ValueError: if the checkpoint is damaged or of another format.
    """
    path, dtype = Path(path), None if dtype is None else weight_dtype(dtype)
    config, learned = _read_description(path)

    def make(found: dict[str, dict[str, Any]]) -> Params:
        weights, routers = _trees(path, found)
        own = dataclasses.replace(learned, routers=routers)
        return Params(weights, policy(own), config)

    sums = _checksums(path)
    files = {name: value for name, value in sums.items() if name != CONFIG_FILE}
    try:
        found = _shapes(path, files)
        if check:
            check(make(found))
    except ValueError:
        check_files(path, files, REASON_BYTES)  # damage is the better reason
        raise
    [here] = jnp.zeros(()).devices()  # whichever way JAX was told
    default = Placement(SingleDeviceSharding(here))
    for name in files:
        # What was read for its checksum is then still in memory.
        check_files(path, {name: files[name]})
        with open_tensors(path / name) as tensors:
            for full in tensors.keys():
                part, _, leaf = full.partition("/")
                rows, weight = tensors.get_slice(full), part == _WEIGHTS
                shape = found[part][leaf].shape
                where = place(leaf, shape, config) if place and weight else default
                kind = dtype if weight else None
                with np.errstate(over="ignore"):  # `_read` refuses it by name
                    found[part][leaf] = _read(full, rows, shape, where, kind)
    return make(found)


def _checksums(path: Path) -> dict[str, str]:
    """Of the files of tensors, in their order, and of the description.

    Raises:
      FileError: if they are not named as they are written.
    """
    sums = read_checksums(path)
    names = [name for name in sums if name != CONFIG_FILE]  # older ones lack it
    if not names:
        raise FileError(f"{path} is damaged: {CHECKSUMS_FILE} names no files")
    for i, name in enumerate(names, 1):
        if name != TENSORS.format(f"{i:05}"):
            raise FileError(f"{path} is damaged: {CHECKSUMS_FILE} names {name[:99]!r}")
    return sums


def _shapes(path: Path, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the headers say, by part and by path in its tree."""
    found: dict[str, dict[str, Any]] = {_WEIGHTS: {}, _ROUTERS: {}}
    for file in files:
        with open_tensors(path / file) as tensors:
            shapes = shapes_of(tensors, path / file, ("F32", "BF16", "F16"))
        for name, shape in shapes.items():
            part, _, leaf = name.partition("/")
            if part not in found or leaf in found[part]:
                raise FileError(f"{path / file} is damaged: it holds {name!r}")
            found[part][leaf] = shape
    return found


def _trees(path: Path, found: dict[str, dict[str, Any]]) -> tuple[Tree, Tree]:
    try:
        weights, routers = (unflatten_dict(tree, sep="/") for tree in found.values())
    except (TypeError, IndexError):  # a name that continues another
        raise FileError(f"{path} is damaged: its tensors make no tree") from None
    return weights, routers


def _read(
    name: str, rows: Any, shape: tuple[int, ...], where: Placement, dtype
) -> jax.Array:
    order = where.rows

    def part(index: Any) -> np.ndarray:
        array = rows[index] if order is None else picked(order[index[0]], index[1:])
        return array if dtype is None else narrowed(name, array, dtype)

    def picked(wanted: np.ndarray, others: tuple) -> np.ndarray:
        # What lies behind one another is read at once.
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        parts = [rows[(slice(run[0], run[-1] + 1), *others)] for run in runs]
        return np.concatenate(parts)

    if order is not None:
        shape = (len(order), *shape[1:])
    return jax.make_array_from_callback(shape, where.sharding, part)


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
