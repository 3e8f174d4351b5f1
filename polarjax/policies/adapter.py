"""Adapters: trained routers and their budgets in a small folder of their own.

`routers.safetensors` holds arrays named by their path in `Params.routers`, float32 for
the linear layers of heads and bfloat16 for the rest, which is much and used in 16 bit
anyway; `card.json` says for people and for `load_adapter` what they were trained for,
`fingerprint.safetensors` on which weights (see `polarjax.policies.fingerprint`), and
`checksums.json` what the three are. Older adapters lack the last two.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from polarjax.config import ModelConfig
from polarjax.mesh.cut import (
    mesh_of,
    model_shapes,
    place_routers,
    whole_routers,
    writes,
)
from polarjax.params import Params, Tree, check_finite
from polarjax.policies.adaptive import Adaptive
from polarjax.policies.budgets import check_budgets, uniform_budgets
from polarjax.policies.card import card_text, read_card
from polarjax.policies.fingerprint import FINGERPRINT_FILE, Fingerprint
from polarjax.policies.polar import Polar
from polarjax.policies.routers import check_routers
from polarjax.policy import Dense, Learned, Policy
from polarjax.storage.checksums import (
    CHECKSUMS_FILE,
    REASON_BYTES,
    check_files,
    checksum,
    file_checksum,
    read_checksums,
    write_checksums,
)
from polarjax.storage.files import FileError, is_there
from polarjax.storage.folder import CARD_FILE, new_folder, write_tensors
from polarjax.storage.tensors import open_tensors, shapes_of

ROUTERS_FILE = "routers.safetensors"
FILES = (CARD_FILE, ROUTERS_FILE, FINGERPRINT_FILE, CHECKSUMS_FILE)


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
      params: a model whose policy has learned routers and budgets; what is written
        does not depend on its devices.
      card: what else to say in the card (training data, recall); JSON values.
      overwrite: replace what is there.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten.
      ValueError: if the routers or budgets do not fit the model, or hold NaN, or the
        card has a key that is none of a card's (see `polarjax.policies.card.Card`).
    """
    shapes = model_shapes(params.weights, params.config)
    learned = dataclasses.replace(params.policy.learned, routers=whole_routers(params))
    _check(learned, shapes, params.config)
    stored = as_stored(learned.routers)
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
    fingerprint = Fingerprint.of(params)
    facts = {
        "model_hash": params.config.model_hash,
        **learned.numbers(),
        "kv_heads": params.config.kv_heads,
    }
    text = card_text({**(card or {}), **facts})
    if not writes(mesh_of(params.weights)):
        return
    with new_folder(path, overwrite, CARD_FILE) as partial:
        write_tensors(partial / ROUTERS_FILE, tensors)
        fingerprint.save(partial / FINGERPRINT_FILE)
        names = (ROUTERS_FILE, FINGERPRINT_FILE)
        sums = {name: file_checksum(partial / name) for name in names}
        write_checksums(partial, {**sums, CARD_FILE: checksum(text.encode())})
        (partial / CARD_FILE).write_text(text, encoding="utf-8")


def as_stored(routers: Tree) -> Tree:
    """Routers in the dtypes that an adapter keeps: what shall be measured.

    Args:
      routers: nested dict of arrays by layer, such as `layers_3/heads/weight`.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        linear = path[1].key == "heads" and path[2].key in ("weight", "bias")
        return leaf.astype(jnp.float32 if linear else jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(cast, routers)


def load_adapter(params: Params, path: str | Path, any_model: bool = False) -> Params:
    """Give a model the routers of an adapter.

    It must be the model that the adapter was learned on: its weights are, within
    rounding of their dtypes, those of which the adapter holds a sample (see
    `polarjax.policies.fingerprint`); or for an older adapter without one, its hash is
    the same.

    Args:
      params: the model, on any devices. Of several processes all must call it.
      path: a folder that `save_adapter` wrote.
      any_model: take the adapter for another model too, if only the shapes are right.

    Returns:
      The model with the adapter's policy.

    Raises:
      FileNotFoundError: if there is no adapter.
      ValueError: if it is damaged, or was made for another model.
    """
    path = Path(path)
    if not is_there(path / ROUTERS_FILE):
        raise FileNotFoundError(
            f"no adapter at {path}: it should hold {CARD_FILE} and {ROUTERS_FILE}, as "
            "`polarjax calibrate` writes them"
        )
    card = read_card(path)
    config = params.config
    learned = Learned(
        budgets=tuple(card["budgets"]),
        adaptive=card["adaptive"],
        neuron_budgets=card["neuron_budgets"],
        thresholds=card["thresholds"],
    )
    shapes = model_shapes(params.weights, params.config)
    files = _files(path)
    try:
        sample = None
        if is_there(path / FINGERPRINT_FILE):
            sample = Fingerprint.load(path / FINGERPRINT_FILE)
        if not any_model:
            _check_same(path, card["model_hash"], params, sample)
        tree = _read_routers(path / ROUTERS_FILE, shapes, config, learned)
        if card.get("kv_heads", config.kv_heads) != config.kv_heads:
            raise FileError(
                f"{path / CARD_FILE} is of a model with {card['kv_heads']} KV groups, "
                f"this one has {config.kv_heads}"
            )
    except ValueError as error:
        check_files(path, files, REASON_BYTES)  # damage is the better reason
        named = str(path) in str(error)
        raise FileError(f"{error}" if named else f"{path}: {error}") from None
    check_files(path, files)
    mesh = mesh_of(params.weights)
    routers = place_routers(jax.tree.map(jnp.asarray, tree), config, mesh)
    learned = dataclasses.replace(learned, routers=routers)
    return Params(params.weights, of_learned(learned), config)


def of_learned(learned: Learned) -> Policy:
    """The policy that an adapter is for: by thresholds where its budgets are means."""
    if not learned.routers and not any(learned.numbers().values()):
        return Dense()
    return Adaptive(learned=learned) if learned.adaptive else Polar(learned=learned)


def with_learned(params: Params, **changes: Any) -> Params:
    """The model with another policy of its adapter.

    Args:
      params: the model.
      **changes: fields of `polarjax.policy.Learned` in place of the adapter's.
    """
    learned = dataclasses.replace(params.policy.learned, **changes)
    return dataclasses.replace(params, policy=of_learned(learned))


def with_density(params: Params, density: float) -> Params:
    """The model with uniform budgets, and no thresholds, in place of its adapter's.

    Args:
      params: the model.
      density: fraction of the KV groups to read from layer 1 on.
    """
    budgets = uniform_budgets(params.config, density)
    return with_learned(params, budgets=budgets, adaptive=False, thresholds=())


def _files(path: Path) -> dict[str, str]:
    """Checksums of the files of tensors; none in older adapters.

    Raises:
      FileError: if others are named.
    """
    if not is_there(path / CHECKSUMS_FILE):
        return {}
    sums = read_checksums(path)
    names = {CARD_FILE, ROUTERS_FILE, FINGERPRINT_FILE}
    if sums.keys() - names or ROUTERS_FILE not in sums:
        raise FileError(
            f"{path} is damaged: {CHECKSUMS_FILE} names {', '.join(sums) or 'no files'}"
        )
    return {name: value for name, value in sums.items() if name != CARD_FILE}


def _check_same(
    path: Path, learned_on: str, params: Params, sample: Fingerprint | None
) -> None:
    """Raise unless the model is the one that the adapter was learned on."""
    own = params.config.model_hash
    if sample:  # weights may have changed since the hash of their source was taken
        reason = sample.difference(Fingerprint.of(params))
        if not reason:
            return
    elif own and learned_on == own:
        return
    else:
        reason = "it has no sample of that model's weights to compare"
    raise FileError(
        f"adapter {path} was made for another model (hash {learned_on[:12]}, this one "
        f"is {own[:12] or 'unknown'}; {reason}): calibrate this model with `polarjax "
        "calibrate`, or take the adapter all the same with any_model=True "
        "(--any-model)"
    )


def _read_routers(
    file: Path, shapes: Tree, config: ModelConfig, learned: Learned
) -> Tree:
    """Routers that fit the model, as numpy."""
    with open_tensors(file) as tensors:
        held = shapes_of(tensors, file, ("F32", "BF16"))
        try:
            tree: Tree = traverse_util.unflatten_dict(held, sep="/")
        except (TypeError, IndexError) as error:  # one name continues another
            raise FileError(f"{file} is damaged: {error}") from None
        _check(dataclasses.replace(learned, routers=tree), shapes, config)
        flat = {name: tensors.get_tensor(name) for name in held}
    for name, array in flat.items():
        check_finite(f"router {name}", array)
    return traverse_util.unflatten_dict(flat, sep="/")


def _check(learned: Learned, weights: Tree, config: ModelConfig) -> None:
    routers = learned.routers
    check_routers(routers, weights, config)
    for layer in range(1, config.layers):
        if f"layers_{layer}" not in routers:
            raise ValueError(f"the adapter has no router for layer {layer}")
    check_budgets(config, learned)
    for layer in range(1, config.layers) if learned.neuron_budgets else ():
        if "neurons" not in routers[f"layers_{layer}"]:
            raise ValueError(
                f"the adapter has neuron budgets but no neuron router for layer {layer}"
            )
