"""Whether a model is the one that an adapter was learned on.

A model's hash is over the file that it was converted from: the same weights have
another one when they come from another format. So an adapter also keeps a sample of the
weights, the same entries for every model of the same shapes, and a model is the same if
it has these numbers *within rounding of their dtypes*: for every sampled pair a and b,

    |a - b| <= max(eps_a, eps_b) * max(|a|, |b|) + tiny

where eps is the distance from 1 to the next number of the dtype that each model had in
memory (2**-7 for bfloat16, 2**-10 for float16, 2**-23 for float32), and tiny the sum of
the dtypes' smallest numbers. Rounding a number to either dtype, or to both one after
the other, moves it by no more; another quantisation, or training, moves some of
thousands of entries by more.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from polarjax.mesh.cut import first_rows, mesh_of, model_shapes
from polarjax.mesh.processes import to_host
from polarjax.params import Params
from polarjax.storage.files import FileError, parse_json
from polarjax.storage.folder import write_tensors
from polarjax.storage.tensors import DTYPES, open_tensors, shapes_of

FINGERPRINT_FILE = "fingerprint.safetensors"
SAMPLES = 32  # of each weight
# Of the numbers by root mean square: what 4-bit quantisation or fine-tuning changes.
# Models that have nothing in common are 1.4 apart.
KIN = 0.15


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A sample of a model's weights.

    Attributes:
      dtype: of the weights in memory.
      shapes: of all weights, by their paths joined by "/".
      values: float32[n], n at most `SAMPLES`, of each.
    """

    dtype: str
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, np.ndarray]

    @classmethod
    def of(cls, params: Params) -> Fingerprint:
        """That of a model, on any devices; of several processes all must call it."""
        mesh, config = mesh_of(params.weights), params.config
        leaves: dict[str, Any] = flatten_dict(params.weights, sep="/")
        models: Any = flatten_dict(model_shapes(params.weights, config), sep="/")
        shapes = {name: tuple(leaf.shape) for name, leaf in models.items()}
        values = {}
        for name, leaf in leaves.items():
            rows, *others = entries(shapes[name])
            if mesh is not None and re.search(r"attention/qkv(_bias)?$", name):
                rows = first_rows(config, mesh)[rows]
            values[name] = leaf[(rows, *others)]
        found = {name: x.astype(np.float32) for name, x in to_host(values).items()}
        return cls(str(params.dtype), shapes, found)

    def save(self, file: Path) -> None:
        """Write it into a folder of ours."""
        shapes = json.dumps(self.shapes)
        write_tensors(file, self.values, {"dtype": self.dtype, "shapes": shapes})

    @classmethod
    def load(cls, file: Path) -> Fingerprint:
        """Read what `save` wrote.

        Raises:
          FileError: if it is damaged.
        """
        with open_tensors(file) as tensors:
            facts = tensors.metadata() or {}
            held = shapes_of(tensors, file, ("F32",))
            shapes = parse_json(facts.get("shapes", ""), f"{file}: shapes")
            dtype = facts.get("dtype")
            known = [str(kind) for kind in DTYPES.values()]
            if dtype not in known or held.keys() != shapes.keys():
                raise FileError(f"{file} is damaged: its names do not belong together")
            for name, shape in shapes.items():
                sizes = isinstance(shape, list) and all(type(n) is int for n in shape)
                if not sizes or not shape or not all(0 < n < 2**48 for n in shape):
                    raise FileError(f"{file} is damaged: shape {shape!r} of {name}")
                count = min(SAMPLES, math.prod(shape))
                if held[name].shape != (count,):
                    raise FileError(f"{file} is damaged: {name} is {held[name].shape}")
            values = {name: tensors.get_tensor(name) for name in held}
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise FileError(f"{file}: {name} holds NaN or infinity")
        return cls(dtype, {n: tuple(shape) for n, shape in shapes.items()}, values)

    def difference(self, other: Fingerprint) -> str:
        """How another model differs; empty if it is the same within rounding.

        Args:
          other: its fingerprint.

        Returns:
          A clause for a message.
        """
        for name in sorted(self.shapes.keys() | other.shapes.keys()):
            one, two = self.shapes.get(name), other.shapes.get(name)
            if one != two:
                return f"its {name} has shape {_words(one)}, this model's {_words(two)}"
        kinds = [jnp.finfo(kind) for kind in (self.dtype, other.dtype)]
        eps = max(float(kind.eps) for kind in kinds)
        tiny = sum(float(kind.smallest_subnormal) for kind in kinds)
        same, squares = True, []
        for name, a in self.values.items():
            a, b = a.astype(np.float64), other.values[name].astype(np.float64)
            size = np.maximum(abs(a), abs(b))
            # Not the other way round: NaN is not the same.
            same &= bool((abs(a - b) <= eps * size + tiny).all())
            norm = np.linalg.norm(a) + np.linalg.norm(b)
            squares.append((2 * np.linalg.norm(a - b) / norm) ** 2 if norm else 0.0)
        if same:
            return ""
        distance = math.sqrt(np.mean(squares))
        kin = "another quantisation or fine-tune of the same model"
        looks = f", so it looks like {kin}" if distance <= KIN else ""
        return f"sampled weights differ by {100 * distance:.3g} %{looks}"


def entries(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Which entries of a weight are sampled: spread over its rows and columns.

    Args:
      shape: of the weight.

    Returns:
      int64[n] for each axis, n = min(SAMPLES, entries).
    """
    count, rest = min(SAMPLES, math.prod(shape)), math.prod(shape[1:])
    if count < SAMPLES:  # all of them
        return np.unravel_index(np.arange(count), shape)
    i = np.arange(count)
    rows = (2 * i + 1) * shape[0] // (2 * count)
    # Multiples of the golden ratio, in integers so that they are the same everywhere.
    columns = ((i + 1) * 2654435769 % 2**32 * rest) >> 32
    others = np.unravel_index(columns, shape[1:]) if len(shape) > 1 else ()
    return (rows, *others)


def _words(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
