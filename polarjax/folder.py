"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from polarjax.files import LARGEST_TABLE, FileError, read_json

CONFIG_FILE = "config.json"
CARD_FILE = "card.json"


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a temporary folder beside `path` and renames it on success. On any error,
    and for the leftovers of an earlier process that was killed, it is deleted.

    Args:
      path: where the folder shall be.
      overwrite: replace what is there, if it is polarjax's own.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten, or another
        process is writing it.
    """
    path = Path(path)
    check_destination(path, overwrite)
    partial, replaced = neighbours(path)
    with _ours_alone(partial, path):
        try:
            check_destination(path, overwrite)  # it may have been made just before
            yield partial
            if path.exists():  # aside, as deleting it takes time and may be interrupted
                _remove(replaced)
                path.rename(replaced)
            partial.rename(path)
            _remove(replaced)
        except BaseException:
            _remove(partial)
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            raise


def neighbours(path: Path) -> tuple[Path, Path]:
    """Where `new_folder` builds the folder, and where it puts the one it replaces."""
    return Path(f"{path}.partial"), Path(f"{path}.replaced")


@contextlib.contextmanager
def _ours_alone(partial: Path, path: Path) -> Iterator[None]:
    """An empty folder that no other process writes; the lock dies with its process."""
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not locked(handle) or not _is(partial, handle):
            raise FileExistsError(
                f"another process is writing {path}: let it finish, or choose another "
                "place"
            )
        for leftover in partial.iterdir():
            _remove(leftover)
        yield
    finally:
        os.close(handle)


def locked(handle: int) -> bool:
    """Take an open folder for this process, unless another has it.

    Args:
      handle: of the folder; closing it lets go, and so does the end of the process.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some networks' file systems have no locks: two writers are not told there.
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


def _is(path: Path, handle: int) -> bool:
    """Whether it has not been renamed or deleted before it was locked."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def write_tensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file into a folder of ours.

    Args:
      path: of the file.
      tensors: by name, contiguous.
      metadata: words for the header.

    Raises:
      OSError: if it cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    # For its owner alone, as temporary files are; it shall be as open as the folder.
    path.chmod(path.parent.stat().st_mode & 0o666)


def check_destination(path: str | Path, overwrite: bool) -> None:
    """Raise unless a checkpoint or adapter may be written to a place.

    Args:
      path: the folder to make.
      overwrite: whether an older checkpoint or adapter there may be replaced.

    Raises:
      FileExistsError: if there is one and it may not, or if there is something else.
    """
    path = Path(path)
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists: choose another place, or overwrite it (--overwrite)"
        )
    empty = path.is_dir() and not any(path.iterdir())
    if not empty and not any(map(_has_format, (path / CONFIG_FILE, path / CARD_FILE))):
        raise FileExistsError(
            f"{path} is no polarjax checkpoint or adapter: it will not be overwritten"
        )


def _has_format(file: Path) -> bool:
    try:
        return "format_version" in read_json(file, LARGEST_TABLE)
    except FileError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
