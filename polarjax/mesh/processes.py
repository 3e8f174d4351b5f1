"""Several processes, on one host or many: `jax.distributed`, ended together.

Every process runs the same program on its own devices; `jax.devices()` are then those
of all. Process 0 is the main one: it alone prints and writes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import ipaddress
import json
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from polarjax.terminal.processes import START_TIMEOUT
from polarjax.terminal.processes import add_arguments as add_arguments

HEARTBEAT_TIMEOUT = 30
DEAD_PEER = re.compile("gloo|nccl|peer|coordination", re.IGNORECASE)


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    start_timeout: int = START_TIMEOUT,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Join the other processes. Comes before the first use of jax's devices.

    Between CPUs jax communicates by gloo, its default, between GPUs by NCCL.

    Args:
      coordinator: "host:port" of process 0, which listens there. None for all three
        from the launcher, if it is one that jax knows (Slurm, Open MPI, ...).
      processes: how many there are.
      process: which this one is, from 0.
      start_timeout: seconds in which all must have started.
      heartbeat_timeout: seconds of silence after which a process counts as dead; jax
        then aborts the others.

    Raises:
      ValueError: if the arguments do not describe a process, no launcher is known,
        the port is taken, or the processes have not all as many devices.
      RuntimeError: if not all processes start in time, or one was started already.
    """
    _check(coordinator, processes, process, start_timeout, heartbeat_timeout)
    if jax.distributed.is_initialized():
        raise RuntimeError("distributed.start() was called already in this process")
    bind = _bind_address(coordinator)
    if coordinator and process == 0:
        _check_port(bind or coordinator, everywhere=bind is None)
    # It would take SIGTERM for a notice, which nobody here reads, and live on.
    jax.config.update("jax_enable_preemption_service", False)
    failed: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                # Beyond ours, because jax ends a process that waited in vain by abort.
                initialization_timeout=2 * start_timeout + 60,
                heartbeat_timeout_seconds=heartbeat_timeout,
                coordinator_bind_address=bind,
            )
            jax.devices()  # exchanged between all
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(start_timeout)
    if thread.is_alive():
        raise RuntimeError(
            f"waited {start_timeout} s for the other processes"
            + (f" at {coordinator}" if coordinator else "")
            + ": start every one, with the same coordinator and number of processes"
        )
    if failed and coordinator is None and isinstance(failed[0], ValueError):
        raise ValueError(
            "no launcher that jax knows (Slurm, Open MPI, ...) started this process: "
            "give coordinator, processes and process"
        ) from failed[0]
    if failed:
        raise failed[0]
    counts = collections.Counter(device.process_index for device in jax.devices())
    if processes is not None and len(counts) != processes:
        raise ValueError(
            f"processes is {processes}, but process 0 was told {len(counts)}"
        )
    if len(set(counts.values())) > 1:
        raise ValueError(
            "every process must have as many devices, but there are "
            + ", ".join(f"{n} on process {i}" for i, n in sorted(counts.items()))
        )


def is_main() -> bool:
    """Whether this is process 0, the only one that prints and writes."""
    return jax.process_index() == 0


def from_main(value: Any) -> Any:
    """What process 0 has, on every process.

    Args:
      value: what JSON can say, such as prompts (texts or token ids) and settings.
        That of other processes is ignored.

    Returns:
      The value, its tuples as lists.

    Raises:
      TypeError: on process 0, if JSON cannot say it.
      RuntimeError: on the others, if so.
    """
    text, failed = b"", None
    if is_main():
        try:
            text = json.dumps(value).encode()
        except (TypeError, ValueError) as error:
            failed = TypeError(f"from_main() sends what JSON can say: {error}")
    if jax.process_count() > 1:
        size = -1 if failed else len(text)
        # The others cannot know the shape that they are to receive.
        size = int(multihost_utils.broadcast_one_to_all(np.int32(size)))
        if size < 0 and not failed:
            raise RuntimeError("process 0 could not send: see what it printed")
        if size >= 0:
            buffer = np.frombuffer(text.ljust(size), np.uint8)[:size]
            text = np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()
    if failed:
        raise failed
    return json.loads(text)


def agree(value: Any, what: str) -> None:
    """Raise on a process that was given other things than process 0.

    Args:
      value: what JSON can say, the same on every process.
      what: it is of, for the message.

    Raises:
      ValueError: naming it.
    """
    if from_main(value) != json.loads(json.dumps(value)):
        raise ValueError(
            f"this process has another {what} than process 0: give all of them the "
            "same files and settings"
        )


def to_host(tree: Any) -> Any:
    """A tree of arrays as numpy, whole on every process.

    Every process must call it alike: what lies on other processes' devices is gathered.

    Args:
      tree: of jax arrays on any devices; what is on one process is only copied.
    """

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """If this process fails inside, it ends at once, and so will the others.

    Leaving Python in the ordinary way waits for the others, which wait for this one.
    Does nothing where there is one process.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit) and not error.code:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(2, f"{_report(error)}\n".encode())
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def start_from(args: argparse.Namespace) -> None:
    """`start`, if the options say so; then stdout is process 0's alone.

    Args:
      args: that a parser with `add_arguments` made.

    Raises:
      ValueError: as `start`.
      RuntimeError: as `start`.
    """
    given = args.coordinator, args.processes, args.process
    if given == (None, None, None):
        if args.start_timeout != START_TIMEOUT:
            raise ValueError(
                "--start-timeout has no effect without --coordinator: leave it out"
            )
        return
    if args.coordinator == "auto":
        if (args.processes, args.process) != (None, None):
            raise ValueError("--coordinator auto finds --processes and --process")
        given = None, None, None
    elif None in given:
        raise ValueError(
            "--coordinator, --processes and --process belong together "
            "(or --coordinator auto alone)"
        )
    _check(*given, args.start_timeout, HEARTBEAT_TIMEOUT)
    auto = args.coordinator == "auto"
    _own_streams("" if auto else f"process {args.process} of {args.processes}: ")
    start(*given, start_timeout=args.start_timeout)
    if not is_main():
        sys.stdout = open(os.devnull, "w")


def _check(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *timeouts: int,
) -> None:
    if coordinator is None:
        if processes is not None or process is not None:
            raise ValueError(
                "processes and process need a coordinator: host:port of process 0"
            )
    elif processes is None or process is None:
        raise ValueError(
            f"coordinator {coordinator} needs processes, how many there are, and "
            "process, which this one is"
        )
    elif not 0 < int((re.fullmatch(r".+:(\d+)", coordinator) or (0, 0))[1]) < 65536:
        raise ValueError(f"coordinator is {coordinator!r}, but must be host:port")
    elif processes < 1:
        raise ValueError(f"processes is {processes}, but must be at least 1")
    elif not 0 <= process < processes:
        raise ValueError(
            f"process is {process}, but {processes} processes are 0 to {processes - 1}"
        )
    if min(timeouts) < 1:
        raise ValueError("timeouts must be at least 1 s")


def _bind_address(coordinator: str | None) -> str | None:
    """Loopback if that is where the others come from; None, all, is jax's default."""
    host = (coordinator or "").rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return coordinator
    return coordinator if host == "localhost" else None


def _check_port(address: str, everywhere: bool) -> None:
    # jaxlib 0.10.2 crashes if it cannot listen.
    host, _, port = address.rpartition(":")
    host = "" if everywhere else host.strip("[]")
    both = everywhere and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        socket.create_server(
            (host, int(port)), family=family, dualstack_ipv6=both
        ).close()
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at {address}: {error.strerror}; another port "
            "will do, if all processes are given it"
        ) from None


def _own_streams(process: str) -> None:
    """Python keeps stdout and stderr; native code's stdout goes, its log is filtered.

    gloo greets on stdout, where --json writes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    read, write = os.pipe()
    script = str(Path(__file__).with_name("native_log.py"))
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", script, process],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)],
    )
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(write, 2)
    for fd in (read, write, nowhere):
        os.close(fd)
    sys.stdout = open(out, "w", encoding=sys.stdout.encoding, buffering=1)
    sys.stderr = open(err, "w", encoding=sys.stderr.encoding, buffering=1)
    # Python's own handlers wait for the main thread, which jax's abort does not: the
    # process ends with the signal's number instead, and no shell adds to our line.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc._exit)


def _report(error: BaseException) -> str:
    # jax.process_index() would wait for processes that never started.
    if isinstance(error, KeyboardInterrupt):
        return "error: interrupted"
    if not isinstance(
        error,
        (ValueError, TypeError, OSError, ImportError, RuntimeError, SystemExit),
    ):
        return "".join(traceback.format_exception(error)) + f"error: {error!r}"
    text = (str(error).splitlines() or [repr(error)])[0]
    if isinstance(error, jax.errors.JaxRuntimeError) and DEAD_PEER.search(text):
        return f"error: another process died: see what it printed ({text})"
    return f"error: {text}"
