"""Regular files of a bounded size alone are opened."""

import os
import socket
from pathlib import Path

import pytest

from polarjax.engine import Tokenizer
from polarjax.params import text_files
from polarjax.storage.files import FileError, check_file, is_there, read_json, read_text
from tests.models import LLAMA, random_params, write_checkpoint


def replace(path: Path, kind: str) -> None:
    """Put something at a place that is no file, or one too large."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                here = os.getcwd()
                os.chdir(path.parent)  # such names are short
                server.bind(path.name)
                os.chdir(here)
        case "folder":
            path.mkdir()
        case "lost":
            path.symlink_to(path.with_name("nowhere"))
        case "large":
            path.write_bytes(b"{")
            os.truncate(path, 2**40)
        case "endless":
            path.symlink_to("/proc/self/pagemap")  # regular, and says it is empty


KINDS = ["pipe", "device", "socket", "folder", "lost", "large", "endless"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "text"
    replace(path, kind)
    with pytest.raises(FileError, match=r"/text .*(is not a|is a link to|2|JSON)"):
        read_json(path)
    if kind == "endless":
        assert read_text(path) == ""


def test_links_to_files_are_followed(tmp_path):
    (tmp_path / "blob").write_bytes(b"a\r\nb")
    (tmp_path / "one").symlink_to("blob")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    assert read_text(tmp_path / "two") == "a\r\nb"
    assert check_file(tmp_path / "two", 4) == 4
    with pytest.raises(FileError, match="two has 4 bytes; it may have 3 at most"):
        read_text(tmp_path / "two", 3)
    assert not is_there(tmp_path / "three")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_tokenizer_that_is_no_file_is_refused(tmp_path, kind, name):
    params = write_checkpoint(tmp_path / "model", random_params(LLAMA))
    replace(tmp_path / "model" / name, kind)
    if kind == "endless" and name == "chat_template.jinja":
        return  # it is read as the empty one that it says it is
    with pytest.raises(ValueError, match=name):
        Tokenizer.load(params.config)
    if kind != "endless":
        with pytest.raises(ValueError, match=name):
            text_files(params.config)
