"""From an opened checkpoint to a folder, as a stream."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer

from convert.hub import locate
from convert.places import Place, find_places
from convert.readers import open_source
from convert.rules import context_notes, understand, unread
from convert.rules.rule import Rule
from convert.source import ConversionError, Source, SourceTensor, naming
from polarjax.config import ModelConfig
from polarjax.params import TOKENIZER_FILE, check_finite, new_checkpoint
from polarjax.storage.folder import check_destination, partial_of
from polarjax.terminal.output import bytes_bar, make_console

DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}

# Buffers that follow from the configuration: old LLaMA files hold the rotary
# frequencies, and GGUF's divisors are in the configuration by now.
_BUFFERS = ("rotary_emb.inv_freq", "rope_freqs.weight")
_EMBEDDING, _HEAD = "embed/tokens", "lm_head.weight"


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "bfloat16",
    context: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ModelConfig:
    """Convert a checkpoint into a folder that `polarjax.load` reads.

    The folder appears whole or not at all. Nothing is ever unpickled.

    Args:
      source: a Hugging Face folder with safetensors, a GGUF file (any part of one in
        parts), or an id of the hub (see `convert.hub.locate`).
      destination: the folder to make.
      dtype: of the weights: "bfloat16", "float16" or "float32".
      context: longest text in tokens; None for what the source says. Learned positions
        allow no other; see `ModelConfig.with_context`.
      overwrite: replace a checkpoint that is at `destination`.
      progress: show a bar on stderr, where that is a terminal.

    Returns:
      What the model is.

    Raises:
      ConversionError: if the source is damaged or not supported.
      FileExistsError: if the destination exists.
      FileNotFoundError: if an id is none, or cannot be had.
      OSError: if the disk is too small or cannot be written.
    """
    if dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    destination = Path(os.path.abspath(destination))
    if not Path(source).exists():  # a download may lie ahead
        check_destination(destination, overwrite)
    source = locate(source)
    _check_destination(source, destination, overwrite)
    opened = open_source(source)
    with naming(source):
        own, rules = understand(opened.config)
        config = own if context is None else with_context(own, context)
        plan = _plan(opened, config, rules)
    ids, notes = token_ids(opened, config)
    notes += _tokenizer_notes(opened.files.get(TOKENIZER_FILE), config)
    notes = [
        *opened.notes,
        *unread(opened.config),
        *context_notes(opened.config, own, config.context),
        *notes,
    ]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    nbytes = (
        sum(map(math.prod, plan.shapes.values())) * np.dtype(DTYPES[dtype]).itemsize
    )
    with naming(source), new_checkpoint(destination, nbytes, overwrite) as checkpoint:
        model_hash = _stream(plan, DTYPES[dtype], checkpoint.add, progress)
        config = dataclasses.replace(config, model_hash=model_hash, **ids)
        checkpoint.finish(config, opened.files)
    return dataclasses.replace(config, folder=str(destination.absolute()))


def with_context(config: ModelConfig, context: int) -> ModelConfig:
    """As `ModelConfig.with_context`; raises ConversionError."""
    try:
        return config.with_context(context)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def _check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    # The destination and its temporary neighbour are deleted: neither may hold, or be,
    # the source.
    src = source.resolve()
    for path in (destination, partial_of(destination)):
        dst = path.resolve()
        if src == dst or dst in src.parents:
            raise ConversionError(f"writing {destination} would delete {source}")
        if src.is_dir() and src in dst.parents:
            raise ConversionError(f"{destination} lies inside {source}")
    check_destination(destination, overwrite)


def token_ids(source: Source, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The ids that start and end a text, but for those beyond the vocabulary.

    Args:
      source: the opened checkpoint.
      config: what the model is.

    Returns:
      `bos_ids` and `eos_ids` by name, and notes for the user.
    """
    kept: dict[str, Any] = {}
    notes = []
    for name in ("bos_ids", "eos_ids"):
        ids = getattr(source, name)
        kept[name] = tuple(i for i in ids if 0 <= i < config.vocab_size)
        if dropped := [i for i in ids if i not in kept[name]]:
            notes.append(
                f"{name} {dropped} left out: the vocabulary has {config.vocab_size}"
            )
    return kept, notes


def _tokenizer_notes(tokenizer: str | None, config: ModelConfig) -> list[str]:
    if tokenizer is None:
        return []
    ids = Tokenizer.from_str(tokenizer).get_vocab().values()
    if not ids or max(ids) < config.vocab_size:
        return []
    return [
        f"the tokenizer has ids up to {max(ids)}, but the vocabulary "
        f"{config.vocab_size}: texts that need the further ids will be refused"
    ]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What becomes of a source.

    Attributes:
      tensors: of the source, by stored name: the order that the hash is over.
      places: by the name of a source tensor.
      fills: by weight, one number for every entry.
      shapes: of all weights.
    """

    tensors: tuple[SourceTensor, ...]
    places: dict[str, Place]
    fills: dict[str, float]
    shapes: dict[str, tuple[int, ...]]


def _plan(source: Source, config: ModelConfig, rules: tuple[Rule, ...]) -> _Plan:
    if config.layers > len(source.tensors):  # before a tree of that many is made
        raise ConversionError(
            f"the configuration asks for {config.layers} layers, but the checkpoint "
            f"has only {len(source.tensors)} tensors"
        )
    places, fills, shapes = find_places(config, rules)
    source = _with_prefix(source, places)
    _check_coverage(source, places)
    tensors = sorted(source.tensors.values(), key=lambda tensor: tensor.stored_name)
    return _Plan(tuple(tensors), places, fills, shapes)


_Block = tuple[SourceTensor, slice, np.ndarray]  # rows of a tensor, as stored


def _stream(
    plan: _Plan, dtype: Any, add: Callable[[str, np.ndarray], None], progress: bool
) -> str:
    """Make each weight, hand it over, forget it; and hash the source on the way.

    The order of the hash keeps a layer's tensors together: what waits for its last
    part is a layer's queries, keys and values at most.
    """
    for name, value in plan.fills.items():
        add(f"weights/{name}", np.full(plan.shapes[name], value, dtype))
    digest = hashlib.sha256()
    waiting: Counter[str] = Counter()  # bytes that a weight still lacks
    for tensor in plan.tensors:
        if place := plan.places.get(tensor.name):
            waiting[place.target] += tensor.nbytes
    made: dict[str, np.ndarray] = {}
    with _progress_bar(plan, progress) as advance:
        for tensor, rows, raw in _ahead(_hashed_blocks(plan, digest)):
            if place := plan.places.get(tensor.name):
                name = place.target
                if name not in made:
                    made[name] = np.empty(plan.shapes[name], dtype)
                _put(tensor, raw, rows, place, made[name])
                waiting[name] -= raw.nbytes
                if not waiting[name]:
                    add(f"weights/{name}", made.pop(name))
            advance(tensor, raw.nbytes)
    return digest.hexdigest()


def _hashed_blocks(plan: _Plan, digest: Any) -> Iterator[_Block]:
    for tensor in plan.tensors:
        head = f"{tensor.stored_name}\0{tensor.kind}\0{list(tensor.shape)}\0"
        digest.update(head.encode())
        for rows, raw in tensor.blocks():
            digest.update(raw.data)
            yield tensor, rows, raw


def _ahead(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """The same; a thread reads and hashes one while the one before is converted."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, blocks, None)
        while block := coming.result():
            coming = pool.submit(next, blocks, None)
            yield block


def _with_prefix(source: Source, places: dict[str, Place]) -> Source:
    """Old checkpoints are of the model inside, whose tensors lack the prefix."""
    named = {}
    for name, tensor in source.tensors.items():
        full = f"model.{name}"
        if full in places and full not in source.tensors:
            tensor = dataclasses.replace(tensor, name=full)
        named[tensor.name] = tensor
    return dataclasses.replace(source, tensors=named)


def _check_coverage(source: Source, places: dict[str, Place]) -> None:
    """Every tensor has a place, every place a tensor, and the shapes agree."""
    for name, place in places.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            raise ConversionError(
                f"the checkpoint has no tensor {name}, which the configuration asks "
                f"for (shape {list(place.shape)})"
            )
        if tensor.shape != place.shape:
            raise ConversionError(
                f"{tensor.stored_name} has shape {list(tensor.shape)}, but the "
                f"configuration asks for {list(place.shape)}"
            )
    for name, tensor in source.tensors.items():
        if name in places or name.endswith(_BUFFERS):
            continue
        if name == _HEAD:
            _check_tied(source, places, tensor)
            continue
        raise ConversionError(
            f"the checkpoint has a tensor {tensor.stored_name} of shape "
            f"{list(tensor.shape)} that a model of this configuration does not have"
        )


def _check_tied(source: Source, places: dict[str, Place], head: SourceTensor) -> None:
    """A tied model's file may hold the head too, as a copy."""
    name = next(name for name, place in places.items() if place.target == _EMBEDDING)
    embedding = source.tensors[name]
    same = head.kind == embedding.kind and head.shape == embedding.shape
    pairs = zip(head.blocks(), embedding.blocks(), strict=True) if same else ()
    if not (same and all(np.array_equal(one[1], two[1]) for one, two in pairs)):
        raise ConversionError(
            f"the configuration ties the output head to the embedding, but {_HEAD} "
            f"differs from {name}: if the head is its own, set tie_word_embeddings to "
            "false"
        )


def _put(
    tensor: SourceTensor,
    raw: np.ndarray,
    rows: slice,
    place: Place,
    weight: np.ndarray,
) -> None:
    values = tensor.floats(raw, rows)
    try:
        check_finite(tensor.stored_name, values)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    part = weight[place.rows]
    part = part[:, rows] if place.transpose else part[rows]
    with np.errstate(over="ignore"):
        part[...] = values.T if place.transpose else values
    if values.dtype != part.dtype:
        check_range(tensor.stored_name, part)


def check_range(name: str, narrowed: np.ndarray) -> None:
    """Raise if finite numbers are finite no more.

    Args:
      name: of the tensor.
      narrowed: in the dtype that is written.

    Raises:
      ConversionError: naming both.
    """
    if not np.isfinite(narrowed).all():
        raise ConversionError(
            f"{name} has values beyond the range of {narrowed.dtype}: "
            "convert to bfloat16 or float32"
        )


@contextlib.contextmanager
def _progress_bar(
    plan: _Plan, shown: bool
) -> Iterator[Callable[[SourceTensor, int], None]]:
    """Yields what to call with a tensor and how many more bytes of it are read."""
    with bytes_bar("converting", make_console(stderr=True), shown) as bar:
        task = bar.add_task("", total=sum(tensor.nbytes for tensor in plan.tensors))
        yield lambda tensor, count: bar.update(
            task, description=tensor.stored_name, advance=count
        )
