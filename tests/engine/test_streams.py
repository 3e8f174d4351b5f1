"""What requests get piece by piece: in one thread, and in event loops."""

import asyncio
import dataclasses
import gc
import itertools
import random
import re
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import polarjax
from polarjax import Settings
from tests.models import GREEDY, LLAMA, random_params, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = dataclasses.replace(
    LLAMA, layers=1, vocab_size=257, context=64, tied_embeddings=False
)
PROMPTS = ["one", "two and two", "3", [9, 8, 7, 6, 5]]
LONG = Settings(max_new_tokens=40, stop_ids=())


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """A model in which token 14, which it draws for none of these, is NaN."""
    params = random_params(CONFIG, 5)
    weights = dict(params.weights)
    tokens = weights["embed"]["tokens"].at[14].set(np.nan)
    weights["embed"] = {**weights["embed"], "tokens": tokens}
    broken = dataclasses.replace(params, weights=weights)
    return write_checkpoint(tmp_path_factory.mktemp("nan") / "model", broken)


@pytest.fixture
def engine(params):
    with polarjax.Engine(params, slots=3, context=64, **GREEDY) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(params):
    with polarjax.Engine(params, slots=3, context=64, **GREEDY) as engine:
        return engine.generate(PROMPTS, max_new_tokens=40, stop_ids=())


def together(pieces):
    """What a stream gave, as one piece; only the last may have a reason."""
    assert not any(piece.finish_reason for piece in pieces[:-1])
    return polarjax.Piece(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [x for piece in pieces for x in piece.logprobs],
        pieces[-1].finish_reason,
    )


def check(found, expected, i):
    whole = together(found)
    assert whole.text == expected.texts[i] and whole.tokens == expected.tokens[i]
    assert len(whole.logprobs) == 40 and whole.finish_reason == "length"
    np.testing.assert_allclose(whole.logprobs, expected.logprobs[i], atol=1e-4)


def test_streams_of_one_thread_share_the_steps(engine, expected, monkeypatch):
    step, steps = engine.step, []
    monkeypatch.setattr(engine, "step", lambda: steps.append(1) or step())
    streams = [engine.stream(prompt, LONG) for prompt in PROMPTS]
    turns = []
    for pieces in itertools.zip_longest(*streams[:3]):
        turns.append(pieces)
    for i, pieces in enumerate(zip(*turns, strict=True)):
        check([piece for piece in pieces if piece], expected, i)
    assert len(turns) >= 8
    assert len(steps) <= 40 + 2  # none drives for itself alone
    check(list(streams[3]), expected, 3)
    assert engine.idle and list(streams[0]) == []


def test_streams_give_what_generate_says(engine, expected):
    streams = [engine.stream(prompt, LONG) for prompt in PROMPTS]
    for i in (3, 0, 2, 1):
        check(list(streams[i]), expected, i)


def test_a_stream_is_refused_at_once(engine):
    with pytest.raises(ValueError, match="prompt 0 has token id 999"):
        engine.stream([999])
    with pytest.raises(TypeError, match="prompt 0 must be a str"):
        engine.stream(5)


def test_a_stream_that_is_left_is_cancelled(engine):
    with engine.stream([1, 2], LONG) as closed:
        next(closed)
    assert closed.request.finish_reason == "cancelled" and list(closed) == []
    dropped = engine.stream([1, 2], LONG)
    next(dropped)
    request = dropped.request
    del dropped
    gc.collect()
    assert request.finish_reason == "cancelled"
    other = engine.stream([3], LONG)
    next(other)
    assert engine._runner.scheduler.live == 1
    engine.cancel(other.request)
    assert together(list(other)).finish_reason == "cancelled"


def test_a_stream_of_nan_ends_alone(engine, expected):
    good, bad = engine.stream("one", LONG), engine.stream([14], LONG)
    check(list(good), expected, 0)  # which drives the other's failure
    with pytest.raises(polarjax.RequestFailed, match="yields NaN for prompt 1"):
        next(bad)


def test_a_closed_engine_ends_its_streams(engine):
    waiting, going = engine.stream("one", LONG), engine.stream("two", LONG)
    ended = engine.stream("three", Settings(max_new_tokens=1))
    next(going)
    engine.close()
    assert together(list(ended)).finish_reason == "length"  # it has all of it
    for stream in (waiting, going):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            next(stream)
    with pytest.raises(RuntimeError, match="this engine is closed"):
        engine.stream("four")


def run(engine, work, limit=60):
    """Run a function of an `AsyncEngine` in an event loop."""

    async def main():
        async with polarjax.AsyncEngine(engine) as served:
            return await asyncio.wait_for(work(served), limit)

    before = threading.active_count()
    try:
        return asyncio.run(main())
    finally:
        assert threading.active_count() == before, "a thread is left"
        assert engine._ended


def slow_down(engine, seconds):
    step = engine.step
    engine.step = lambda: time.sleep(seconds) or step()


async def read(served, prompt, settings=LONG):
    return [piece async for piece in served.stream(prompt, settings)]


def test_readers_of_an_event_loop_get_what_generate_says(engine, expected):
    async def work(served):
        return await asyncio.gather(*(read(served, prompt) for prompt in PROMPTS))

    for i, found in enumerate(run(engine, work)):
        check(found, expected, i)
        assert len(found) >= 8


def test_readers_of_several_event_loops_are_served(engine, expected):
    found = {}

    def other(served, i):
        found[i] = asyncio.run(read(served, PROMPTS[i]))

    with polarjax.AsyncEngine(engine) as served:
        threads = [threading.Thread(target=other, args=(served, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for i in range(4):
        check(found[i], expected, i)


def test_a_reader_that_does_not_read_holds_up_itself_alone(engine, expected):
    async def work(served):
        async with await served.add("one", LONG) as slow:
            for _ in range(2):
                check(await read(served, PROMPTS[1]), expected, 1)
            kept = slow._reader.items.qsize()
            return kept, [piece async for piece in slow]

    kept, found = run(engine, work)
    check(found, expected, 0)
    assert kept == len(found) <= 41


async def leave(served, way):
    """Begin to read "two", and go: returns what is left of it."""
    if way == "context":
        async with await served.add("two", LONG) as pieces:
            await anext(pieces)
    elif way == "dropped":
        pieces = await served.add("two", LONG)
        await anext(pieces)
        del pieces
        gc.collect()
    elif way == "generator":
        pieces = served.stream("two", LONG)
        await anext(pieces)
        await pieces.aclose()
    else:
        begun = asyncio.Event()

        async def follow():
            async for _ in served.stream("two", LONG):
                begun.set()

        task = asyncio.create_task(follow())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("way", ["task", "generator", "context", "dropped"])
def test_who_leaves_cancels_the_request_within_a_step(engine, way, monkeypatch):
    """And its neighbour goes on."""
    steps, added = [], []
    step, take = engine.step, engine._take

    def slow_step():
        steps.append(time.sleep(0.05))  # so that none ends before it is left
        return step()

    def noted(*given):
        added.append(take(*given))
        return added[-1]

    monkeypatch.setattr(engine, "step", slow_step)
    monkeypatch.setattr(engine, "_take", noted)

    async def work(served):
        neighbour = asyncio.create_task(read(served, [1, 2]))
        await leave(served, way)
        done = len(steps)
        [request] = [one for one in added if len(one.prompt) == 3]
        while request.going:
            await asyncio.sleep(0.001)
        assert request.finish_reason == "cancelled" and len(request.tokens) < 40
        assert len(steps) - done <= 1
        return await neighbour

    assert len(together(run(engine, work)).tokens) == 40


def test_a_wait_that_is_given_up_loses_no_piece(engine, expected):
    async def work(served):
        pieces, found = await served.add("one", LONG), []
        while not found or not found[-1].finish_reason:
            try:
                found.append(await asyncio.wait_for(anext(pieces), 0.001))
            except TimeoutError:
                continue
        return found

    check(run(engine, work), expected, 0)


def test_what_is_refused_is_told_to_who_asked(params):
    engine = polarjax.Engine(params, slots=1, context=64, max_waiting=1, **GREEDY)

    async def work(served):
        with pytest.raises(ValueError, match="prompt 0 has token id 999"):
            await served.add([999])
        with pytest.raises(ValueError, match="top_p must be above 0"):
            await served.add([9], Settings(top_p=0.0))
        with pytest.raises(polarjax.RequestFailed, match="yields NaN"):
            await read(served, [14])
        found = await asyncio.gather(
            *(read(served, "one") for _ in range(6)), return_exceptions=True
        )
        full = [x for x in found if isinstance(x, polarjax.QueueFull)]
        assert full and "larger max_waiting" in str(full[0])
        assert len(full) + sum(isinstance(x, list) for x in found) == 6
        return await read(served, "one")

    slow_down(engine, 0.02)  # so that some come while others wait
    assert len(together(run(engine, work)).tokens) == 40


def test_closing_ends_all_readers(engine):
    async def work(served):
        readers = [asyncio.create_task(read(served, prompt)) for prompt in PROMPTS]
        while len(served._driver._readers) < 4:
            await asyncio.sleep(0)
        served.close()
        served.close()
        for error in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(error, RuntimeError), error
            assert "this engine is closed: make a new one" in str(error)
        with pytest.raises(RuntimeError, match="this engine is closed"):
            await served.add("one")

    slow_down(engine, 0.1)  # so that none ends by itself
    run(engine, work)


def test_an_error_of_the_engine_reaches_every_reader(engine):
    steps = []

    def fail():
        steps.append(time.sleep(0.02))
        if len(steps) > 3:
            raise OSError("the device is gone")
        return step()

    async def work(served):
        readers = (read(served, prompt) for prompt in PROMPTS)
        for error in await asyncio.gather(*readers, return_exceptions=True):
            assert str(error) == "the engine failed: the device is gone"
        with pytest.raises(RuntimeError, match="the engine failed: the device is gone"):
            await served.add("one")

    step, engine.step = engine.step, fail
    run(engine, work)


def test_readers_whose_loop_is_closed_are_cancelled(engine, expected):
    with polarjax.AsyncEngine(engine) as served:
        kept = []

        async def leave():
            kept.append(await served.add("two", LONG))

        asyncio.run(leave())
        check(asyncio.run(read(served, "one")), expected, 0)
        while kept[0]._reader.request.going:
            time.sleep(0.01)
    assert kept[0]._reader.request.finish_reason == "cancelled"


def test_many_readers_that_come_and_go_leave_nothing(engine, expected):
    """In any state of their requests, some before they were taken."""
    rng = random.Random(1)

    async def one(served, i):
        await asyncio.sleep(rng.random() / 4)
        if i % 4 == 0:
            return together(await read(served, PROMPTS[i % 3], LONG)).tokens
        limit = Settings(max_new_tokens=rng.randrange(1, 40), stop_ids=())
        try:
            await asyncio.wait_for(
                read(served, PROMPTS[i % 3], limit), rng.random() / 8
            )
        except TimeoutError:
            return None

    async def work(served):
        found = await asyncio.gather(*(one(served, i) for i in range(120)))
        while not engine.idle or served._driver._readers or served._driver._inbox:
            await asyncio.sleep(0.01)
        return found

    for i, tokens in enumerate(run(engine, work)):
        assert i % 4 or tokens == expected.tokens[i % 3]


def test_the_streams_of_the_docs_run(params, capsys):
    page = REPOSITORY / "docs" / "generation.md"
    if not page.exists():
        pytest.skip("needs the docs: run it in a clone of the repository")
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    plain, awaiting = (block for block in blocks if "piece.text" in block)
    with polarjax.Engine(params, slots=2, **GREEDY) as engine:
        exec(
            compile(plain, str(page), "exec"), {"polarjax": polarjax, "engine": engine}
        )
        said = capsys.readouterr().out
        assert (
            said == engine.generate(["Once upon a time"], max_new_tokens=200).texts[0]
        )
        names = {"polarjax": polarjax, "asyncio": asyncio, "engine": engine}
        code = f"async def main():\n{textwrap.indent(awaiting, '    ')}"
        exec(compile(code, str(page), "exec"), names)
        asyncio.run(names["main"]())
    assert len(capsys.readouterr().out) > 10
