"""How an `AsyncEngine` begins and ends, whose it is, and what nobody waits for."""

import asyncio
import contextlib
import dataclasses
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

import polarjax
from polarjax import Settings
from polarjax.engine.async_engine import AsyncStream
from polarjax.engine.tokenizer import Tokenizer
from tests.models import GREEDY, LLAMA, random_params, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = dataclasses.replace(
    LLAMA, layers=1, vocab_size=257, context=64, tied_embeddings=False
)
LONG = Settings(max_new_tokens=40, stop_ids=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("async") / "model"
    write_checkpoint(folder, random_params(CONFIG, 5))
    return folder


@pytest.fixture(scope="module")
def params(folder):
    return polarjax.load(folder)


@pytest.fixture
def engine(params):
    with polarjax.Engine(params, slots=2, context=64, **GREEDY) as engine:
        yield engine


def slow_down(engine, seconds):
    step = engine.step
    engine.step = lambda: time.sleep(seconds) or step()


async def read(pieces):
    return [piece async for piece in pieces]


def run(engine, work, limit=30):
    async def main():
        async with polarjax.AsyncEngine(engine) as served:
            return await asyncio.wait_for(work(served), limit)

    return asyncio.run(main())


async def begun(served, prompt):
    """A stream that waits in a task for its next piece, after its first."""
    pieces = await served.add(prompt, LONG)
    await anext(pieces)
    task = asyncio.create_task(read(pieces))
    await asyncio.sleep(0)
    return pieces, task


async def ended(*tasks):
    for found in await asyncio.wait_for(asyncio.gather(*tasks), 5):
        assert found[-1].finish_reason == "cancelled"


def test_who_waits_is_told_at_once_that_the_stream_is_closed(engine):
    """The last that goes on, too: an engine that is idle then sleeps."""

    async def work(served):
        pieces, task = await begun(served, [1])
        pieces.close()
        await ended(task)
        several = [await begun(served, [i]) for i in (1, 2)]
        waiting = await served.add([3], LONG)  # for a slot
        task = asyncio.create_task(read(waiting))
        await asyncio.sleep(0)
        waiting.close()
        await ended(task)
        for pieces, _ in several:
            await pieces.aclose()
        await ended(*(task for _, task in several))
        assert engine.idle and not served._driver._readers

    slow_down(engine, 0.01)  # so that none ends by itself
    run(engine, work)


def test_who_asks_without_end_keeps_nobody_from_his_pieces(engine):
    async def work(served):
        def again():
            if asking:
                time.sleep(0.001)
                served._driver._put(again)

        asking = [True]
        served._driver._put(again)
        try:
            pieces = await asyncio.wait_for(served.add([1], LONG), 5)
            found = await asyncio.wait_for(read(pieces), 5)
        finally:
            asking.clear()
        assert found[-1].finish_reason == "length"

    run(engine, work)


def test_an_error_amid_one_request_is_told_to_its_reader_alone(engine, monkeypatch):
    from polarjax.engine import driver

    def broken(request):
        if request.prompt == [1] and len(request.tokens) > 2:
            raise KeyError("no such piece")
        return next_piece(request)

    next_piece = driver.next_piece
    monkeypatch.setattr(driver, "next_piece", broken)

    async def work(served):
        first, second = await served.add([1], LONG), await served.add([2], LONG)
        with pytest.raises(KeyError, match="no such piece"):
            await read(first)
        assert (await read(second))[-1].finish_reason == "length"
        assert engine.idle

    run(engine, work)


def test_a_stream_is_read_by_one_task_at_a_time(engine):
    async def work(served):
        pieces, task = await begun(served, [1])
        with pytest.raises(RuntimeError, match="this stream is being read already"):
            await anext(pieces)
        assert (await task)[-1].finish_reason == "length"
        assert await read(pieces) == []
        shared = await served.add([1], LONG)
        first = await anext(shared)  # one after the other may
        rest = await asyncio.create_task(read(shared))
        assert [first, *rest][-1].finish_reason == "length"

    slow_down(engine, 0.005)
    run(engine, work)


def test_a_stream_is_read_in_its_own_event_loop(engine):
    with polarjax.AsyncEngine(engine) as served:
        pieces = asyncio.run(served.add([1], LONG))
        with pytest.raises(RuntimeError, match="belongs to the event loop in which it"):
            asyncio.run(read(pieces))


def test_an_engine_serves_one_thread(engine):
    kept = engine.add([1], LONG)
    with pytest.raises(RuntimeError, match="requests of this engine go on"):
        polarjax.AsyncEngine(engine)
    kept.cancel()
    with polarjax.AsyncEngine(engine) as served:
        calls = (
            lambda: polarjax.AsyncEngine(engine),
            lambda: engine.add([1]),
            lambda: engine.stream([1]),
            lambda: engine.generate([[1]]),
            lambda: engine.cancel(kept),
            engine.step,
            engine.counting().__enter__,
        )
        for call in calls:
            with pytest.raises(RuntimeError, match="this engine is an AsyncEngine's"):
                call()

        async def work():
            return await read(await served.add([1], LONG))

        assert asyncio.run(work())[-1].finish_reason == "length"
    with pytest.raises(RuntimeError, match="this engine is closed"):
        engine.add([1])
    with pytest.raises(RuntimeError, match="this engine is closed"):
        polarjax.AsyncEngine(engine)
    with pytest.raises(TypeError, match=r"engine must be a polarjax\.Engine, got 5"):
        polarjax.AsyncEngine(5)


def test_closing_the_engine_closes_who_has_it(engine):
    served = polarjax.AsyncEngine(engine)
    engine.close()
    assert engine._ended and not served._driver.thread.is_alive()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        asyncio.run(served.add([1]))


@pytest.mark.parametrize("state", ["idle", "going", "waited"])
def test_one_that_is_dropped_ends(params, state):
    """With its last stream; thread, engine and all."""
    engine = polarjax.Engine(params, slots=2, context=64, **GREEDY)
    slow_down(engine, 0.01)
    served, kept = polarjax.AsyncEngine(engine), []
    thread, whole = served._driver.thread, weakref.ref(served)

    async def work(served):
        pieces = await served.add([1], LONG)
        if state == "going":
            kept.append(pieces)
            return
        del served  # the stream holds it
        gc.collect()
        assert (await read(pieces))[-1].finish_reason == "length"

    if state != "idle":
        asyncio.run(work(served))
    del served
    gc.collect()
    if kept:
        assert whole() is not None and thread.is_alive()
        kept.clear()
        gc.collect()
    assert whole() is None
    thread.join(5)
    assert not thread.is_alive() and engine._ended
    held = weakref.ref(engine)
    del engine
    gc.collect()
    assert held() is None


ENDS = """
import asyncio, sys, polarjax
from tests.models import GREEDY

params = polarjax.load(sys.argv[1])

def make():
    sizes = dict(slots=2, context=64, max_waiting=1000)
    return polarjax.AsyncEngine(polarjax.Engine(params, **sizes, **GREEDY))

async def work(served):
    settings = polarjax.Settings(max_new_tokens=60, stop_ids=())
    streams = [await served.add([i], settings) for i in range(200)]
    await anext(streams[0])
    return streams

kept, dropped = make(), make()
streams = asyncio.run(work(kept))
asyncio.run(work(dropped))
print("main ends", flush=True)
del dropped
"""


@pytest.mark.parametrize(
    "last, code", [("", 0), ("raise ValueError('of the user')", 1)]
)
def test_a_process_ends_in_good_order_with_engines_open(folder, last, code):
    """As it would without: with its own code, and no word about it."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS + last, str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "main ends\n", done.stderr
    assert done.returncode == code, done.stderr
    said = done.stderr.splitlines()
    if code:
        assert said[0].startswith("Traceback")
        assert said[-1] == "ValueError: of the user"
        assert len(said) <= 4
    else:
        assert not said


def test_a_check_that_takes_long_holds_up_its_asker_alone(engine):
    prepare, entered, release = engine._prepare, threading.Event(), threading.Event()

    def slow(prompt, settings):
        if prompt == "long":
            entered.set()
            assert release.wait(20)
        return prepare(prompt, settings)

    engine._prepare = slow

    async def work(served):
        asked = asyncio.create_task(served.add("long", LONG))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        for _ in range(3):
            assert await asyncio.wait_for(read(served.stream([1], LONG)), 5)
        assert not asked.done()
        release.set()
        assert (await read(await asked))[-1].finish_reason == "length"

    try:
        run(engine, work)
    finally:
        release.set()


def test_settings_are_checked_where_they_come_from(engine, monkeypatch):
    from polarjax.engine import engine as module

    def noting(*given):
        threads.append(threading.current_thread())
        return settings_of_one(*given)

    threads, settings_of_one = [], module.settings_of_one
    monkeypatch.setattr(module, "settings_of_one", noting)

    async def work(served):
        await read(served.stream("one", LONG))
        assert len(threads) == 1 and threads[0] is not served._driver.thread

    run(engine, work)


def test_an_engine_that_is_closed_amid_a_check_says_so(engine):
    prepare = engine._prepare

    async def work(served):
        def late(*given):
            served.close()
            return prepare(*given)

        engine._prepare = late
        with pytest.raises(RuntimeError, match="this engine is closed"):
            await served.add([1], Settings(density=0.5))

    run(engine, work)


def test_reading_a_text_lets_other_threads_go_on(params):
    """The work of seconds is done beside Python, not in it."""
    tokenizer, ticks = Tokenizer.load(params.config), 0
    text = "some words of it, " * 30_000
    thread = threading.Thread(target=tokenizer.encode, args=(text,))
    thread.start()
    while thread.is_alive():
        time.sleep(0.002)
        ticks += 1
    assert ticks > 10


def test_a_thread_that_fails_refuses_what_still_waits(engine):
    """Also if it cannot even be closed in good order."""

    async def work(served):
        asked = [asyncio.create_task(served.add([i], LONG)) for i in range(4)]
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, RuntimeError | AsyncStream), error
            if isinstance(error, AsyncStream):
                with pytest.raises(RuntimeError, match="the engine failed: no more"):
                    await read(error)

    def fail():
        time.sleep(0.02)
        raise SystemExit("no more")

    engine.step = fail
    with contextlib.suppress(RuntimeError):
        run(engine, work)


def test_garbage_that_closes_amid_a_command_keeps_it_closed(engine):
    """It may be collected at any moment, in the thread of whoever asks."""
    served = polarjax.AsyncEngine(engine)
    driver, commands = served._driver, served._driver._commands

    class Collecting:
        def put(self, command):
            driver._commands = commands
            driver.stop()
            commands.put(command)

    driver._commands = Collecting()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        asyncio.run(served.add([1], LONG))
    driver.thread.join(5)
    assert not driver.thread.is_alive()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        asyncio.run(served.add([1], LONG))
