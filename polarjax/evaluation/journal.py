"""Results on disk: batch by batch while they are made, one JSON file in the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any

from polarjax.storage.facts import difference
from polarjax.storage.folder import is_open_at, locked
from polarjax.storage.writing import name_path, try_file, write_file

_HEAD = "journal of polarjax eval"
_START = f'{{"{_HEAD}": '.encode()


class FileJournal(MutableMapping):
    """What an evaluation found so far, in a file that survives being killed.

    Beside the file to be made lies `NAME.partial`: JSON lines, the first says whose it
    is and which evaluation it belongs to, each further one is a batch. `finish` turns
    it into the file, which is there whole or not at all; an older one stays until then.

    Args:
      path: JSON file to be made; its folder is made too.
      facts: all that decides what the batches yield, as JSON values. What was found
        under other facts is not taken up.
      overwrite: whether results of another evaluation, or finished ones, may go.

    Raises:
      FileExistsError: if there are such, another process writes them, or one of the
        two files is somebody else's.
      ValueError: if the journal is damaged.
      OSError: if it cannot be written.
    """

    def __init__(
        self, path: str | Path, facts: dict[str, Any], overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self._facts = json.loads(json.dumps(facts))
        self._found: dict[str, Any] = {}
        self._file = None
        if self.path.exists() and not overwrite:
            raise FileExistsError(
                f"{self.path} exists, of another evaluation: choose another --out, or "
                "--overwrite it"
            )
        try_file(self.path)
        if self.partial.exists() and not self.partial.is_file():
            raise FileExistsError(self._foreign())
        try:
            file = open(self.partial, "ab", buffering=0)
        except OSError as error:
            raise name_path(error, self.partial) from None
        try:
            if not locked(file.fileno()) or not is_open_at(self.partial, file.fileno()):
                raise FileExistsError(
                    f"another process is writing {self.partial}: wait for it, or "
                    "choose another --out"
                )
            end = self._read(overwrite)
            file.truncate(end)  # a line that was cut short goes
        except BaseException:
            file.close()
            raise
        self._file = file
        if not end:
            self._append({_HEAD: self._facts})

    def _read(self, overwrite: bool) -> int:
        """Take up what there is; returns where its last whole line ends."""
        end = 0
        with open(self.partial, "rb") as file:
            if not _START.startswith(start := file.read(len(_START))):
                raise FileExistsError(self._foreign())
            if start != _START:  # it was cut short there, or is empty
                return 0
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    value = json.loads(line)
                    key, found = (_HEAD, value[_HEAD]) if number == 1 else value
                    hash(key)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    if overwrite:
                        self._found.clear()
                        return 0
                    raise ValueError(
                        f"{self.partial} is damaged in line {number}: delete it or "
                        "--overwrite it, to measure anew"
                    ) from error
                if number > 1:
                    self._found[key] = found
                elif overwrite and found != self._facts:
                    return 0
                else:
                    self._compare(found)
                end += len(line)
        return end

    def _foreign(self) -> str:
        return (
            f"{self.partial} is no journal of this polarjax, and is where the work on "
            f"{self.path} would be kept: move or delete it, or choose another --out"
        )

    def _compare(self, facts: Any) -> None:
        if different := difference(self._facts, facts):
            raise FileExistsError(
                f"{self.partial} is of another evaluation ({different}): finish that "
                "one, choose another --out, or --overwrite it"
            )

    def _append(self, value: Any) -> None:
        assert self._file is not None, "the journal is closed"
        line = memoryview(json.dumps(value).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"cannot write {self.partial} ({error.strerror}): what was measured "
                "so far is kept, and the same command goes on from there"
            ) from error

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, and delete the batches."""
        write_file(self.path, json.dumps(result, allow_nan=False) + "\n")
        self.partial.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the batches to a later process."""
        if self._file:
            self._file.close()
        self._file = None

    def __enter__(self) -> FileJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __setitem__(self, key: str, value: Any) -> None:
        self._append([key, value])
        self._found[key] = value

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __delitem__(self, key: str) -> None:
        raise TypeError("what was measured stays")
