"""A load is played by the clock; what a real engine reads is counted."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.bench import counts, serve
from polarjax.bench.loads import Ask, make_load
from polarjax.bench.serve import Times, play
from tests.models import LLAMA, random_params


class Clock:
    """Time that passes where somebody says so."""

    def __init__(self):
        self.time, self.slept = 100.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds

    @property
    def times(self):
        return Times(lambda: self.time, self.sleep)


@dataclasses.dataclass(eq=False)
class Request:
    limit: int
    tokens: list
    density: float | None
    going: bool = True
    finish_reason: str = ""


class Engine:
    """Continues so many requests by so many tokens in each step, which takes 1 s."""

    def __init__(self, clock, slots=2, chunk=2, loses=None):
        self.clock, self.slots, self.chunk, self.loses = clock, slots, chunk, loses
        self.requests, self.steps = [], 0

    @property
    def idle(self):
        return not any(one.going for one in self.requests) or self.loses == "all"

    def add(self, prompt, settings):
        assert settings.stop_ids == () and isinstance(prompt, list)
        self.requests.append(Request(settings.max_new_tokens, [], settings.density))
        return self.requests[-1]

    def cancel(self, request):
        request.going, request.finish_reason = False, "cancelled"

    def step(self):
        self.clock.time += 1.0
        self.steps += 1
        if self.loses == "error":
            raise RuntimeError("broken")
        live = [one for one in self.requests if one.going][: self.slots]
        for one in live:
            new = min(self.chunk, one.limit - len(one.tokens))
            one.tokens += [1] * (new - (self.loses == "tokens"))
            if len(one.tokens) >= one.limit - (self.loses == "tokens"):
                one.going, one.finish_reason = False, "length"
        return live


def asks(*new_tokens):
    return [Ask(np.arange(1, 4, dtype=np.int32), n) for n in new_tokens]


def seen(traces):
    return [(trace.sent, trace.chunks) for trace in traces]


def test_all_at_once():
    clock, ended = Clock(), []
    engine = Engine(clock)
    traces = play(
        engine,
        asks(3, 5, 2),
        [0.0] * 3,
        density=0.5,
        times=clock.times,
        ended=lambda: ended.append(clock.time),
    )
    assert seen(traces) == [
        (0, ((1, 2), (2, 1))),
        (0, ((1, 2), (2, 2), (3, 1))),
        (0, ((3, 2),)),  # it waited for a slot
    ]
    assert [trace.prompt_tokens for trace in traces] == [3, 3, 3]
    assert ended == [102, 103, 103] and not clock.slept
    assert {one.density for one in engine.requests} == {0.5}
    assert engine.steps == 3


def test_a_request_counts_from_its_arrival():
    """Also where the engine is busy then; where there is nothing to do, one sleeps."""
    clock = Clock()
    engine = Engine(clock)
    traces = play(engine, asks(2, 2, 2), [0.5, 1.0, 4.25], times=clock.times)
    # Stepping from 0.5 to 1.5, the engine first sees the second request then.
    assert seen(traces) == [(0.5, ((1.5, 2),)), (1, ((2.5, 2),)), (4.25, ((5.25, 2),))]
    assert clock.slept == [0.5, 1.75] and engine.steps == 3


def test_a_client_holds_requests_back():
    """They count from when a place is free, or from their arrival if that is later."""
    clock = Clock()
    due = [0.0, 0.0, 0.0, 4.5]
    traces = play(
        Engine(clock, slots=8), asks(2, 4, 2, 2), due, most_open=2, times=clock.times
    )
    assert seen(traces) == [
        (0, ((1, 2),)),
        (0, ((1, 2), (2, 2))),
        (1, ((2, 2),)),
        (4.5, ((5.5, 2),)),
    ]


def test_a_request_that_gets_too_little_is_told():
    clock = Clock()
    engine = Engine(clock, loses="tokens")
    message = r"request 1 ended after 1 tokens of 2, as 'length'"
    with pytest.raises(RuntimeError, match=message):
        play(engine, asks(9, 2), [0.0, 0.0], times=clock.times)
    assert [one.finish_reason for one in engine.requests] == ["cancelled", "length"]


@pytest.mark.parametrize(
    ("loses", "message"),
    [("error", "broken"), ("all", "is idle, 2 requests are not")],
)
def test_an_engine_that_fails_is_left_without_requests(loses, message):
    clock = Clock()
    engine = Engine(clock, loses=loses)
    with pytest.raises(RuntimeError, match=message):
        play(engine, asks(2, 2), [0.0, 0.0], times=clock.times)
    assert not any(one.going for one in engine.requests)


def test_to_warm_up_is_to_play_a_short_beginning():
    clock = Clock()
    engine = Engine(clock, slots=8, chunk=16)
    serve.warm(engine, asks(5, 500), times=clock.times)
    assert [len(one.tokens) for one in engine.requests] == [5, serve.WARM_TOKENS]


def test_static_batches(monkeypatch):
    """One after the other, each to the end of its longest request."""
    clock, called = Clock(), []

    def generate(params, prompts, *, max_new_tokens, stop_ids, stream, density):
        called.append(max_new_tokens)
        assert params == "model" and density == 0.5 and stop_ids == ()
        for step in range(max(max_new_tokens)):
            clock.time += 1.0
            for i, limit in enumerate(max_new_tokens):
                if step < limit:
                    stream(i, "", [7])
        return polarjax.Output([], None, [], ["length"] * len(prompts), "stats")

    monkeypatch.setattr(serve, "generate", generate)
    ended = []
    traces, stats = serve.play_static(
        "model",
        asks(1, 3, 2),
        2,
        options={"density": 0.5},
        times=clock.times,
        ended=lambda: ended.append(1),
    )
    assert called == [[1, 3], [2]] and stats == ["stats"] * 2 and len(ended) == 3
    assert seen(traces) == [
        (0, ((1, 1),)),
        (0, ((1, 1), (2, 1), (3, 1))),
        (0, ((4, 1), (5, 1))),
    ]
    called.clear()
    clock.time = 0.0
    serve.warm_static("model", asks(1, 3, 2), 2, {"density": 0.5})
    # One step of each batch, and what `generate` does at its end.
    assert called == [[1, 3], [2], [1]] and clock.time == 3


@pytest.fixture(scope="module")
def params():
    return random_params(LLAMA, routers=True)


@pytest.fixture(scope="module")
def load():
    return make_load("chat", 6, LLAMA.vocab_size, 64, most_new_tokens=6)


@pytest.mark.parametrize("density", [None, 0.5])
def test_what_an_engine_reads_is_what_generate_says(params, load, density):
    """Each request alone, and all in two slots: the same groups, the same bytes."""
    policy = polarjax.Dense() if density is None else params.policy
    options = {"density": 0.5} if density else {"policy": policy}
    traces, stats = serve.play_static(params, load, 4, options=options)
    static = counts.reached_static(stats, load, 4)
    assert [trace.new_tokens for trace in traces] == [ask.new_tokens for ask in load]
    with polarjax.Engine(params, policy=policy, slots=2, context=64) as engine:
        with counts.counted(engine) as reached:
            assert reached() is None
            play(engine, load, [0.0] * len(load), density=density)
            found = reached()
        assert engine.idle
        play(engine, load[:1], [0.0], density=density)
        assert reached() == found  # what comes after does not count
    # Layer 0 reads all 4 groups, of the others each 2.
    wanted = (1.0, 0.5, 0.5, 0.5) if density else (1.0,) * 4
    np.testing.assert_allclose(found.density, wanted)
    np.testing.assert_allclose(static.density, wanted)
    # A token that is decoded sees all before it, in 4 layers of 4 groups.
    rows = sum(
        sum(range(len(ask.prompt) + 1, len(ask.prompt) + ask.new_tokens))
        for ask in load
    )
    whole = rows * 4 * 4 * 2 * LLAMA.head_dim * jnp.dtype(params.dtype).itemsize
    for one in (found, static):
        assert one.kv_bytes_dense == whole
        assert one.kv_bytes == whole * sum(wanted) / 4
        assert one.mean_density == one.kv_fraction == sum(wanted) / 4
    decoded = [ask.new_tokens - 1 for ask in load]
    assert static.steps == max(decoded[:4]) + max(decoded[4:])
    assert sum(decoded) / 2 <= found.steps <= sum(decoded)


def test_batches_count_by_their_steps():
    def batch(density, read):
        zeros = dict.fromkeys(
            field.name for field in dataclasses.fields(polarjax.Stats)
        )
        given = {"density": density, "kv_bytes": read, "kv_bytes_dense": 8.0}
        return polarjax.Stats(**{**zeros, **given})

    # 3 live steps, then one, then a batch of single tokens, which takes none.
    stats = [batch((1.0, 0.5), 5.0), batch((1.0, 1.0), 8.0), batch((), 0.0)]
    found = counts.reached_static(stats, asks(3, 2, 2, 1, 1), 2)
    assert found == counts.Reached((1.0, 0.625), 13.0, 24.0, 3)
    assert counts.reached_static(stats[2:], asks(1, 1), 2) is None


def test_an_engine_that_counts_nothing_is_asked_nothing():
    with counts.counted(Engine(Clock())) as reached:
        assert reached() is None


def test_an_engine_counts_for_one_at_a_time(params):
    with polarjax.Engine(params, slots=2, context=64) as engine:
        with engine.counting(), pytest.raises(RuntimeError, match="counts already"):
            with engine.counting():
                pass
        with engine.counting(), pytest.raises(RuntimeError, match="goes on already"):
            engine.generate([[1, 2]], max_new_tokens=2)
        assert engine.generate([[1, 2]], max_new_tokens=2).stats.density
    with pytest.raises(RuntimeError, match="closed"), engine.counting():
        pass


def test_compilations_are_counted():
    import jax

    with counts.compilations() as found:
        jax.jit(lambda x: x * 3 + 1)(np.arange(7.0))
    assert found.count == 1 and found.seconds > 0
    jax.jit(lambda x: x * 5 + 1)(np.arange(7.0))
    assert found.count == 1
