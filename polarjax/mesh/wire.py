"""What process 0 says to the others, from host to host.

`polarjax.mesh.processes.from_main` goes through the devices, and so behind all that
they have been sent: who has to say something at every step would have them stand idle.
This goes over TCP connections that are made once, and process 0 waits for no answer.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from polarjax.mesh.processes import from_main, is_main

# Seconds in which all must have connected.
_TIMEOUT = 60.0

_SIZE = struct.Struct("!Q")
_KEY_BYTES = 32
_Sockets = list[socket.socket]


class Wire:
    """From process 0 to all others; every process must make it, and use it, alike.

    Attributes:
      sent: messages so far.

    Raises:
      RuntimeError: if they do not find each other in time.
    """

    def __init__(self) -> None:
        self.sent = 0
        self._sockets: _Sockets = []
        alone = _on_one_host()
        if is_main():
            host = "127.0.0.1" if alone else ""
            with socket.create_server((host, 0)) as server:
                key, port = secrets.token_bytes(_KEY_BYTES), server.getsockname()[1]
                hosts = [host] if alone else _addresses()
                from_main((hosts, port, key.hex()))
                self._sockets = _welcome(server, key, jax.process_count() - 1)
        else:
            hosts, port, key = from_main(None)
            self._sockets = [_connect(hosts, port, bytes.fromhex(key))]
        for one in self._sockets:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def tell(self, value: Any) -> Any:
        """What process 0 says, on every process; the others wait for it.

        Args:
          value: what JSON can say. That of other processes is ignored.

        Raises:
          RuntimeError: if the connection has ended.
        """
        self.sent += 1
        try:
            if not is_main():
                return json.loads(self._receive())
            text = json.dumps(value).encode()
            for one in self._sockets:
                one.sendall(_SIZE.pack(len(text)) + text)
            return json.loads(text)
        except OSError as error:
            raise RuntimeError(
                f"{'another process' if is_main() else 'process 0'} has closed its "
                "engine, or died: every process must make the same calls"
            ) from error

    def _receive(self) -> bytes:
        [one] = self._sockets
        (size,) = _SIZE.unpack(_exactly(one, _SIZE.size))
        return _exactly(one, size)

    def close(self) -> None:
        """End the connections."""
        for one in self._sockets:
            one.close()


def _on_one_host() -> bool:
    """Whether all processes run on the same host, as far as its name says."""
    name = np.frombuffer(socket.gethostname().encode()[:64].ljust(64), np.uint8)
    names = np.asarray(multihost_utils.process_allgather(name))
    return bool((names.reshape(-1, 64) == name).all())


def _addresses() -> list[str]:
    """Where the others may find this host, the likeliest first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:  # nothing is sent: it only chooses a way out
            probe.connect(("10.255.255.255", 9))
            found.append(probe.getsockname()[0])
        except OSError:
            pass
    return [*found, socket.gethostname()]


def _welcome(server: socket.socket, key: bytes, count: int) -> _Sockets:
    """Connections of so many that know the key; others are sent away."""
    found: _Sockets = []
    end = time.monotonic() + _TIMEOUT
    while len(found) < count:
        server.settimeout(max(end - time.monotonic(), 0.001))
        try:
            one, _ = server.accept()
        except TimeoutError:
            raise RuntimeError(
                f"{count - len(found)} of {count} other processes did not connect to "
                f"port {server.getsockname()[1]} of process 0 in {_TIMEOUT:.0f} s: do "
                "firewalls let their hosts talk to each other?"
            ) from None
        try:
            one.settimeout(5)
            known = hmac.compare_digest(_exactly(one, _KEY_BYTES), key)
        except OSError:
            known = False
        if known:
            one.settimeout(None)
            found.append(one)
        else:
            one.close()
    return found


def _connect(hosts: list[str], port: int, key: bytes) -> socket.socket:
    for host in hosts:
        try:
            one = socket.create_connection((host, port), _TIMEOUT / len(hosts))
        except OSError:
            continue
        one.settimeout(None)
        one.sendall(key)
        return one
    raise RuntimeError(
        f"process 0 cannot be reached at {' or '.join(hosts)}, port {port}: do "
        "firewalls let the hosts talk to each other?"
    )


def _exactly(one: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = one.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise ConnectionError("the other end has closed")
        parts += part
    return bytes(parts)
