"""Random weights and routers in the shapes of a model.

Times depend on shapes and not on what the weights are, so nothing is downloaded.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from polarjax import ModelConfig, Params, load
from polarjax.bench.meshes import drawn_apart
from polarjax.bench.shapes import layers_alone, parse_model
from polarjax.mesh.cut import TP, placement, router_spec
from polarjax.model import weight_shapes
from polarjax.params import Placement
from polarjax.policies import of_learned, routers, with_density, with_learned
from polarjax.policy import Learned

NEURON_RANK = 1024  # of neuron routers, as in the paper


def load_model(
    model: str,
    adapter: str | None,
    dtype: Any,
    head_rank: int,
    mesh: Mesh | None = None,
    any_model: bool = False,
) -> Params:
    """Random weights, or those of a checkpoint, on one device or cut over several.

    Args:
      model: a name in `polarjax.bench.shapes`, or a checkpoint.
      adapter: of the checkpoint; None for routers by chance.
      dtype: of everything.
      head_rank: of random head routers' quadratic form; 0 for none.
      mesh: that the model is cut over; None for one device.
      any_model: whether to take the adapter although it was learned on other weights.
    """
    found = parse_model(model)
    if found is None:
        params = load(
            model, adapter=adapter, dtype=dtype, mesh=mesh, any_model=any_model
        )
        if adapter:
            return params
        drawn = random_routers(params.config, params.dtype, head_rank, mesh)
        return with_learned(params, routers=drawn)
    config, count = found
    if count:
        config = layers_alone(config, count)
    params = random_params(
        config, dtype, head_rank=head_rank, alone=bool(count), mesh=mesh
    )
    return with_density(params, 0.5)


def random_params(
    config: ModelConfig,
    dtype,
    *,
    head_rank: int = 0,
    alone: bool = False,
    mesh: Mesh | None = None,
) -> Params:
    """Weights and routers of the right shapes, made where they lie.

    Args:
      config: of the model.
      dtype: of everything.
      head_rank: of the head routers' quadratic form; 0 for none.
      alone: leave out embedding, layer 0, last norm and head (see `layers_alone`); a
        token table of one row stays, to say the dtype.
      mesh: that the model is cut over: each device makes its part. None for one.
    """
    shapes = weight_shapes(config, dtype)
    if alone:
        shapes = {f"layers_{i}": shapes[f"layers_{i}"] for i in range(1, config.layers)}
        shapes["embed"] = {"tokens": jax.ShapeDtypeStruct((1, config.dim), dtype)}

    def place(path: str, shape: tuple[int, ...]) -> Placement | None:
        return mesh and placement(path, shape, config, mesh)

    drawn = random_routers(config, dtype, head_rank, mesh)
    policy = of_learned(Learned(drawn))
    return Params(draw(shapes, 0, place), policy, config)


def random_routers(
    config: ModelConfig, dtype, head_rank: int = 0, mesh: Mesh | None = None
) -> dict:
    """Routers of layers 1 and up, as `random_params` has them."""

    def place(path: str, shape: tuple[int, ...]) -> Placement | None:
        if mesh is None:
            return None
        return Placement(NamedSharding(mesh, router_spec(path, shape, mesh.shape[TP])))

    return draw(router_shapes(config, dtype, head_rank), 1, place)


def router_shapes(config: ModelConfig, dtype, head_rank: int = 0) -> dict:
    """Routers of layers 1 and up, as a tree of `jax.ShapeDtypeStruct`."""
    relu = config.activation == "relu"
    neuron_rank = min(NEURON_RANK, config.dim) if relu else None
    shapes = routers.router_shapes(config, head_rank or None, neuron_rank)
    one = {
        part: {
            name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in leaves.items()
        }
        for part, leaves in shapes.items()
    }
    return {f"layers_{i}": one for i in range(1, config.layers)}


def draw(
    shapes: Any,
    seed: int,
    place: Callable[[str, tuple[int, ...]], Placement | None] = lambda *_: None,
) -> Any:
    """Random numbers of such shapes, made where they lie.

    Args:
      shapes: a tree of `jax.ShapeDtypeStruct`.
      seed: of the numbers.
      place: where each lies, by its path, joined by "/", and shape.
    """
    found, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys, leaves = jax.random.split(jax.random.key(seed), len(found)), []
    for key, (path, leaf) in zip(keys, found, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        where, shape = place(name, leaf.shape), leaf.shape
        if where is not None and where.rows is not None:
            shape = (len(where.rows), *shape[1:])
        sharding = where and where.sharding
        assert sharding is None or isinstance(sharding, NamedSharding)
        leaves.append(_normal(key, shape, leaf.dtype, sharding))
    return jax.tree.unflatten(tree, leaves)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # one program for each shape
def _normal(
    key: jax.Array, shape: tuple[int, ...], dtype, where: NamedSharding | None
) -> jax.Array:
    own = shape if where is None else where.shard_shape(shape)

    def normal(key: jax.Array) -> jax.Array:
        return 0.02 * jax.random.normal(key, own, dtype)

    return normal(key) if where is None else drawn_apart(normal, where)(key)
