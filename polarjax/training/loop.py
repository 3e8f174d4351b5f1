"""The one training loop: steps over blocks of text, that can be taken up again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polarjax.config import ModelConfig
from polarjax.mesh.cut import by_writer, put
from polarjax.planning.sizes import above_zero, not_negative, positive
from polarjax.storage.folder import MARK_FILE, has_mark, mark
from polarjax.storage.writing import leftovers, write_file

_FACTS = "training.json"
_STEPS = "steps"
BEST_FILE = "best.npz"
"""What a recovery keeps beside its state."""

Step = Callable[[Any, jax.Array, int], tuple[Any, Mapping[str, jax.Array]]]
"""step(state, tokens int32[b, t], number from 0) -> (state, metrics)."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """After one step.

    Attributes:
      step: from 1.
      steps: in all.
      metrics: of this step, before its update.
    """

    step: int
    steps: int
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Resume:
    """Where a training's state is kept while it runs.

    Attributes:
      folder: made at the start; gone when the caller says `clear`, once what came of
        the training is saved. Of several processes all must see it.
      every: steps between two checkpoints; the last step has one too.
      facts: JSON values that decide the outcome: a folder of another training is
        refused.
    """

    folder: Path
    every: int = 500
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def clear(self) -> None:
        """Delete the folder, but for what is not of the training."""
        clear(self.folder)


def fit(
    step: Step,
    state: Any,
    blocks: np.ndarray,
    *,
    steps: int,
    batch: int,
    seed: int = 0,
    mesh: Mesh | None = None,
    resume: Resume | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[Any, int], bool] | None = None,
) -> Any:
    """Run optimiser steps, each on the next blocks of a shuffled text.

    What step i sees depends on the arguments and i alone, so that a training that was
    interrupted ends as one that was not.

    Args:
      step: compiled; may donate the state.
      state: a pytree of arrays.
      blocks: int32[n, t]. They are shuffled again for each pass.
      steps: how many.
      batch: blocks per step.
      seed: of the shuffling.
      mesh: with an axis "dp", over which each batch is cut; None for one device.
      resume: keeps the state; found there, the training goes on from it.
      progress: called after each step.
      stop: called as stop(state, step from 1) after each, and again for a state that
        `resume` has kept; True ends the training.

    Returns:
      The last state.

    Raises:
      ValueError: if there is nothing to do, the mesh does not divide the batch, or
        `resume.folder` holds another training, or a damaged one.
      OSError: if the state cannot be kept there.
    """
    if not len(blocks):
        raise ValueError("there is no text to train on")
    check_steps(steps, batch)
    place = None
    if mesh is not None:
        if batch % mesh.shape["dp"]:
            raise ValueError(
                f"a batch of {batch} blocks does not divide by {mesh.shape['dp']} "
                "devices: choose a multiple"
            )
        place = NamedSharding(mesh, PartitionSpec("dp"))
        whole = NamedSharding(mesh, PartitionSpec())
        state = jax.tree.map(lambda leaf: put(leaf, whole), state)
    state = jax.tree.map(jnp.copy, state)  # the caller's arrays are not given away
    with _checkpoints(resume, mesh) as manager:
        first = 0
        if manager is not None and (found := manager.latest_step()) is not None:
            state, first = _restore(manager, found, state), found
            if stop and stop(state, first):  # it was asked before, perhaps
                return state
        for number in range(first, steps):
            tokens = jax.device_put(_rows(blocks, number, batch, seed), place)
            state, metrics = step(state, tokens, number)
            done = number + 1
            if progress:
                values = jax.device_get(dict(metrics))
                told = {name: float(value) for name, value in values.items()}
                progress(Progress(done, steps, told))
            due = resume and (done % resume.every == 0 or done == steps)
            if manager is not None and due:
                _save(manager, done, state)
            if stop and stop(state, done):
                if manager is not None and not due:  # it is the last step
                    _save(manager, done, state)
                break
    return state


def _rows(blocks: np.ndarray, number: int, batch: int, seed: int) -> np.ndarray:
    """The blocks of a step, int32[b, t]."""
    places = np.arange(number * batch, (number + 1) * batch)
    passes, places = np.divmod(places, len(blocks))
    rows = np.empty_like(places)
    for turn in np.unique(passes):
        order = _order(len(blocks), seed, int(turn))
        rows[passes == turn] = order[places[passes == turn]]
    return blocks[rows].astype(np.int32)


def _order(count: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng((seed, turn)).permutation(count)


@contextlib.contextmanager
def _checkpoints(
    resume: Resume | None, mesh: Mesh | None
) -> Iterator[ocp.CheckpointManager | None]:
    if resume is None:
        yield None
        return
    folder = resume.folder.absolute()
    # The others must not look before process 0 has made it.
    by_writer(mesh, lambda: claim(folder, resume.facts))
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with _quiet(), ocp.CheckpointManager(folder / _STEPS, options=options) as manager:
        yield manager
        with _keeping(manager):
            manager.wait_until_finished()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without orbax's tracebacks, one for each of its threads: the error says it."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Write on while the training goes on; also tells whether the one before failed."""
    with _keeping(manager):
        manager.save(step, args=ocp.args.StandardSave(state))


@contextlib.contextmanager
def _keeping(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax and what it writes with raise all kinds
        raise OSError(
            f"the training's state cannot be written to {manager.directory} "
            f"({_short(error)}): what was written before is kept, and the same command "
            "goes on from there"
        ) from error


def _restore(manager: ocp.CheckpointManager, step: int, state: Any) -> Any:
    """The state after a step, like the one that is given."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(target))
    except Exception as error:  # orbax and what it reads with raise all kinds
        steps = Path(manager.directory)
        raise ValueError(damaged(steps / str(step), steps.parent, error)) from error


def claim(folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Make a folder that of a training, or see that it is.

    Args:
      folder: to make, if it is not there.
      facts: JSON values that decide the training's outcome; None as long as they are
        not known.

    Raises:
      ValueError: if it is of another training, damaged, or somebody's own.
      OSError: if it cannot be written.
    """
    file, mine = folder / _FACTS, json.loads(json.dumps(dict(facts or {})))
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no training of polarjax: choose another place")
    if _FACTS in inside:
        if facts is not None and _read_facts(file) != mine:
            raise ValueError(
                f"{folder} holds a training of other settings or texts: choose another "
                "place, or delete it"
            )
        return
    if inside and not has_mark(folder):
        raise ValueError(f"{folder} is no training of polarjax: choose another place")
    if inside & {_STEPS, BEST_FILE}:
        raise ValueError(damaged(file, folder, "it is not there"))
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder)
    if facts is not None:
        # One that was killed as it wrote them left no file of that name.
        write_file(file, json.dumps({"facts": mine, "sha256": _sum(mine)}, indent=2))


def _read_facts(file: Path) -> Any:
    try:
        found = json.loads(file.read_bytes())
        facts, checksum = found["facts"], found["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(damaged(file, file.parent, error)) from error
    if checksum != _sum(facts):
        raise ValueError(damaged(file, file.parent, "its checksum is another"))
    return facts


def _sum(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def damaged(path: Path, folder: Path, why: object) -> str:
    """What to say of a file in a training's folder that cannot be read."""
    why = _short(why) if isinstance(why, Exception) else why
    return f"{path} is damaged ({why}): delete {folder} to start the training anew"


def _short(error: Exception) -> str:
    """An error in few words: libraries name every layer that it went through."""
    text = " ".join(str(error).split())
    text = text if len(text) < 200 else f"{text[:90]} ... {text[-100:]}"
    return f"{type(error).__name__}: {text}"


def clear(folder: Path) -> None:
    """Delete the folder of a training, but for what is not of it."""
    # What says whose the rest is goes last.
    shutil.rmtree(folder / _STEPS, ignore_errors=True)
    for name in (BEST_FILE, _FACTS, MARK_FILE):
        for path in (folder / name, *leftovers(folder / name)):
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):  # something else is in it
        folder.rmdir()


def check_steps(steps: int | None, batch: int) -> None:
    """Raise unless both are positive integers, or the steps None."""
    if steps is not None:
        positive("steps", steps)
    positive("batch", batch)


def check_rates(settings: Any) -> None:
    """Raise unless all learning rates of a training are finite and not negative."""
    for name in _rates(settings):
        not_negative(name, getattr(settings, name))


def check_run(settings: Any, blocks: int, passes: float) -> None:
    """Raise unless a training can do what is asked of it, before any text is read.

    Args:
      settings: of the training.
      blocks: of text that there will be.
      passes: over them.

    Raises:
      ValueError: if a learning rate is 0 or the passes are, with which nothing is
        learned, or the batch is larger than the text.
    """
    above_zero("passes", passes)
    for name in _rates(settings):
        above_zero(name, getattr(settings, name))
    if settings.batch > blocks:
        raise ValueError(
            f"batch is {settings.batch}, but the text to learn from has {blocks} "
            f"block{'s' * (blocks != 1)}: lower it, or raise tokens"
        )


def _rates(settings: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(settings)]
    return [name for name in names if name.endswith("learning_rate")]


def check_blocks(blocks: np.ndarray, config: ModelConfig) -> None:
    """Raise unless a text is [n, t] of the model's tokens, t from 2 to its context."""
    if np.ndim(blocks) != 2:
        raise ValueError(f"blocks must be [n, t], got shape {np.shape(blocks)}")
    if not len(blocks):
        raise ValueError("there is no text to train on")
    if not 2 <= blocks.shape[1] <= config.context:
        raise ValueError(
            f"blocks of {blocks.shape[1]} tokens: the model learns from 2 to "
            f"{config.context}"
        )
    low, high = int(blocks.min()), int(blocks.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"the model's token ids go from 0 to {config.vocab_size - 1}, those of the "
            f"text from {low} to {high}"
        )


def with_steps(settings: Any, blocks: int, passes: float = 1.0) -> Any:
    """Settings of a training, its steps those of so many passes where they are None."""
    if settings.steps is not None:
        return settings
    steps = max(1, int(passes * blocks) // settings.batch)
    return dataclasses.replace(settings, steps=steps)


def warmup_cosine(peak: float, steps: int) -> optax.Schedule:
    """From near 0 to the peak over 5 % of the steps, then by a cosine to 0."""
    rising = max(1, steps // 20)
    begin = peak / (rising + 1)
    return optax.warmup_cosine_decay_schedule(begin, peak, rising, steps + 1)


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's values, hexadecimal: what a training learned from."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
