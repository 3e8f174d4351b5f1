"""`polarjax.load`: a checkpoint folder, with an adapter if wanted."""

from __future__ import annotations

import dataclasses
from functools import partial
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from polarjax.folder import CARD_FILE
from polarjax.model import weight_shapes
from polarjax.params import Params, read_folder
from polarjax.sharding import replicate, sharding
from polarjax.sparsity import load_adapter, read_card
from polarjax.sparsity.adapter import ROUTERS_FILE
from polarjax.sparsity.routers import check_routers


def load(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype=None,
    mesh: Mesh | None = None,
) -> Params:
    """Load a converted model.

    Args:
      path: a folder that `python -m convert` or `polarjax.save` wrote.
      adapter: a folder that `polarjax calibrate` wrote, or the name of an adapter that
        ships with the package ("smollm2-135m"); None for none.
      dtype: of the weights in memory, None for that of the file.
      mesh: with an axis "tp": each of its devices reads its own rows, as
        `polarjax.sharding.shard` would cut them, and the model is whole nowhere. None
        for the default device.

    Returns:
      The model, on its devices.

    Raises:
      FileNotFoundError: if there is no checkpoint or no such adapter.
      ValueError: if one of them is damaged, or they do not belong together.
    """
    params = read_folder(path, dtype, partial(sharding, mesh=mesh) if mesh else None)
    want = weight_shapes(params.config)
    if jax.tree.structure(want) != jax.tree.structure(params.weights):
        raise ValueError(f"{path}: its weights are not those of its config.json")
    pairs = jax.tree.leaves_with_path(want), jax.tree.leaves(params.weights)
    for (where, shape), leaf in zip(*pairs, strict=True):
        if shape.shape != leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{path}: {jax.tree_util.keystr(where)} is {leaf.dtype}"
                f"{list(leaf.shape)}, its config.json needs {list(shape.shape)}"
            )
    if adapter is None:
        check_routers(params.routers, params.weights, params.config)
    else:
        params = load_adapter(params, find_adapter(adapter))
    if mesh is None:
        return params
    return dataclasses.replace(params, routers=replicate(params.routers, mesh))


def find_adapter(name: str | Path) -> Path:
    """Folder of an adapter: a path wins over one that ships with the package."""
    path = Path(name)
    if path.exists():
        return path
    shipped = Path(str(resources.files("polarjax"))) / "adapters"
    if (shipped / name).is_dir():
        return shipped / name
    names = sorted(p.name for p in shipped.glob("*") if p.is_dir())
    raise FileNotFoundError(
        f"no adapter at {name}, and the package ships none of that name: it has "
        f"{', '.join(names) or 'none'}"
    )


def push_adapter(path: str | Path, repository: str) -> str:
    """Upload an adapter to a repository of the Hugging Face hub.

    Args:
      path: a folder that `polarjax calibrate` or `recover` wrote.
      repository: such as "name/smollm2-polar"; it is made if there is none.

    Returns:
      The address of the commit.

    Raises:
      FileNotFoundError: if there is no adapter.
      ValueError: if it is damaged, or `huggingface_hub` is not installed.
    """
    read_card(path)  # what is no adapter stays here
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError(
            "to push an adapter, install huggingface_hub (pip install huggingface_hub) "
            "and log in (hf auth login)"
        ) from None
    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    return str(
        api.upload_folder(
            repo_id=repository,
            folder_path=str(path),
            allow_patterns=[CARD_FILE, ROUTERS_FILE],
            commit_message="polarjax adapter",
        )
    )
