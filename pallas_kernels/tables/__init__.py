"""Measured configs: the entry of this device's table that serves a call, if any.

A table is a JSON file beside this module, named after the device kind, that
`python -m pallas_kernels.tuning.tune` fills. It says where a config was measured to be
faster than the kernel's heuristic; everything else is left to the heuristic. Nothing is
measured here.
"""

import dataclasses
import functools
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pallas_kernels._backend import traced_gpu
from pallas_kernels._sizes import ceil_power_of_two

# The sections of a table and the facts that an entry's shape consists of.
SHAPES = {
    "mlp": ("itemsize", "gated", "b", "m", "n"),
    "product": ("itemsize", "axis", "b", "m", "n"),
    "mlp_dense_above": ("itemsize", "gated", "b", "m", "f"),
}
_ABOUT = ("device", "jax")
# An entry's fields; the times, in microseconds, are for people.
_CONFIG_FIELDS = {"shape": dict, "config": dict, "us": float, "heuristic_us": float}
_DENSE_FIELDS = {"shape": dict, "fraction": float}

Shape = Mapping[str, int]
Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Table:
    """The entries of one device.

    Attributes:
        source: where they were read, for messages.
        device: device kind, as jax spells it.
        jax: version that they were measured with last.
        sections: by the names in `SHAPES`, the entries: {"shape": {...}, ...}.
    """

    source: str
    device: str
    jax: str
    sections: Mapping[str, tuple[Mapping[str, Any], ...]]

    def entry(self, section: str, shape: Shape) -> Mapping[str, Any] | None:
        """The entry of a shape."""
        found = (e for e in self.sections.get(section, ()) if e["shape"] == shape)
        return next(found, None)


def mlp_config(
    default: Config, *, b: int, n: int, m: int, gated: bool, itemsize: int
) -> Config:
    """The Triton MLP kernels' config on the default device.

    Args:
        default: the heuristic's, for shapes that were not measured.
        b: batch.
        n: selected neurons.
        m: model dim.
        gated: whether there is a third matrix.
        itemsize: bytes per element of the weights.
    """
    shape = mlp_shape(b=b, n=n, m=m, gated=gated, itemsize=itemsize)
    return lookup(shipped(device_kind()), "mlp", shape, default)


def product_config(
    default: Config, *, axis: int, b: int, n: int, m: int, itemsize: int
) -> Config:
    """The config of one product of a decode step on the default device.

    Args:
        default: the heuristic's, for shapes that were not measured.
        axis: of the matrix, that is summed over.
        b: batch.
        n: outputs.
        m: numbers of each input.
        itemsize: bytes per element.
    """
    shape = product_shape(axis=axis, b=b, n=n, m=m, itemsize=itemsize)
    return lookup(shipped(device_kind()), "product", shape, default)


def mlp_dense_above(
    *, b: int, m: int, f: int, gated: bool, itemsize: int
) -> float | None:
    """The fraction of the neurons above which the dense product was measured faster.

    1.0 where it never was; None if this shape was not measured on this device.
    """
    table = shipped(device_kind())
    shape = dense_shape(b=b, m=m, f=f, gated=gated, itemsize=itemsize)
    entry = table.entry("mlp_dense_above", shape) if table else None
    return None if entry is None else entry["fraction"]


def mlp_shape(*, b: int, n: int, m: int, gated: bool, itemsize: int) -> dict[str, int]:
    """The bucket of an MLP call: the batch up to the next power of two, else exact.

    A config cuts n and m into one even wave of programs: for another n it may leave
    half of the device idle.
    """
    return {
        "itemsize": itemsize,
        "gated": int(gated),
        "b": ceil_power_of_two(b),
        "m": m,
        "n": n,
    }


def product_shape(
    *, axis: int, b: int, n: int, m: int, itemsize: int
) -> dict[str, int]:
    """The bucket of a product: the batch up to the next power of two.

    And outputs down to a multiple of 128: a router's few rows change no wave.
    """
    batch, outputs = ceil_power_of_two(b), max(n // 128 * 128, min(n, 128))
    return {"itemsize": itemsize, "axis": axis, "b": batch, "m": m, "n": outputs}


def dense_shape(
    *, b: int, m: int, f: int, gated: bool, itemsize: int
) -> dict[str, int]:
    """The bucket of an MLP whatever is selected: the batch to a power of two."""
    return {
        "itemsize": itemsize,
        "gated": int(gated),
        "b": ceil_power_of_two(b),
        "m": m,
        "f": f,
    }


def device_kind() -> str | None:
    """The kind of the GPU that is traced for."""
    gpu = traced_gpu()
    return None if gpu is None else gpu.device_kind


def file_name(device_kind: str) -> str:
    """The file name of a device kind's table."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()) + ".json"


@functools.cache
def shipped(device_kind: str | None) -> Table | None:
    """The table that comes with the package, or None."""
    if device_kind is None:
        return None
    file = importlib.resources.files("pallas_kernels.tables") / file_name(device_kind)
    return (
        parse(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None
    )


def lookup(table: Table | None, section: str, shape: Shape, default: Config) -> Config:
    """The config of a shape's entry, or the default where there is none.

    Raises:
        ValueError: if the entry's config has not the fields and types of the default.
    """
    entry = table.entry(section, shape) if table else None
    if table is None or entry is None:
        return default
    where = f"{table.source}: the {section} entry for {dict(shape)}"
    plain: Any = default  # a dataclass
    config, wanted = entry["config"], dataclasses.asdict(plain)
    if set(config) != set(wanted):
        unknown, missing = set(config) - set(wanted), set(wanted) - set(config)
        raise ValueError(
            f"{where} must have the fields {sorted(wanted)}; unknown "
            f"{sorted(unknown)}, missing {sorted(missing)}"
        )
    for name, value in config.items():
        if type(value) is not type(wanted[name]):
            raise ValueError(
                f"{where} has {name} = {value!r}; it must be a "
                f"{type(wanted[name]).__name__}"
            )
    return dataclasses.replace(plain, **config)


def parse(text: str, source: str) -> Table:
    """Read a table and check its form.

    Args:
        text: JSON.
        source: names it in errors.

    Raises:
        ValueError: if it is no table; says where.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(data, dict) or not all(
        isinstance(data.get(a), str) for a in _ABOUT
    ):
        raise ValueError(f"{source} must be an object with the texts {list(_ABOUT)}")
    if unknown := sorted(set(data) - {*SHAPES, *_ABOUT}):
        raise ValueError(
            f"{source} has the unknown sections {unknown}; it may have {sorted(SHAPES)}"
        )
    sections = {name: data[name] for name in SHAPES if name in data}
    for section, entries in sections.items():
        if not isinstance(entries, list):
            raise ValueError(f"{source}: {section} must be a list of entries")
        seen = []
        for place, entry in enumerate(entries):
            where = f"{source}: entry {place} of {section}"
            _check_entry(section, entry, where)
            if entry["shape"] in seen:
                raise ValueError(f"{where} repeats the shape {entry['shape']}")
            seen.append(entry["shape"])
    frozen = {name: tuple(entries) for name, entries in sections.items()}
    return Table(source, data["device"], data["jax"], frozen)


def _check_entry(section: str, entry: Any, where: str) -> None:
    fields = _DENSE_FIELDS if section == "mlp_dense_above" else _CONFIG_FIELDS
    if not isinstance(entry, dict) or set(entry) != set(fields):
        raise ValueError(f"{where} must be an object with the fields {list(fields)}")
    for name, wanted in fields.items():
        if type(entry[name]) is not wanted:
            raise ValueError(
                f"{where} has {name} = {entry[name]!r}; it must be a {wanted.__name__}"
            )
    if set(entry["shape"]) != set(SHAPES[section]):
        raise ValueError(f"{where} must have a shape of {list(SHAPES[section])}")
    for name, value in entry["shape"].items():
        if type(value) is not int:
            raise ValueError(f"{where} has {name} = {value!r}; it must be an int")
    if "fraction" in entry and not 0.0 <= entry["fraction"] <= 1.0:
        raise ValueError(f"{where} has fraction = {entry['fraction']}, not in 0..1")
