"""Adapters: trained routers and their budgets in a small folder of their own.

`routers.safetensors` holds arrays named by their path in `Params.routers`, float32 for
the linear layers of heads and bfloat16 for the rest, which is much and used in 16 bit
anyway; `card.json` says for people and for `load_adapter` what they were trained for.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file

from polarjax.config import ModelConfig, tuple_neuron_budgets
from polarjax.folder import CARD_FILE, new_folder, write_tensors
from polarjax.params import Params, Tree, check_finite
from polarjax.sharding import mesh_of, model_shapes, whole_routers, writes
from polarjax.sparsity.neurons import check_neuron_budgets
from polarjax.sparsity.routers import check_routers

ADAPTER_FORMAT = 1
ROUTERS_FILE = "routers.safetensors"


def save_adapter(
    path: str | Path,
    params: Params,
    card: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write the routers and budgets of `params`, whole or not at all.

    Of several processes all must call it, and process 0 writes.

    Args:
      path: the folder to make.
      params: a model with routers, `config.budgets` and, where it has neuron routers,
        `config.neuron_budgets`; what is written does not depend on its devices.
      card: what else to say in the card (training data, recall); JSON values.
      overwrite: replace what is there.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten.
      ValueError: if the routers or budgets do not fit the model, or hold NaN.
    """
    shapes = model_shapes(params.weights, params.config)
    routers = whole_routers(params)
    _check(routers, shapes, params.config)
    stored = as_stored(routers)
    tensors = {
        name: jax.device_get(leaf)
        for name, leaf in traverse_util.flatten_dict(stored, sep="/").items()
    }
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"router {name} holds NaN or infinity: its training went astray; lower "
                "the learning rate"
            )
    if not writes(mesh_of(params.weights)):
        return
    facts = {
        "format_version": ADAPTER_FORMAT,
        "model_hash": params.config.model_hash,
        "budgets": list(params.config.budgets),
        "adaptive": params.config.adaptive,
        "neuron_budgets": params.config.neuron_budgets,
        "thresholds": list(params.config.thresholds),
        "kv_heads": params.config.kv_heads,
    }
    with new_folder(path, overwrite) as partial:
        write_tensors(partial / ROUTERS_FILE, tensors)
        text = json.dumps({**(card or {}), **facts}, indent=2)
        (partial / CARD_FILE).write_text(text + "\n", encoding="utf-8")


def as_stored(routers: Tree) -> Tree:
    """Routers in the dtypes that an adapter keeps: what shall be measured.

    Args:
      routers: as in `Params.routers`.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        linear = path[1].key == "heads" and path[2].key in ("weight", "bias")
        return leaf.astype(jnp.float32 if linear else jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(cast, routers)


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of an adapter.

    Raises:
      FileNotFoundError: if there is no adapter.
      ValueError: if its card is damaged or of another format.
    """
    path = Path(path)
    if not (path / CARD_FILE).exists() or not (path / ROUTERS_FILE).exists():
        raise FileNotFoundError(
            f"no adapter at {path}: it should hold {CARD_FILE} and {ROUTERS_FILE}, as "
            "`polarjax calibrate` writes them"
        )
    try:
        card = json.loads((path / CARD_FILE).read_text(encoding="utf-8"))
        version, _ = card["format_version"], card["model_hash"]
        card["budgets"] = list(card["budgets"])
        # Cards of older adapters have none.
        card["thresholds"] = tuple(map(float, card.get("thresholds", ())))
        found = card.get("neuron_budgets", ())
        card["neuron_budgets"] = tuple_neuron_budgets(found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / CARD_FILE} is no adapter card: {error}") from error
    if version != ADAPTER_FORMAT:
        raise ValueError(
            f"{path} has adapter format {version!r}, this polarjax reads "
            f"{ADAPTER_FORMAT}: calibrate again"
        )
    return card


def load_adapter(params: Params, path: str | Path) -> Params:
    """Give a model the routers of an adapter.

    Args:
      params: the model.
      path: a folder that `save_adapter` wrote.

    Returns:
      The model with `routers`, `config.budgets` and `config.neuron_budgets`.

    Raises:
      FileNotFoundError: if there is no adapter.
      ValueError: if it is damaged, or was made for another model.
    """
    card, path = read_card(path), Path(path)
    if card["model_hash"] != params.config.model_hash:
        raise ValueError(
            f"adapter {path} was made for another model (hash "
            f"{str(card['model_hash'])[:12]}, this one is "
            f"{params.config.model_hash[:12] or 'unknown'}): calibrate this model with "
            "`polarjax calibrate`"
        )
    try:
        flat = load_file(path / ROUTERS_FILE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / ROUTERS_FILE} is damaged: {error}") from error
    for name, array in flat.items():
        check_finite(f"router {name}", array)
    try:
        tree = traverse_util.unflatten_dict(flat, sep="/")
    except (TypeError, IndexError) as error:  # one name continues another
        raise ValueError(f"{path / ROUTERS_FILE} is damaged: {error}") from error
    config = dataclasses.replace(
        params.config,
        budgets=tuple(card["budgets"]),
        adaptive=card.get("adaptive") is True,
        neuron_budgets=card["neuron_budgets"],
        thresholds=card["thresholds"],
    )
    _check(tree, params.weights, config)
    routers: Tree = jax.tree.map(jnp.asarray, tree)
    return Params(params.weights, routers, config)


def _check(routers: Tree, weights: Tree, config: ModelConfig) -> None:
    check_routers(routers, weights, config)
    for layer in range(1, config.layers):
        if f"layers_{layer}" not in routers:
            raise ValueError(f"the adapter has no router for layer {layer}")
    k, budgets = config.kv_heads, config.budgets
    right = all(type(n) in (int, float) and 1 <= n <= k for n in budgets)
    if len(budgets) != config.layers or not right or budgets[0] != k:
        raise ValueError(
            f"the adapter has budgets {budgets}: they must be {config.layers} numbers "
            f"from 1 to {k}, the first of them {k}, as layer 0 is dense"
        )
    thresholds = config.thresholds
    finite = len(thresholds) == config.layers and all(map(math.isfinite, thresholds))
    if config.adaptive and not thresholds:
        raise ValueError(
            "the adapter's budgets are means over tokens, which need thresholds: it "
            "has none"
        )
    if not config.adaptive and any(type(n) is not int for n in budgets):
        raise ValueError(
            f"the adapter has budgets {budgets}: what is no whole number must be a "
            'mean over tokens, with "adaptive": true'
        )
    if thresholds and not finite:
        raise ValueError(
            f"the adapter has thresholds {thresholds}: they must be {config.layers} "
            "finite numbers"
        )
    check_neuron_budgets(config)
    for layer in range(1, config.layers) if config.neuron_budgets else ():
        if "neurons" not in routers[f"layers_{layer}"]:
            raise ValueError(
                f"the adapter has neuron budgets but no neuron router for layer {layer}"
            )
