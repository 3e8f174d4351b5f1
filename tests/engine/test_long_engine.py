"""An engine that outlives its calls: more requests than slots, one after another."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

import polarjax
from polarjax.policies import with_learned
from tests.models import GREEDY, LLAMA, OPT, random_params
from tests.policies.reference import assert_same, decode, random_prompts, uniform

# A shape of its own, so that no other test has compiled its programs before.
CONFIG = dataclasses.replace(LLAMA, layers=2, neurons=88)
LENGTHS = (3, 11, 1, 7, 20, 2, 9)
NEW = 12
DENSITIES = [1.0, 0.5, 0.25, 0.75, 0.5, 1.0, 0.25]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 3, routers=True)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(CONFIG, LENGTHS, 3)


@pytest.fixture(scope="module")
def alone(params, prompts):
    """What each prompt gets, in plain numpy."""
    chosen = uniform(CONFIG, DENSITIES)
    return decode(params, prompts, [NEW] * len(prompts), chosen)


@pytest.fixture(scope="module")
def engine(params):
    with polarjax.Engine(params, slots=2, context=64, **GREEDY) as engine:
        yield engine


def drain(engine):
    while not engine.idle:
        engine.step()


def test_more_prompts_than_slots_get_what_each_gets_alone(engine, prompts, alone):
    for _ in range(2):  # the second call finds rows that others have left
        events = [[] for _ in prompts]
        out = engine.generate(
            prompts,
            max_new_tokens=NEW,
            density=DENSITIES,
            stream=lambda i, _, tokens: events[i].extend(tokens),  # noqa: B023
        )
        assert_same(out, alone, CONFIG)
        assert events == out.tokens
        assert out.finish_reasons == ["length"] * len(prompts)
        assert out.stats.prompt_tokens == sum(LENGTHS)
        assert out.stats.new_tokens == NEW * len(prompts)


def test_requests_come_and_go(engine, prompts, alone):
    def add(i, **changes):
        settings = polarjax.Settings(NEW, DENSITIES[i], **changes)
        return engine.add(prompts[i], settings)

    first, second, third = map(add, (0, 1, 2))
    while not first.tokens or not second.tokens:
        engine.step()  # two begin, the third waits
    assert third.tokens == []
    second.cancel()  # amid what is computed
    engine.cancel(third)  # before it began
    fourth, fifth = add(3), add(4)
    drain(engine)
    assert second.finish_reason == third.finish_reason == "cancelled"
    assert second.tokens == alone.tokens[1][: len(second.tokens)]
    assert third.tokens == []
    for i, request in ((0, first), (3, fourth), (4, fifth)):
        assert request.finish_reason == "length"
        assert request.tokens == alone.tokens[i]
    # Of two alike the one that is meant is cancelled.
    one, other = add(5), add(5)
    engine.cancel(other)
    drain(engine)
    assert one.tokens == alone.tokens[5] and other.tokens == []
    # A stop token frees a row at once; settings are each request's own.
    stops = (alone.tokens[0][4],)
    stopped, going = add(0, stop_ids=stops), add(0)
    drain(engine)
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == going.tokens[: len(stopped.tokens)]
    assert len(stopped.tokens) <= 4 and going.tokens == alone.tokens[0]


def test_what_an_engine_cannot_take(engine, params, prompts, alone):
    with pytest.raises(ValueError, match=r"prompt 1 has 64 tokens, and a slot .* 64"):
        engine.generate([[1], [1] * 64])
    with pytest.raises(ValueError, match="prompt 0 has 64 tokens"):
        engine.add([1] * 64)
    with pytest.raises(ValueError, match="density must be a number above 0"):
        engine.add([1], polarjax.Settings(density=2.0))
    with pytest.raises(TypeError, match="no setting 'colour': there are max_new_tok"):
        engine.generate([[1]], colour=3)
    assert engine.idle  # none of a call that was refused is left behind

    def stream(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, stream=stream)
    before = engine.generate(prompts[:1], max_new_tokens=NEW, density=1.0)
    assert before.tokens == alone.tokens[:1] and engine.idle
    options = {"slots": 2, "context": 32, **GREEDY}
    budgeted = with_learned(params, budgets=(4, 2))
    with polarjax.Engine(budgeted, densities=False, **options) as fixed:
        with pytest.raises(ValueError, match=r"density 0.5: this engine's .* none"):
            fixed.generate([[1]], density=0.5)
    opt = random_params(dataclasses.replace(OPT, layers=2), routers=True, neuron_rank=4)
    shared = polarjax.Polar(neuron_density=0.5)
    with polarjax.Engine(opt, policy=shared, **options) as both:
        with pytest.raises(ValueError, match=r"density 1 promises .* exact MLP"):
            both.generate([[1]], density=1.0)
    with pytest.raises(ValueError, match="slots must be a positive integer"):
        polarjax.Engine(params, slots=0)
    with pytest.raises(ValueError, match="context must be a positive integer"):
        polarjax.Engine(params, context=-1)


compiled: collections.Counter = collections.Counter()


def _count(event, _seconds, fun_name="", **_):
    if event.endswith("backend_compile_duration"):
        compiled[fun_name] += 1


def test_calls_of_the_same_powers_of_two_compile_once(params):
    """256 prompts of ragged lengths, in four calls of 64."""
    jax.monitoring.register_event_duration_secs_listener(_count)
    rng = np.random.default_rng(0)

    def call(number):
        lengths = rng.integers(1, 60, 64).tolist()
        out = polarjax.generate(
            params,
            random_prompts(CONFIG, lengths, number),
            max_new_tokens=int(rng.integers(18, 30)),
            density=rng.uniform(0.1, 1, 64).tolist(),
            stop_ids=[int(rng.integers(CONFIG.vocab_size))],
        )
        return out.stats

    first = call(0)
    assert compiled["jit(decode)"] == 1 and first.compile_seconds > 0
    compiled.clear()
    for number in range(1, 4):
        stats = call(number)
        assert not compiled, compiled
        assert stats.compile_seconds < 0.1 * first.compile_seconds
