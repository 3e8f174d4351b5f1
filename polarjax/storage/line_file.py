"""Files of lines that take long to make: what is there survives a kill, and goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from polarjax.storage.facts import difference
from polarjax.storage.files import read_json
from polarjax.storage.folder import is_open_at, locked
from polarjax.storage.writing import name_path, try_file, write_file

_HEAD = "lines of polarjax"
_SYNC = 2.0  # seconds of work that a machine's own end, not a process's, may cost


class LineFile:
    """A file of lines that is there whole or not at all, made by one or more processes.

    Beside the file to be made lies `NAME.partial`, the lines so far, and
    `NAME.partial.json`, which says what they are made of. `finish` gives the lines the
    file's name; an older file stays until then.

    Args:
      path: of the file to be made, in a folder that is there.
      facts: all that decides what the lines are, as JSON values. Lines that were made
        under other facts are not taken up.
      overwrite: whether a finished file, or lines of other facts, may go.

    Attributes:
      done: lines that are there.

    Raises:
      FileExistsError: if there are such, another process writes them, or one of the
        files is somebody else's.
      FileNotFoundError: if the folder is not there.
      OSError: if it cannot be written.
    """

    def __init__(
        self, path: str | Path, facts: dict[str, Any], overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        check_new(path, overwrite)
        self._target, self.partial, self._facts_file = files_of(path)
        self._facts = json.loads(json.dumps(facts))
        self._synced = time.monotonic()
        if self.partial.exists() and not self.partial.is_file():
            raise FileExistsError(self._foreign(self.partial))
        new, held = not self.partial.exists(), False
        try:
            file = open(self.partial, "ab", buffering=0)
        except OSError as error:
            raise name_path(error, self.partial) from None
        try:
            if not locked(file.fileno()) or not is_open_at(self.partial, file.fileno()):
                raise FileExistsError(
                    f"another process is writing {self.partial}: wait for it, or "
                    "choose another name"
                )
            held = True
            if not self._ours(overwrite):
                file.truncate(0)
            self.done, end = self._count()
            file.truncate(end)  # a line that was cut short goes
            write_file(self._facts_file, json.dumps({_HEAD: self._facts}) + "\n")
        except BaseException:
            if new and held:  # nothing is in it, and nothing comes
                self.partial.unlink(missing_ok=True)
            file.close()
            raise
        self._file = file

    def _ours(self, overwrite: bool) -> bool:
        """Whether the lines that are there are taken up."""
        if not self._facts_file.exists():
            if self.partial.stat().st_size and not overwrite:
                raise FileExistsError(self._foreign(self.partial))
            return False
        try:
            found = read_json(self._facts_file)[_HEAD]
        except (ValueError, KeyError):
            if overwrite:
                return False
            raise FileExistsError(self._foreign(self._facts_file)) from None
        different = difference(self._facts, found)
        if different and not overwrite:
            raise FileExistsError(
                f"{self.partial} is of other work ({different}): finish that, choose "
                "another name, or --overwrite it"
            )
        return not different

    def _foreign(self, path: Path) -> str:
        return (
            f"{path} is not of this polarjax, and is where the work on {self.path} "
            "would be kept: move or delete it, choose another name, or --overwrite it"
        )

    def _count(self) -> tuple[int, int]:
        """Whole lines, and the byte at which they end."""
        lines = end = 0
        with open(self.partial, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    lines, end = lines + 1, end + len(line)
        return lines, end

    def __iter__(self) -> Iterator[bytes]:
        """The lines that were there from the start, each with its end."""
        with open(self.partial, "rb") as file:
            for _ in range(self.done):
                yield file.readline()

    def write(self, lines: Sequence[str]) -> None:
        """Add lines, in one piece as far as the system allows.

        Args:
          lines: without their ends.

        Raises:
          OSError: if they cannot be written; those before them are kept.
        """
        data = memoryview("".join(f"{line}\n" for line in lines).encode())
        try:
            while data:
                data = data[self._file.write(data) :]
            if time.monotonic() - self._synced > _SYNC:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise OSError(
                f"cannot write {self.partial} ({error.strerror}): what is there is "
                "kept, and the same command goes on from there"
            ) from error

    def finish(self) -> None:
        """Give the lines the file's name."""
        try:
            os.fsync(self._file.fileno())
            os.replace(self.partial, self._target)
        except OSError as error:
            raise name_path(error, self.path) from None
        self._facts_file.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the rest to a later process."""
        self._file.close()

    def __enter__(self) -> LineFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def files_of(path: str | Path) -> tuple[Path, Path, Path]:
    """The files that work on a file of lines makes, replaces or deletes.

    Args:
      path: of the file; a link to it stays one.

    Returns:
      The file itself, its lines so far, and what they are made of.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name}.partial")
    return target, partial, partial.with_name(f"{partial.name}.json")


def check_new(path: str | Path, overwrite: bool) -> None:
    """Raise unless a file can be made there: before the work, not after it.

    Args:
      path: of the file.
      overwrite: whether one that is there may go.

    Raises:
      FileExistsError: if it may not, or what is there is no file.
      FileNotFoundError: if its folder is not there: a typo shall make none.
      OSError: if it cannot be written.
    """
    if os.path.isdir(path):
        raise FileExistsError(f"{path} is a folder: name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(
            f"{path} is a device or the like, which no file can replace: name a file"
        )
    if os.path.exists(path) and not overwrite:
        raise FileExistsError(
            f"{path} exists, and is finished: choose another name, or --overwrite it"
        )
    folder = files_of(path)[0].parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} for {path}: make it")
    try_file(path)
