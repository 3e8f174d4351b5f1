"""`polarjax.load`: a checkpoint, with an adapter if wanted, from here or the hub."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from polarjax.config import FORMAT_VERSION, ModelConfig
from polarjax.mesh.cut import check_mesh, place_routers, placement
from polarjax.model import check_weights
from polarjax.params import Params, read_description, read_folder, taught
from polarjax.policies import load_adapter, read_card
from polarjax.policies.adapter import FILES, of_learned
from polarjax.policies.budgets import check_budgets
from polarjax.policies.routers import check_routers
from polarjax.settings import default_numbers
from polarjax.storage.files import FileError
from polarjax.storage.folder import CONFIG_FILE, locked
from polarjax.storage.repository import Repository
from polarjax.storage.siblings import check_ours
from polarjax.storage.tensors import TENSORS


@default_numbers
def load(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype=None,
    context: int | None = None,
    mesh: Mesh | None = None,
    any_model: bool = False,
) -> Params:
    """Load a model.

    A name that is no path here is an id of the Hugging Face hub: "org/name", or
    "org/name/file.gguf", each optionally with "@revision". Such a model is downloaded
    into the hub's own cache and converted, once for each commit, below
    `assets/polarjax` beside it (`HF_ASSETS_CACHE`).

    Args:
      path: a folder that `polarjax convert` or `polarjax.save` wrote, or an id; a
        `Path` is never an id.
      adapter: a folder that `polarjax calibrate` wrote, the name of an adapter that
        ships with the package ("smollm2-135m", "smollm2-135m-1pct"), or an id; None
        for none.
      dtype: of the weights in memory, None for that of the file; what is converted on
        the way becomes bfloat16 then.
      context: longest text in tokens, prompt and answer together; None for the
        checkpoint's. Learned positions allow no other; rotary ones go on, though not
        what the model has learned: a longer one than the checkpoint's is noted on
        stderr.
      mesh: with an axis "tp": each of its devices reads its own rows, as
        `polarjax.mesh.cut.shard` would cut them, and the model is whole nowhere. None
        for the default device.
      any_model: take an adapter that was learned on other weights, if its shapes are
        right. Else the model must have the adapter's own, within rounding of their
        dtypes (see `polarjax.policies.fingerprint`).

    Returns:
      The model, on its devices.

    Raises:
      FileNotFoundError: if there is no checkpoint or no such adapter.
      ValueError: if one of them is damaged, cannot be converted, or they do not belong
        together.
    """
    if any_model and adapter is None:
        raise ValueError("any_model (--any-model) goes with an adapter")
    folder = None if adapter is None else find_adapter(adapter)
    if folder:
        read_card(folder)  # before the work

    def check(shapes: Params) -> None:
        try:
            check_weights(shapes.weights, shapes.config)
            check_routers(shapes.routers, shapes.weights, shapes.config)
            if any(shapes.policy.learned.numbers().values()):
                check_budgets(shapes.config, shapes.policy.learned)
        except ValueError as error:
            raise FileError(f"{path}: {error}") from None
        if mesh:
            check_mesh(mesh, shapes.config)

    place = partial(placement, mesh=mesh) if mesh else None
    folder_of = find_checkpoint(path, dtype)
    params = read_folder(folder_of, dtype, place, check, of_learned)
    if context is not None:
        params = _with_context(params, context)
    if folder:
        return load_adapter(params, folder, any_model)
    return taught(params, place_routers(params.routers, params.config, mesh))


def _with_context(params: Params, context: int) -> Params:
    config = params.config.with_context(context)
    if context > params.config.context:
        print(
            f"note: a context of {context:,} tokens: the checkpoint's is "
            f"{params.config.context:,}, and what the model makes of longer texts is "
            "not known",
            file=sys.stderr,
        )
    return dataclasses.replace(params, config=config)


def read_config(path: str | Path) -> ModelConfig:
    """What the model is that `load` would load.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if its description is damaged.
    """
    return read_description(find_checkpoint(path))


def find_checkpoint(path: str | Path, dtype=None) -> Path:
    """Folder of a checkpoint: a path wins over an id of the hub; see `load`."""
    if path == "":  # which `Path` takes for the folder that it is called in
        raise ValueError("the checkpoint is '': name its folder, or an id of the hub")
    if isinstance(path, Path) or Path(path).exists():
        return Path(path)
    repository = Repository.parse(path, f"no checkpoint folder at {path}")
    if not repository.file and repository.is_checkpoint():
        return repository.download("*.json", "*.jinja", TENSORS.format("*"))
    check_ours("convert")
    from convert import convert  # which imports this package
    from convert.hub import download, texts

    kind = "bfloat16" if dtype is None else str(jnp.dtype(dtype))
    # A cache without a network may have the weights before it has the tokenizer.
    files = [repository.file] if repository.file else texts(repository)
    key = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    place = repository.assets() / f"{kind}-{FORMAT_VERSION}" / key
    folder = place / (Path(repository.file).stem or Path(repository.name).name)
    if (folder / CONFIG_FILE).exists():
        return folder
    with _alone_in(place, path):
        if not (folder / CONFIG_FILE).exists():
            convert(download(repository), folder, dtype=kind)
    return folder


@contextlib.contextmanager
def _alone_in(place: Path, name: str) -> Iterator[None]:
    """Wait while another process converts the same."""
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not locked(handle):
            print(
                f"note: another process is converting {name}: waiting for it",
                file=sys.stderr,
            )
            while not locked(handle):
                time.sleep(0.1)  # seconds
        yield
    finally:
        os.close(handle)


def find_adapter(name: str | Path) -> Path:
    """Folder of an adapter: a path wins over one that ships, and that over the hub."""
    path = Path(name)
    if path.exists():
        return path
    shipped = Path(str(resources.files("polarjax"))) / "adapters"
    if (shipped / name).is_dir():
        return shipped / name
    names = sorted(p.name for p in shipped.glob("*") if p.is_dir())
    missing = (
        f"no adapter at {name}, and the package ships none of that name: it has "
        f"{', '.join(names) or 'none'}"
    )
    if isinstance(name, Path):
        raise FileNotFoundError(missing)
    repository = Repository.parse(name, missing)
    if repository.file:
        raise FileNotFoundError(
            f"{missing}; on the hub an adapter is a repository (org/name), not a file "
            "in one"
        )
    return repository.download(*FILES)
