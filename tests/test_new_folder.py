"""Folders that appear whole or not at all, whatever they hold."""

import contextlib

import pytest

from polarjax import folder as folder_module
from polarjax.folder import new_folder


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


def test_a_folder_that_was_made_meanwhile_stays(tmp_path, monkeypatch):
    """A writer that looked before another one finished, and whose turn is after it."""

    @contextlib.contextmanager
    def late(partial, path):
        with ours_alone(partial, path):
            path.mkdir()
            (path / "inside").write_text("theirs")
            yield

    ours_alone = folder_module._ours_alone
    monkeypatch.setattr(folder_module, "_ours_alone", late)
    with pytest.raises(FileExistsError, match="model exists"):
        with new_folder(tmp_path / "model"):
            pass
    assert (tmp_path / "model" / "inside").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
