"""safetensors files that others wrote: the header is judged before the data is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from polarjax.storage.files import FileError, check_file

# 30,000 tensors take about 4 MB; parsed, several times as much.
LARGEST_HEADER = 4 << 20  # bytes
TENSORS = "tensors-{}.safetensors"  # the files of a checkpoint
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, as `safetensors.safe_open` opens it.

    Args:
      file: a regular one.

    Raises:
      FileError: if it is none, or damaged.
    """
    size = check_file(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= min(size - 8, LARGEST_HEADER):
        raise FileError(
            f"{file} is damaged: it has {size} bytes, and says of its header {length} "
            f"(from 2 to {LARGEST_HEADER} are possible)"
        )
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except SafetensorError as error:
        raise FileError(f"{file} is damaged: {error}") from None


def shapes_of(
    tensors: Any, file: Path, names: tuple[str, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a file's header says of its tensors.

    Args:
      tensors: of `open_tensors`.
      file: of them, for messages.
      names: of the dtypes that they may have, out of `DTYPES`.

    Returns:
      Shape and dtype by name.

    Raises:
      FileError: naming a tensor of another dtype.
    """
    found = {}
    for name in tensors.keys():
        part = tensors.get_slice(name)
        kind = part.get_dtype()
        if kind not in names:
            words = ", ".join(str(DTYPES[right]) for right in names)
            raise FileError(
                f"{file}: {name} is {_word(kind)}, but must be one of {words}"
            )
        found[name] = jax.ShapeDtypeStruct(tuple(part.get_shape()), DTYPES[kind])
    return found


def _word(kind: str) -> str:
    """As numpy calls it."""
    known = {"F": "float", "I": "int", "U": "uint", "C": "complex", "BF": "bfloat"}
    letters = kind.rstrip("0123456789")
    number = kind[len(letters) :]
    return known[letters] + number if letters in known and number else kind.lower()


def weight_dtype(dtype: Any) -> Any:
    """A dtype that weights may have in memory.

    Args:
      dtype: its name, or whatever else numpy takes for it.

    Raises:
      ValueError: if it is another.
    """
    known = sorted(str(kind) for kind in DTYPES.values())
    try:
        name = str(jnp.dtype(dtype))
    except TypeError:
        name = repr(dtype)
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name}")
    return jnp.dtype(name)


def narrowed(name: str, array: np.ndarray, dtype) -> np.ndarray:
    """An array in another dtype, if its numbers are no larger than that has them.

    Args:
      name: of the tensor, for the message.
      array: of floats.
      dtype: the other one.

    Raises:
      ValueError: naming the tensor and its largest number.
    """
    found = array.astype(dtype)
    if np.isinf(found).any() and np.isfinite(array).all():
        wide = array.astype(np.float32)
        raise ValueError(
            f"{name} has values up to {np.abs(wide).max():g}, more than "
            f"{jnp.dtype(dtype)} holds: load it as bfloat16 or float32"
        )
    return found
