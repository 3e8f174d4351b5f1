"""Results on disk: batch by batch while they are made, one JSON file in the end."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any


class FileJournal(MutableMapping):
    """What an evaluation found so far, in a file that survives being killed.

    Beside the file to be made lies `NAME.partial`: JSON lines, the first says which
    evaluation it belongs to, each further one is a batch. `finish` turns it into the
    file, which is there whole or not at all.

    Args:
      path: JSON file to be made; its folder is made too.
      facts: all that decides what the batches yield, as JSON values. What was found
        under other facts is not taken up.
      overwrite: whether results of another evaluation, or finished ones, may go.

    Raises:
      FileExistsError: if there are such, or another process writes them.
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
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.partial, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end = self._read(overwrite)
        except BlockingIOError:
            file.close()
            raise FileExistsError(
                f"another process is writing {self.partial}: wait for it, or choose "
                "another --out"
            ) from None
        except BaseException:
            file.close()
            raise
        self.path.unlink(missing_ok=True)  # only if it may be overwritten
        self._file = file
        self._file.truncate(end)  # a line that was cut short goes
        if not end:
            self._append(self._facts)

    def _read(self, overwrite: bool) -> int:
        """Take up what there is; returns where its last whole line ends."""
        end = 0
        with open(self.partial, "rb") as file:
            for line in file:
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    value = None
                if value is None:
                    break
                if not end:
                    if overwrite and value != self._facts:
                        return 0
                    self._compare(value)
                else:
                    self._found[value[0]] = value[1]
                end += len(line)
        return end

    def _compare(self, facts: Any) -> None:
        mine, theirs = _flat(self._facts), _flat(facts)
        different = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
        if different:
            key = different[0]
            raise FileExistsError(
                f"{self.partial} is of another evaluation ({key} is "
                f"{theirs.get(key)!r} there, {mine.get(key)!r} here): finish that one, "
                "choose another --out, or --overwrite it"
            )

    def _append(self, value: Any) -> None:
        assert self._file is not None, "the journal is closed"
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, and delete the batches."""
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(json.dumps(result, allow_nan=False) + "\n")
        os.replace(temporary, self.path)
        self.close()
        self.partial.unlink(missing_ok=True)

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


def _flat(facts: Any, name: str = "") -> dict[str, Any]:
    """Nested facts by path, so that a message can name the one that differs."""
    if not isinstance(facts, dict):
        return {name: facts}
    flat = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{name}.{key}" if name else key)
    return flat
