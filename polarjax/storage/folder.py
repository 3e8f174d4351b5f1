"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from polarjax.storage.files import LARGEST_TABLE, FileError, read_json
from polarjax.storage.writing import name_path

CONFIG_FILE = "config.json"
CARD_FILE = "card.json"
MARK_FILE = ".made-by-polarjax"
"""In folders that polarjax makes for itself: what has none is somebody's own."""
# Inside of the folder beside the one to be made.
_NEW, _OLD, _GONE = "new", "old", "gone"


@contextlib.contextmanager
def new_folder(
    path: str | Path, overwrite: bool = False, known_by: str = CONFIG_FILE
) -> Iterator[Path]:
    """A folder of polarjax's that appears whole or not at all; see `whole_folder`.

    Args:
      path: where the folder shall be.
      overwrite: replace what is there, if it is of the same kind.
      known_by: the file that tells its kind: `CONFIG_FILE` of a checkpoint, `CARD_FILE`
        of an adapter.

    Raises:
      FileExistsError: if `path` exists and is not to be overwritten, another process
        is writing it, or `PATH.partial` is not polarjax's.
      OSError: if it cannot be written.
    """

    def check() -> None:
        check_destination(path, overwrite, known_by)

    with whole_folder(path, check) as new:
        yield new


@contextlib.contextmanager
def whole_folder(path: str | Path, check: Callable[[], None]) -> Iterator[Path]:
    """A folder that appears whole or not at all, in the place of what is there.

    It is built inside of `PATH.partial`, which bears a mark and is deleted in the end,
    on any error, and where an earlier process that was killed has left it. What is
    replaced waits in there until the new one is in its place; of a process that was
    killed in between, the next one puts it back.

    Args:
      path: where the folder shall be.
      check: raises if what is at `path`, if anything, may not be replaced. It is asked
        again before that is done.

    Raises:
      FileExistsError: if another process is writing it, or `PATH.partial` is not
        polarjax's.
      OSError: if it cannot be written.
    """
    path = Path(path)
    check()
    with _workshop(path) as workshop:
        new, old = workshop / _NEW, workshop / _OLD
        check()  # it may have been made just before
        try:
            new.mkdir()
            yield new
            check()  # or meanwhile
            if path.exists():  # aside, as deleting it may be interrupted
                path.rename(old)
            new.rename(path)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise name_path(error, path) from None
            raise


def try_destination(
    path: str | Path,
    nbytes: int,
    overwrite: bool = False,
    known_by: str = CONFIG_FILE,
) -> None:
    """Raise unless a folder can be made: before long work, not after it.

    The folder beside it, in which it will be built, is made and removed.

    Args:
      path: the folder to make.
      nbytes: that it will take, with a margin.
      overwrite: whether an older folder of the same kind may be replaced.
      known_by: the file that tells its kind; see `new_folder`.

    Raises:
      FileExistsError: as `new_folder`.
      OSError: if it cannot be written, or the disk is too small.
    """
    check_destination(path, overwrite, known_by)
    with _workshop(Path(path)) as workshop:
        check_room(path, workshop, nbytes)


def check_room(path: str | Path, beside: Path, nbytes: int) -> None:
    """Raise unless a disk has so many bytes free.

    Args:
      path: that is to be made, for the message.
      beside: a folder on the disk.
      nbytes: that are needed.

    Raises:
      OSError: if it has less.
    """
    free = shutil.disk_usage(beside).free
    if free < nbytes:
        raise OSError(
            f"no space for {path}: it needs {nbytes / 1e6:,.1f} MB "
            f"and {free / 1e6:,.1f} MB are free"
        )


def partial_of(path: str | Path) -> Path:
    """The folder beside a folder to be made, in which it is built."""
    return Path(f"{path}.partial")


@contextlib.contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """A marked folder that no other process uses; the lock dies with its process."""
    shop = partial_of(path)
    missing = [parent for parent in shop.parents if not parent.exists()]
    if shop.is_symlink() or (shop.exists() and not shop.is_dir()):
        raise FileExistsError(_foreign(shop, path, "is no folder"))
    try:
        shop.mkdir(parents=True, exist_ok=True)
        handle = os.open(shop, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise name_path(error, path) from None
    try:
        if not locked(handle) or not is_open_at(shop, handle):
            raise FileExistsError(
                f"another process is writing {path}: let it finish, or choose another "
                "place"
            )
        if not has_mark(shop):
            for name in sorted(entry.name for entry in shop.iterdir()):
                raise FileExistsError(_foreign(shop, path, f"holds {name}"))
        _settle(shop, path)
        try:
            mark(shop)
            _empty(shop)
            yield shop
        finally:
            _settle(shop, path)
            _empty(shop)
            (shop / MARK_FILE).unlink(missing_ok=True)
            shop.rmdir()
            for parent in missing:  # where nothing came of it
                with contextlib.suppress(OSError):
                    parent.rmdir()
    finally:
        os.close(handle)


def _foreign(shop: Path, path: Path, what: str) -> str:
    return (
        f"{shop} {what}, which this polarjax did not make, and is where {path} would "
        "be built: move or delete it, or choose another place"
    )


def _settle(shop: Path, path: Path) -> None:
    """What was moved aside goes back, unless the new folder is in its place."""
    old = shop / _OLD
    if not old.exists():
        return
    if not os.path.lexists(path):
        old.rename(path)
    elif (shop / _NEW).exists():
        raise FileExistsError(
            f"{old} was at {path} until something else took its place: move or delete "
            "it"
        )
    else:  # once and for all: half of it must not come back
        old.rename(shop / _GONE)


def mark(folder: Path) -> None:
    """Make a folder polarjax's own."""
    (folder / MARK_FILE).touch()


def has_mark(folder: Path) -> bool:
    """Whether polarjax made a folder for itself."""
    file = folder / MARK_FILE
    return file.is_file() and not file.is_symlink()


def _empty(shop: Path) -> None:
    """All but the mark, without which nobody may delete the rest."""
    for entry in shop.iterdir():
        if entry.name != MARK_FILE:
            _remove(entry)


def locked(handle: int) -> bool:
    """Take an open file or folder for this process, unless another has it.

    Args:
      handle: of it; closing it lets go, and so does the end of the process.
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


def is_open_at(path: Path, handle: int) -> bool:
    """Whether what is open has not been renamed or deleted before it was locked."""
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


def check_destination(
    path: str | Path, overwrite: bool, known_by: str = CONFIG_FILE
) -> None:
    """Raise unless a checkpoint or adapter may be written to a place.

    Args:
      path: the folder to make.
      overwrite: whether an older folder of the same kind may be replaced.
      known_by: the file that tells its kind; see `new_folder`.

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
    if not empty and not _has_format(path / known_by):
        kind = "adapter" if known_by == CARD_FILE else "checkpoint"
        raise FileExistsError(
            f"{path} is no polarjax {kind}: it will not be overwritten"
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
