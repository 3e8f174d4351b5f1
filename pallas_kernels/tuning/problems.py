"""What the tuner measures: a kernel at a shape, its inputs and its reference."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tables
from pallas_kernels.mlp import configs as mlp_configs
from pallas_kernels.mlp import gathered_mlp, partial_product
from pallas_kernels.mlp import triton as mlp_triton
from pallas_kernels.tuning.timing import calls_to_time, normal, sets_to_rotate

# What a chain of calls starts with, and the arguments of each.
Inputs = tuple[jax.Array, list[tuple]]


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A feed-forward layer on [b, m] that reads n of f neurons, plain or gated."""

    b: int
    m: int
    f: int
    n: int
    gated: int = 0
    dtype: str = "bfloat16"

    section: ClassVar[str] = "mlp"

    @property
    def facts(self) -> dict[str, Any]:
        """What the heuristic and the table go by."""
        itemsize = jnp.dtype(self.dtype).itemsize
        facts = {"b": self.b, "n": self.n, "m": self.m, "itemsize": itemsize}
        return {**facts, "gated": bool(self.gated)}

    @property
    def shape(self) -> dict[str, int]:
        """The table's key."""
        return tables.mlp_shape(**self.facts)

    @property
    def default(self) -> mlp_configs.Config:
        """The heuristic's config."""
        return mlp_configs.heuristic(**self.facts)

    def candidates(self) -> list[mlp_configs.Config]:
        """What the kernel itself proposes to try."""
        propose = getattr(mlp_configs, "candidates", None)
        return list(propose(**self.facts)) if propose else []

    def inputs(self, most: int) -> Inputs:
        """Random inputs, weights and selections for at most so many calls."""
        b, m, f, n = self.b, self.m, self.f, self.n
        rng = np.random.default_rng(0)
        scales = {"up": m**-0.5, "down": f**-0.5}  # a chain of calls keeps these
        if self.gated:
            scales["gate"] = m**-0.5
        nbytes = len(scales) * n * m * jnp.dtype(self.dtype).itemsize
        layers = []
        for i in range(min(most, sets_to_rotate(nbytes))):
            weights = {
                name: normal(3 * i + j, (f, m), self.dtype, scale)
                for j, (name, scale) in enumerate(scales.items())
            }
            if not self.gated:
                weights["up_bias"] = jnp.ones(f, self.dtype)
                weights["down_bias"] = jnp.ones(m, self.dtype)
            layers.append(weights)
        arguments = []
        for i in range(min(most, max(calls_to_time(nbytes), len(layers)))):
            neurons = np.sort(rng.permutation(f)[:n]).astype(np.int32)
            arguments.append((layers[i % len(layers)], jnp.asarray(neurons)))
        return normal(0, (b, m), self.dtype), arguments

    def function(self, config: Any, interpret: bool = False) -> Callable[..., Any]:
        """The call to time, of the reference if the config is None."""
        activation = "silu" if self.gated else "relu"

        def reference(x, weights, neurons):
            return gathered_mlp(
                x, weights, neurons, activation=activation, implementation="xla"
            )

        def call(x, weights, neurons):
            options = {"config": config, "interpret": interpret}
            return mlp_triton.mlp(x, weights, neurons, activation=activation, **options)

        return reference if config is None else call


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a decode step: b inputs of m numbers to n outputs.

    The matrix is [n, m], or [m, n] with axis 0.
    """

    b: int
    m: int
    n: int
    axis: int = 1
    dtype: str = "bfloat16"

    section: ClassVar[str] = "product"

    @property
    def facts(self) -> dict[str, int]:
        """What the heuristic and the table go by."""
        itemsize = jnp.dtype(self.dtype).itemsize
        facts = {"axis": self.axis, "b": self.b, "n": self.n, "m": self.m}
        return {**facts, "itemsize": itemsize}

    @property
    def shape(self) -> dict[str, int]:
        """The table's key."""
        return tables.product_shape(**self.facts)

    @property
    def default(self) -> mlp_configs.Config:
        """The heuristic's config."""
        return mlp_configs.product_config(**self.facts)

    def candidates(self) -> list[mlp_configs.Config]:
        """What the kernel itself proposes to try."""
        return mlp_configs.product_candidates(**self.facts)

    def inputs(self, most: int) -> Inputs:
        """Random inputs and matrices for at most so many calls."""
        shape = (self.n, self.m) if self.axis == 1 else (self.m, self.n)
        nbytes = self.n * self.m * jnp.dtype(self.dtype).itemsize
        matrices = [
            normal(i, shape, self.dtype, self.m**-0.5)
            for i in range(min(most, sets_to_rotate(nbytes)))
        ]
        calls = min(most, max(calls_to_time(nbytes), len(matrices)))
        arguments = [(matrices[i % len(matrices)],) for i in range(calls)]
        return normal(0, (self.b, self.m), self.dtype), arguments

    def function(self, config: Any, interpret: bool = False) -> Callable[..., Any]:
        """The call to time, of the reference if the config is None.

        The parts are added up, as whatever takes them would.
        """

        def finish(parts, x):
            out = parts.sum(axis=0).astype(x.dtype)[:, : self.m]
            return jnp.pad(out, ((0, 0), (0, self.m - out.shape[1])))

        def reference(x, matrix):
            options: Any = {"axis": self.axis, "implementation": "xla"}
            return finish(partial_product(x, matrix, **options), x)

        def call(x, matrix):
            options = {"config": config, "interpret": interpret}
            return finish(
                mlp_triton.partial_product(x, matrix, None, self.axis, **options), x
            )

        return reference if config is None else call


Problem = Mlp | Product
KINDS: tuple[type[Problem], ...] = (Mlp, Product)


def parse(text: str) -> Problem:
    """A problem from the words of a user, such as "mlp:b=1,m=4096,f=16384,n=1638".

    Raises:
        ValueError: if it is none; says what is missing or unknown.
    """
    name, _, rest = text.partition(":")
    kinds = {kind.section: kind for kind in KINDS}
    if name not in kinds:
        raise ValueError(f"{text!r} must begin with one of {[f'{k}:' for k in kinds]}")
    kind = kinds[name]
    values: dict[str, Any] = {}
    for part in rest.split(","):
        letter, _, value = part.partition("=")
        if letter != "dtype" and not value.isdecimal():
            raise ValueError(f"{text!r}: {part!r} is not a name = a whole number")
        values[letter] = value if letter == "dtype" else int(value)
    fields = dataclasses.fields(kind)
    needed = {f.name for f in fields if f.default is dataclasses.MISSING}
    if wrong := (needed - set(values)) | (set(values) - {f.name for f in fields}):
        raise ValueError(
            f"{text!r}: {sorted(wrong)} missing or unknown; {name} takes "
            f"{', '.join(f.name for f in fields)}"
        )
    return kind(**values)
