"""`recover` as a whole: the best is kept, whatever comes between."""

import dataclasses
import errno
import functools
import os

import jax
import numpy as np
import pytest

from polarjax.calibration import recover as module
from polarjax.calibration.calibrate import Texts
from polarjax.calibration.recover import recover
from polarjax.policies import with_learned
from polarjax.policies.updates import ranks_of
from polarjax.training import Recovery, Resume, Source
from polarjax.training.distance import divergence
from tests.models import LLAMA, random_params, write_checkpoint
from tests.training.mended import with_updates

CONFIG = dataclasses.replace(LLAMA, layers=2, vocab_size=257)
TEXTS = Texts([Source.parse("self")], tokens=8 * 16, context=16, held_out=8 * 16)
# So few texts that it gets worse again before its end.
SETTINGS = Recovery(steps=24, batch=8, rank=2, learning_rate=1e-3, seed=1)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    model = random_params(CONFIG, routers=True, budgets=(4, 2))
    return write_checkpoint(tmp_path_factory.mktemp("recovery") / "model", model)


def mend(params, settings=SETTINGS, **options):
    return recover(params, TEXTS, settings, mode="mask", **options)


@pytest.fixture(scope="module")
def looks(params):
    """The divergence at each look of a recovery, and what it ended as."""
    found = []

    def watch(model, blocks, batch=4):
        found.append(divergence(model, blocks, batch))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "divergence", watch)
        ended = mend(params, patience=99)
    return found, ended


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_was_best_is_kept(looks):
    found, ended = looks
    *watched, before, after = found
    assert len(watched) == 1 + 24 and before == ended.before["self"]
    assert after == ended.after["self"] < before
    # What is measured at the end is what an adapter stores, in 16 bit.
    assert after == pytest.approx(min(watched), rel=1e-3)
    assert 0 < np.argmin(watched) < 24  # else this shows nothing
    card = ended.card()
    assert card["divergence"]["self"] == [round(before, 5), round(after, 5)]
    assert card["parameters"] > 0 and "routers_sha256" not in card


@pytest.mark.parametrize("rate", [1e-12, 3.0])
def test_a_recovery_that_does_not_help_ends_early_and_changes_nothing(params, rate):
    told = []
    settings = dataclasses.replace(
        SETTINGS, learning_rate=rate, router_learning_rate=rate
    )
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = mend(params, settings, patience=3, progress=lambda *x: told.append(x))
    steps = [done for what, done, _ in told if what.startswith("recovering")]
    assert steps == [1, 2, 3]
    assert_same(found.params.routers, params.routers)
    assert found.after == found.before


@pytest.mark.parametrize("at", [3, 10, 21, None])
def test_an_interrupted_recovery_keeps_the_same(
    params, looks, tmp_path, monkeypatch, at
):
    """Before, behind and far behind the best; None: once the training is done."""
    monkeypatch.setattr(module, "Resume", functools.partial(Resume, every=4))
    work, told = tmp_path / "work", []

    def progress(what, done, total):
        if what.startswith("recovering"):
            told.append(done)
        if done == at and told and told[-1] == at and len(told) == at:
            raise KeyboardInterrupt
        if at is None and what.startswith("divergence"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mend(params, patience=99, work=work, progress=progress)
    before = len(told)
    found = mend(params, patience=99, work=work, progress=lambda *x: told.append(x[1]))
    assert_same(found.params.routers, looks[1].params.routers)
    assert before == (at or 24)
    found.save(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_best_that_is_damaged_is_said_to_be(params, tmp_path):
    file = tmp_path / "work" / "best.npz"
    file.parent.mkdir()
    module._Best(0.5, 7, {"layers_1": {"x": np.arange(3.0)}}).save(file)
    found = module._Best.load(file)
    assert (found.kl, found.step) == (0.5, 7)
    assert found.routers["layers_1"]["x"].tolist() == [0, 1, 2]
    assert [path.name for path in file.parent.iterdir()] == ["best.npz"]
    whole = file.read_bytes()
    turned = [bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]]) for at in (0, 300)]
    for content in [*(whole[:end] for end in range(len(whole))), *turned]:
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"best\.npz is damaged .*: delete"
        ) as told:
            module._Best.load(file)
        assert str(told.value).count("\n") == 0
        assert f"delete {file.parent} to start the training anew" in str(told.value)


def test_a_full_disk_keeps_the_best_before(params, tmp_path, monkeypatch):
    file = tmp_path / "best.npz"
    module._Best(0.5, 7, {"layers_1": {"x": np.arange(3.0)}}).save(file)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*best\.npz"):
        module._Best(0.1, 9, {"layers_1": {"x": np.zeros(3)}}).save(file)
    assert module._Best.load(file).step == 7
    assert [path.name for path in tmp_path.iterdir()] == ["best.npz"]


def test_a_rank_is_that_of_the_updates_or_an_error(params, looks):
    mended = looks[1].params
    with pytest.raises(ValueError, match=r"has updates of rank 2 already, .* not 3,"):
        mend(mended, dataclasses.replace(SETTINGS, rank=3))
    with pytest.raises(ValueError, match=r"has updates of rank 2 already.* not full,"):
        mend(mended, dataclasses.replace(SETTINGS, rank=None))
    found = mend(mended, dataclasses.replace(SETTINGS, steps=1))
    assert ranks_of(found.params.routers) == {2}
    assert found.card()["recovery"]["rank"] == 2
    assert ranks_of(with_updates(params, rank=None).routers) == {None}
    assert ranks_of(params.routers) == set()


def test_another_models_training_is_refused(params, tmp_path):
    work = tmp_path / "work"

    def progress(what, done, total):
        if what.startswith("recovering"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mend(params, work=work, progress=progress)
    config = dataclasses.replace(params.config, model_hash="another")
    turned = jax.tree.map(lambda x: -x, params.routers)
    renamed = dataclasses.replace(params, config=config)
    for other in (renamed, with_learned(params, routers=turned)):
        with pytest.raises(ValueError, match="a training of other settings or texts"):
            mend(other, work=work)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"passes": -1}, "passes must be a number above 0, got -1"),
        ({}, {"patience": 0}, "patience must be a positive integer, got 0"),
        ({"learning_rate": 0.0}, {}, "learning_rate must be a number above 0"),
        ({"router_learning_rate": 0.0}, {}, "router_learning_rate must be a number"),
        ({"batch": 16}, {}, "batch is 16, but the text to learn from has 8 blocks"),
    ],
)
@pytest.mark.usefixtures("no_text_is_read")
def test_what_cannot_be_done_is_said_before_any_text_is_read(
    params, changes, options, message
):
    with pytest.raises(ValueError, match=message):
        mend(params, dataclasses.replace(SETTINGS, **changes), **options)
