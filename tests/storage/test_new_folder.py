"""Folders that appear whole or not at all, whatever they hold."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from polarjax.storage.folder import (
    CARD_FILE,
    CONFIG_FILE,
    MARK_FILE,
    new_folder,
    try_destination,
)

THEIRS = "years of work"


def names(path):
    return sorted(p.name for p in path.iterdir())


def make(path, text, **options):
    """A checkpoint, as far as `new_folder` can tell."""
    with new_folder(path, **options) as folder:
        (folder / "config.json").write_text('{"format_version": 1}')
        (folder / "inside").write_text(text)


def test_only_polarjaxs_own_or_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "config.json").write_text("{}")
    for name in ("file", "photos"):
        with (
            pytest.raises(FileExistsError, match=f"{name} is no polarjax checkpoint"),
            new_folder(tmp_path / name, overwrite=True),
        ):
            pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        *("config.json", "file", "photos")
    ]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", overwrite=True) as partial:
        (partial / "inside").write_text("new")
    assert (tmp_path / "empty" / "inside").read_text() == "new"
    assert names(tmp_path / "empty") == ["inside"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_made_meanwhile_stays(tmp_path, overwrite):
    """By a writer that does not know of ours."""
    with pytest.raises(FileExistsError, match=r"model (exists|is no polarjax)"):
        with new_folder(tmp_path / "model", overwrite) as partial:
            (partial / "inside").write_text("ours")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "inside").write_text("theirs")
    assert (tmp_path / "model" / "inside").read_text() == "theirs"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("there", "wanted"), [(CONFIG_FILE, CARD_FILE), (CARD_FILE, CONFIG_FILE)]
)
def test_only_a_folder_of_the_same_kind_is_replaced(there, wanted, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / there).write_text('{"format_version": 1}')
    kind = "adapter" if wanted == CARD_FILE else "checkpoint"
    message = f"place is no polarjax {kind}: it will not be overwritten"
    with pytest.raises(FileExistsError, match=message):
        with new_folder(place, True, wanted):
            pass
    with pytest.raises(FileExistsError, match=message):
        try_destination(place, 0, True, wanted)
    with new_folder(place, True, there) as folder:
        (folder / there).write_text("new")
    assert (place / there).read_text() == "new"


def test_somebodys_own_neighbours_are_left_alone(tmp_path):
    model, partial = tmp_path / "model", tmp_path / "model.partial"
    replaced = tmp_path / "model.replaced"
    make(model, "first")
    for place in (partial, replaced):
        place.mkdir()
        (place / "thesis.txt").write_text(THEIRS)
    message = r"model\.partial holds thesis\.txt, which this polarjax did not make"
    for write in (make, lambda *_, overwrite: try_destination(model, 0, overwrite)):
        with pytest.raises(FileExistsError, match=message):
            write(model, "second", overwrite=True)
    (partial / "thesis.txt").unlink()
    make(model, "second", overwrite=True)  # what is empty is nobody's
    assert (model / "inside").read_text() == "second"
    assert (replaced / "thesis.txt").read_text() == THEIRS
    assert names(tmp_path) == ["model", "model.replaced"]
    # A file, and a link to a folder.
    partial.write_text(THEIRS)
    with pytest.raises(FileExistsError, match=r"model\.partial is no folder, which"):
        make(model, "third", overwrite=True)
    partial.unlink()
    (tmp_path / "elsewhere").mkdir()
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"model\.partial is no folder, which"):
        make(model, "third", overwrite=True)
    assert (model / "inside").read_text() == "second"


def test_a_mark_that_is_a_link_is_none(tmp_path):
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (tmp_path / "any").write_text("")
    (partial / MARK_FILE).symlink_to(tmp_path / "any")
    with pytest.raises(FileExistsError, match=f"holds {MARK_FILE}"):
        make(tmp_path / "model", "new")


def fill(folder, at):
    """Replace a folder, and be killed before the disk is changed a time too many."""
    calls = 0

    def killed(call):
        def count(*args, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return count

    for name in ("mkdir", "rename", "unlink", "rmdir", "touch"):
        setattr(Path, name, killed(getattr(Path, name)))
    for name in ("unlink", "rmdir"):  # of rmtree
        setattr(os, name, killed(getattr(os, name)))
    make(folder, "new", overwrite=True)
    os._exit(0)


def kill_at_every_step(folder):
    """What was found after each kill."""
    model, partial = folder / "model", folder / "model.partial"
    for at in range(1, 99):
        make(model, "old")
        if not (child := os.fork()):
            fill(model, at)
        _, status = os.waitpid(child, 0)
        there = model.exists()
        before = (model if there else partial / "old") / "inside"
        text = before.read_text()
        print("there" if there else "aside", text)
        # The next writer finds it in its place.
        try:
            make(model, "other")
        except FileExistsError as error:
            assert "model exists" in str(error), error
        else:
            raise AssertionError("it was not put back")
        with new_folder(model, overwrite=True):
            assert (model / "inside").read_text() == text
        assert names(folder) == ["model"]
        shutil.rmtree(model)
        if status == 0:
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("it never came to its end")


def test_a_kill_at_any_step_loses_nothing(tmp_path):
    """Forks without jax's backend."""
    code = "import sys; from tests.storage.test_new_folder import *"
    code += "; kill_at_every_step(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) > 10
    assert list(dict.fromkeys(found)) == ["there old", "aside old", "there new"]


@pytest.mark.parametrize("at", range(1, 7))
def test_a_disk_that_is_full_at_any_step(tmp_path, monkeypatch, at):
    """What was there stays, and nothing but it; the error names it."""
    model, calls = tmp_path / "model", 0
    make(model, "old")

    def full(call):
        def fail(*args, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **options)

        return fail

    with monkeypatch.context() as patch:
        for name in ("mkdir", "write_text", "rename"):
            patch.setattr(Path, name, full(getattr(Path, name)))
        with pytest.raises(OSError, match=r"write it: No space .*/model'") as caught:
            make(model, "new", overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert (model / "inside").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_what_was_moved_aside_is_never_deleted(tmp_path, monkeypatch):
    """Something else takes the place just as the old one is out of it."""
    model, rename = tmp_path / "model", Path.rename
    make(model, "old")

    def crowded(self, target):
        done = rename(self, target)
        if self == model:
            model.mkdir()
            (model / "inside").write_text("theirs")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crowded)
        with pytest.raises(FileExistsError, match=r"partial/old was at .*model until"):
            make(model, "new", overwrite=True)
    old = tmp_path / "model.partial" / "old"
    assert (model / "inside").read_text() == "theirs"
    assert (old / "inside").read_text() == "old"
    shutil.rmtree(model)
    with pytest.raises(FileExistsError, match="model exists"):
        make(model, "new")
    assert (model / "inside").read_text() == "old"


def test_a_destination_is_tried(tmp_path, monkeypatch):
    place = tmp_path / "deep" / "er" / "model"
    try_destination(place, 1000)
    assert not names(tmp_path)
    with pytest.raises(OSError, match=r"no space for .*model: it needs .* MB and"):
        try_destination(place, 10**18)
    assert not names(tmp_path)
    with pytest.raises(OSError, match=r"cannot write it: .*'/proc/nope'"):
        try_destination("/proc/nope", 1000)
    make(place, "old")
    with pytest.raises(FileExistsError, match="exists: choose another place"):
        try_destination(place, 1000)
    try_destination(place, 1000, overwrite=True)
    with new_folder(tmp_path / "other"):
        with pytest.raises(FileExistsError, match="another process is writing"):
            try_destination(tmp_path / "other", 1000)
    assert (place / "inside").read_text() == "old"
    assert names(place.parent) == ["model"]
