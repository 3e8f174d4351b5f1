"""Native code's stderr, line by line, with jax's abort told in one line.

Where a process of several dies, jax's coordination service aborts the others, with
pages of its own log and a stack trace, and from a thread that Python cannot catch.
`distributed.start_from` runs this file as a process of its own, which outlives the
abort. It is a script, not to be imported with the package: that would take seconds.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator

# What absl, which writes jaxlib's log, begins a record with: "E1123 21:05:48.3 26202
# file.cc:1520]". The lines up to the next record belong to it.
RECORD = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+):\d+\]")
SERVICE = re.compile(r"coordination_service|preemption_sync_manager")
FATAL = "the JAX distributed service detected fatal errors"
OURS = "error: "
REASONS = (
    ("unhealthy", "process {next} died or stopped answering"),
    ("incarnation", "two processes have the same number, or one was started anew"),
    ("DEADLINE_EXCEEDED", "not every process was started, or not in time"),
    ("Failed to send RPC", "process 0 died or is not to be reached"),
    ("", "another process died or is not to be reached"),
)


def one_line(lines: Iterator[str], process: str) -> Iterator[str]:
    """The lines worth telling: one error at most.

    Args:
      lines: that native code wrote, and `distributed.together`, each with its end.
      process: such as "process 0 of 2: ", put before an error.
    """
    told = skipping = False
    for line in lines:
        record = RECORD.match(line)
        if FATAL in line or line.startswith(OURS):
            if not told:
                why = _reason(line, lines) if FATAL in line else line[len(OURS) :]
                yield f"error: {process}{why}"
            told = skipping = True
        elif record:
            skipping = bool(SERVICE.search(record[1]))
        if not skipping:
            yield line


def _reason(line: str, lines: Iterator[str]) -> str:
    status = line.partition("absl::Status: ")[2].strip()
    words = next(words for part, words in REASONS if part in status)
    if "{next}" in words:
        words = words.format(next=next(lines, "").strip())
    status = status.partition(". ")[0].rstrip(":")
    return f"{words}: see what the others printed ({status})\n"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ends when the process has ended
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    for text in one_line(sys.stdin, sys.argv[1]):
        sys.stderr.write(text)
        sys.stderr.flush()
