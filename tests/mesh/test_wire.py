"""What process 0 says to the others; here both are threads of this process."""

import dataclasses
import socket
import threading

import pytest

import polarjax
from polarjax import Engine
from polarjax.mesh import wire
from tests.models import LLAMA, random_params

KEY = b"k" * 32


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def test_only_those_that_know_the_key_are_welcome(server, monkeypatch):
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(wire._welcome(server, KEY, 1))
    )
    thread.start()
    port = server.getsockname()[1]
    with wire._connect(["127.0.0.1"], port, b"?" * 32) as stranger:
        assert stranger.recv(1) == b""  # sent away
    with wire._connect(["127.0.0.1"], port, KEY) as one:
        thread.join(10)
        with found[0]:
            found[0].sendall(b"all")
            assert wire._exactly(one, 3) == b"all"
        with pytest.raises(ConnectionError, match="has closed"):
            wire._exactly(one, 1)
    monkeypatch.setattr(wire, "_TIMEOUT", 0.05)
    with pytest.raises(RuntimeError, match="1 of 1 other processes did not connect"):
        wire._welcome(server, KEY, 1)
    server.close()
    with pytest.raises(RuntimeError, match="cannot be reached at 127"):
        wire._connect(["127.0.0.1"], port, KEY)


class Said:
    """A wire on which process 0 says what it is told to."""

    def __init__(self):
        self.says = lambda own: own

    def tell(self, value):
        return self.says(value)

    def close(self):
        pass


def test_a_process_does_what_process_0_wants_and_nothing_else():
    params = random_params(dataclasses.replace(LLAMA, context=64), routers=True)
    settings = polarjax.Settings(max_new_tokens=20, stop_ids=())
    with Engine(params, slots=2, page=16, prefill_tokens=32) as engine:
        engine._many, engine._runner.wire = True, Said()
        first, second = (engine.add([i + 1], settings) for i in range(2))
        first.cancel()
        engine.cancel(first)
        assert first.going
        engine._runner.wire.says = lambda own: ([second.id], own[1])
        engine.step()
        assert first.going and second.finish_reason == "cancelled"
        engine._runner.wire.says = lambda own: ([], own[1])
        while first.going:
            engine.step()
        assert first.finish_reason == "length" and engine.idle
        with pytest.raises(ValueError, match="other requests than process 0"):
            engine._runner.wire.says = lambda own: ([], "another")
            engine.step()
        engine._many = False  # there is nobody to talk to
