"""Files that appear whole or not at all: what stood there stays until then."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from pathlib import Path


def write_file(path: str | Path, content: str | bytes) -> None:
    """Make a file, or replace one, by a single step that no kill can halve.

    The content goes into a new file beside it, to the disk, and only then to its name.
    A link stays one: the file that it leads to is replaced.

    Args:
      path: of the file; its folder must be there.
      content: bytes, or text for UTF-8.

    Raises:
      FileExistsError: if something that is no file has the name.
      OSError: if it cannot be written, with the name of `path`.
    """
    data = content.encode() if isinstance(content, str) else content
    target, temporary = _names(path)
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise name_path(error, path) from None


def try_file(path: str | Path) -> None:
    """Raise unless a file can be written there: before the work, not after it.

    Args:
      path: of the file, which stays as it is. Its folder is made.

    Raises:
      FileExistsError: if something that is no file has the name.
      OSError: if it cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _, temporary = _names(path)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.unlink(temporary)
    except OSError as error:
        raise name_path(error, path) from None


def leftovers(path: str | Path) -> list[Path]:
    """What `write_file` left beside a file when its process was killed."""
    path = Path(os.path.realpath(path))
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.writing"))


def _names(path: str | Path) -> tuple[Path, Path]:
    """Where the file is, and where its content goes first, in a name of nobody's."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{path} is no file: choose another name")
    name = f".{target.name}.{secrets.token_hex(4)}.writing"
    return target, target.with_name(name)


def name_path(error: OSError, path: str | Path) -> OSError:
    """An error of something temporary as one of the path that was asked for."""
    if error.errno is None:
        return error
    return OSError(error.errno, f"cannot write it: {error.strerror}", str(path))
