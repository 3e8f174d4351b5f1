"""The training loop, with a step so small that its outcome is known to the bit."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from polarjax.mesh.cut import make_mesh
from polarjax.storage.folder import MARK_FILE
from polarjax.training import Resume
from polarjax.training.loop import claim, fit, warmup_cosine, with_steps

BLOCKS = np.arange(7 * 4).reshape(7, 4)  # block i begins with 4 i
STEPS, BATCH = 23, 2


@functools.partial(jax.jit, donate_argnums=0)
def toy(state, tokens, number):
    """What it ends as depends on every row, their order and the steps' numbers."""
    x = jnp.sin(state["x"] * 1.3 + tokens.astype(jnp.float32).mean(0) + number)
    total = (3 * state["total"] + tokens.sum() + number) % 65_521
    return {"x": x, "total": total}, {"x": x.sum()}


def start():
    return {"x": jnp.ones(4), "total": jnp.zeros((), jnp.int32)}


def train(**options):
    options = {"steps": STEPS, "batch": BATCH, "seed": 3, **options}
    return fit(toy, options.pop("state", None) or start(), BLOCKS, **options)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def rows_seen(**options):
    """The first token of each row, by step."""
    seen = []

    def look(state, tokens, number):
        seen.append((np.asarray(tokens[:, 0]) // 4).tolist())
        return state, {}

    options = {"steps": STEPS, "batch": BATCH, "seed": 3, **options}
    fit(look, jnp.zeros(1), options.pop("blocks", BLOCKS), **options)
    return seen


def interrupt(folder, at, every=5, **facts):
    """A training that is interrupted after step `at`, and what it had told so far."""
    told = []

    def progress(now):
        told.append(now)
        if now.step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(resume=Resume(folder, every, facts), progress=progress)
    return told


def test_every_block_is_seen_once_a_pass():
    rows = np.array(rows_seen(steps=21)).ravel()
    passes = rows.reshape(6, 7)
    assert (np.sort(passes, axis=1) == np.arange(7)).all()
    assert len(np.unique(passes, axis=0)) == 6  # shuffled anew each time
    assert np.bincount(rows_seen(blocks=BLOCKS[:3], steps=2, batch=9)[0]).min() == 3


def test_a_steps_rows_depend_on_the_seed_and_its_number_alone():
    seen = rows_seen()
    assert rows_seen(steps=9) == seen[:9] and rows_seen() == seen
    assert rows_seen(seed=4) != seen
    # And with them all it learns from: blocks as int32.
    fit(
        lambda state, tokens, number: (state, {"kind": tokens.dtype == jnp.int32}),
        jnp.zeros(1),
        BLOCKS.astype(np.uint16),
        steps=1,
        batch=1,
        progress=lambda now: np.testing.assert_equal(now.metrics, {"kind": 1.0}),
    )


def test_progress_and_stop():
    told, asked = [], []
    whole = train(progress=told.append)
    assert [(now.step, now.steps) for now in told] == [(i, 23) for i in range(1, 24)]
    assert told[-1].metrics == {"x": pytest.approx(float(whole["x"].sum()))}

    def stop(state, step):
        asked.append((step, int(state["total"])))
        return step == 9

    told.clear()
    ended = train(progress=told.append, stop=stop)
    assert len(told) == 9 and [step for step, _ in asked] == list(range(1, 10))
    assert_equal(ended, train(steps=9))
    assert asked[-1][1] == int(ended["total"])


def test_the_callers_state_is_theirs_to_keep():
    state = start()
    first = train(state=state)
    assert_equal(train(state=state), first)
    assert_equal(state, start())


@pytest.mark.parametrize("at", [1, 4, 5, 6, 14, 20, 23])
def test_an_interrupted_training_ends_as_an_unbroken_one(tmp_path, at):
    folder, told = tmp_path / "work", []
    assert len(interrupt(folder, at, seed=3)) == at
    resume = Resume(folder, 5, {"seed": 3})
    found = train(resume=resume, progress=told.append)
    assert_equal(found, train())
    # It went on from where the last checkpoint is: not the one that was on its way.
    first = (at - 1) // 5 * 5 + 1
    assert [now.step for now in told] == list(range(first, 24))
    # What comes behind it may be interrupted too.
    told.clear()
    assert_equal(train(resume=resume, progress=told.append), found)
    assert not told
    resume.clear()
    assert not folder.exists()


def test_several_interruptions(tmp_path):
    for at in (3, 8, 11, 21):
        interrupt(tmp_path / "work", at, every=2)
    found = train(resume=Resume(tmp_path / "work", 2))
    assert_equal(found, train())


CHILD = """
import sys
from pathlib import Path
from tests.training.test_loop import Resume, train

def progress(now):
    print(now.step, flush=True)

train(resume=Resume(Path(sys.argv[1]), 2), progress=progress)
"""


def test_a_killed_training_ends_as_an_unbroken_one(tmp_path):
    folder, root = tmp_path / "work", Path(__file__).resolve().parents[2]
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    for line in child.stdout:
        if int(line) == 11:
            time.sleep(0.01)  # in the midst of writing, perhaps
            break
    child.send_signal(signal.SIGKILL)
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    told = []
    found = train(resume=Resume(folder, 2), progress=told.append)
    assert_equal(found, train())
    assert 2 < told[0].step


def test_other_trainings_are_left_alone(tmp_path):
    folder = tmp_path / "work"
    interrupt(folder, 6, seed=3)
    for facts in ({"seed": 4}, {}, {"seed": 3, "more": 1}):
        with pytest.raises(ValueError, match=r"holds a training of other settings"):
            train(resume=Resume(folder, facts=facts))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no training of polarjax: choose another"):
        train(resume=Resume(foreign))
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match=r"thesis\.txt is no training of polarjax"):
        train(resume=Resume(foreign / "thesis.txt"))
    assert_equal(train(resume=Resume(folder, 5, {"seed": 3})), train())


def test_a_training_that_is_stopped_is_taken_up_where_it_stopped(tmp_path):
    """What was enough before its end is a finished training."""
    resume, told = Resume(tmp_path / "work", 5), []
    options = {"resume": resume, "stop": lambda _, step: step == 8}
    found = train(**options)
    assert_equal(train(**options, progress=told.append), found)
    assert not told


def test_facts_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk leaves no empty file that the same command stumbles over."""
    folder, fsync = tmp_path / "work", os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*training\.json"):
        claim(folder, {"seed": 3})
    assert [path.name for path in folder.iterdir()] == [MARK_FILE]
    monkeypatch.setattr(os, "fsync", fsync)
    # A kill as it was written leaves this.
    (folder / ".training.json.0123abcd.writing").write_text('{"facts')
    claim(folder, {"seed": 3})
    claim(folder, {"seed": 3})
    with pytest.raises(ValueError, match="a training of other settings or texts"):
        claim(folder, {"seed": 4})
    Resume(folder).clear()
    assert not list(tmp_path.iterdir())


def test_facts_that_are_damaged_are_said_to_be(tmp_path):
    folder, facts = tmp_path / "work", {"seed": 3, "texts": ["a"]}
    claim(folder, facts)
    file = folder / "training.json"
    whole = file.read_bytes()
    turned = whole.replace(b'"seed": 3', b'"seed": 2')
    old = json.dumps(facts, sort_keys=True, indent=2).encode()
    deep = b"[" * 100_000
    for content in [*(whole[:end] for end in range(len(whole))), turned, old, deep]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"training\.json is damaged \(") as told:
            claim(folder, facts)
        assert f"delete {folder} to start the training anew" in str(told.value)
        assert "\n" not in str(told.value) and len(str(told.value)) < 600
    file.write_bytes(whole)
    claim(folder, facts)
    file.unlink()  # whose state is it?
    (folder / "steps").mkdir()
    with pytest.raises(ValueError, match=r"training\.json is damaged \(it is not the"):
        claim(folder, facts)


def test_a_state_that_is_damaged_is_said_to_be(tmp_path):
    """Each file of it cut short: an error by name, or a file that does not matter."""
    folder, copy, whole = tmp_path / "work", tmp_path / "copy", train()
    interrupt(folder, 6)
    damaged = 0
    files = [path for path in (folder / "steps").rglob("*") if path.is_file()]
    for path in files:
        shutil.copytree(folder, copy)
        with open(copy / path.relative_to(folder), "r+b") as file:
            file.truncate(path.stat().st_size // 2)
        try:
            found = train(resume=Resume(copy, 5))
        except ValueError as error:
            assert re.match(r".*/copy/steps/5 is damaged \(.*\): delete", str(error))
            assert f"delete {copy} to start the training anew" in str(error)
            assert "\n" not in str(error) and len(str(error)) < 600
            damaged += 1
        else:
            assert_equal(found, whole)
        shutil.rmtree(copy)
    assert damaged > 2


def test_a_full_disk_keeps_what_was_written_before(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "work"
    save = ocp.CheckpointManager.save

    def full(self, step, **options):
        if step == 10:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        return save(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(OSError, match=r"cannot be written to .*steps \(.*No space"):
            train(resume=Resume(folder, 5))
    told = []
    assert_equal(train(resume=Resume(folder, 5), progress=told.append), train())
    assert told[0].step == 6


def test_clearing_leaves_what_is_not_of_the_training(tmp_path):
    folder = tmp_path / "work"
    train(resume=Resume(folder, 5))
    (folder / "notes.txt").write_text("years of work")
    Resume(folder).clear()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.devices(4)
def test_devices_share_a_batch():
    told = []
    whole = train(batch=4, mesh=make_mesh(1, 4), progress=told.append)
    alone = train(batch=4)
    assert len(whole["x"].devices()) == 4
    assert int(whole["total"]) == int(alone["total"])
    np.testing.assert_allclose(whole["x"], alone["x"], atol=1e-5)
    with pytest.raises(ValueError, match="batch of 6 blocks does not divide by 4"):
        train(batch=6, mesh=make_mesh(1, 4))


def test_errors():
    for name, value in (("steps", 0), ("batch", 0), ("steps", -1), ("batch", 1.5)):
        message = f"{name} must be a positive integer, got {value}"
        with pytest.raises(ValueError, match=message):
            train(**{name: value})
    with pytest.raises(ValueError, match="there is no text to train on"):
        fit(toy, start(), BLOCKS[:0], steps=1, batch=1)


def test_a_schedule_and_the_steps_of_one_pass():
    rate = warmup_cosine(2.0, 100)
    assert float(rate(5)) == 2
    assert 0 < rate(0) < 0.5  # a training of one step learns something
    rates = np.array([rate(i) for i in range(101)])
    assert (np.diff(rates[5:]) < 0).all() and 0 < rates[99] < 3e-3
    assert isinstance(optax.adam(rate), optax.GradientTransformation)

    from polarjax.training import RouterTraining

    one_pass = RouterTraining(0.5, batch=4)
    assert with_steps(one_pass, 103).steps == 25 and with_steps(one_pass, 3).steps == 1
    assert with_steps(RouterTraining(0.5, steps=7), 103).steps == 7
