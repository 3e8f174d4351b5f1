"""Files that appear whole or not at all."""

import errno
import os
import stat

import pytest

from polarjax.storage.writing import leftovers, try_file, write_file


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_a_file_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    # What a user may have beside it.
    for name in ("a.json.tmp", "a.json.partial", ".a.json"):
        (tmp_path / name).write_text("years of work")
    before = os.umask(0o027)
    try:
        write_file(path, "ä\n")
    finally:
        os.umask(before)
    assert path.read_bytes() == "ä\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    write_file(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert {p.read_text() for p in tmp_path.iterdir() if p != path} == {"years of work"}
    assert len(names(tmp_path)) == 4 and not leftovers(path)


def test_a_link_stays_one(tmp_path):
    (tmp_path / "deep").mkdir()
    path = tmp_path / "link"
    path.symlink_to("deep/file")
    for text in ("first", "second"):
        write_file(path, text)
        assert path.is_symlink() and (tmp_path / "deep/file").read_text() == text
    assert names(tmp_path / "deep") == ["file"]


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_is_full_at_any_step(tmp_path, monkeypatch, step, there):
    path = tmp_path / "a.json"
    if there:
        path.write_text("finished")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/another/name")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(OSError, match="cannot write it: No space left") as caught:
            write_file(path, "new")
        assert caught.value.filename == str(path)
        assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["a.json"] * there
    assert not there or path.read_text() == "finished"


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a.json", "new")
    assert not names(tmp_path)


def test_what_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        for write in (try_file, lambda path: write_file(path, "text")):
            with pytest.raises(FileExistsError, match=f"{name} is no file: choose"):
                write(tmp_path / name)
    assert names(tmp_path) == ["folder", "pipe"]


def test_a_place_is_tried(tmp_path):
    try_file(tmp_path / "deep/er/a.json")
    assert not names(tmp_path / "deep/er")
    (tmp_path / "a.json").write_text("finished")
    try_file(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "finished"
    with pytest.raises(OSError, match=r"cannot write it: .*/proc/nope/a\.json"):
        try_file("/proc/nope/a.json")
    with pytest.raises(OSError, match=r"cannot write it: .*'/proc/a\.json'"):
        try_file("/proc/a.json")


def test_what_a_kill_leaves_is_found(tmp_path):
    left = tmp_path / ".a.json.0123abcd.writing"
    for path in (left, tmp_path / ".b.json.0123abcd.writing", tmp_path / "a.json"):
        path.write_text("half")
    assert leftovers(tmp_path / "a.json") == [left]
