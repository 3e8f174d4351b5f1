"""Settings that nobody sends in earnest: refused soon, by one short line."""

import dataclasses
import re
import time

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax import Settings
from polarjax.engine.checks import settings_of, settings_of_one
from polarjax.engine.request import Request
from polarjax.engine.tokenizer import Tokenizer
from polarjax.policy import Load
from tests.models import GREEDY, LLAMA, byte_tokenizer, random_params

CONFIG = dataclasses.replace(LLAMA, layers=2, vocab_size=257, context=32)
SIZES = dict(slots=2, page=16, pages=8, prefill_tokens=32, **GREEDY)
NAMES = [field.name for field in dataclasses.fields(Settings)]
TOKENIZER = Tokenizer(byte_tokenizer())


class Lines:
    def __repr__(self):
        return "line\n" * 100_000


BAD = {
    "huge": 10**400,
    "without digits": 10**6000,
    "negative": -(2**70),
    "text": "x\n" * 10**6,
    "bytes": b"\x02",
    "bytearray": bytearray(b"\x02" * 10**6),
    "memory": memoryview(b"\x02"),
    "masked": np.ma.masked_array([1, 2], [0, 1]),
    "matrix": np.zeros((2, 3)),
    "a list of one": [1],
    "an array of one": np.array([0.5]),
    "an array of a device": jnp.ones(1),
    "texts": ["x\n" * 10**5] * 3,
    "a million": [1] * 10**6,
    "a million, one wrong": (*(["a"] * 10**6), 3),
    "half a range": range(2**70),
    "a dict": dict.fromkeys(range(10**6), 0.0),
    "a set": set(range(10**6)),
    "lists": [[1], [[2] * 10**5]],
    "lines": Lines(),
    "a list of them": [Lines()] * 5,
    "not a number": float("nan"),
    "none": [None],
    "surrogate": "\ud800" * 99,
}
# What of it is good: a list of one id, a text that ends an answer, and so on.
GOOD = {
    ("stop_ids", "a list of one"),
    ("allowed_token_ids", "a list of one"),
    ("allowed_token_ids", "none"),
    ("max_new_tokens", "huge"),  # which the context bounds
    ("max_new_tokens", "without digits"),
}


def message_of(error):
    text = str(error.value)
    assert len(text) <= 320 and text.isprintable(), text[:400]
    return text


@pytest.mark.parametrize("kind", BAD)
def test_a_message_names_the_setting_in_one_short_line(kind):
    start = time.process_time()
    for name in NAMES:
        if (name, kind) in GOOD - {("allowed_token_ids", "none")}:
            settings_of_one(CONFIG, TOKENIZER, Settings(**{name: BAD[kind]}))
            continue
        with pytest.raises((ValueError, TypeError)) as error:
            settings_of_one(CONFIG, TOKENIZER, Settings(**{name: BAD[kind]}))
        assert name in message_of(error), name
        if (name, kind) in GOOD:
            continue
        with pytest.raises((ValueError, TypeError)) as error:
            settings_of(CONFIG, TOKENIZER, 7, {name: BAD[kind]})
        assert name in message_of(error), name
    assert time.process_time() - start < 2


def test_names_and_requests_of_another_kind():
    with pytest.raises(TypeError, match=r"^no setting 'x") as error:
        settings_of(CONFIG, None, 1, {"x" * 10**6: 1})
    message_of(error)
    for bad in ({}, [], 0, False, "", (), "greedy", {"top_k": 1}, Settings, Lines()):
        with pytest.raises(
            TypeError, match=r"^settings must be polarjax\.Settings"
        ) as e:
            settings_of_one(CONFIG, None, bad)  # type: ignore[arg-type]
        message_of(e)
    default = settings_of_one(CONFIG, None, None)
    assert default == settings_of_one(CONFIG, None, Settings())
    assert settings_of_one(CONFIG, None, default) == default


def test_a_request_has_one_value_of_each():
    one = Settings(
        temperature=np.array(0.5),  # type: ignore[arg-type]
        top_k=np.int64(3),  # type: ignore[arg-type]
        stop=["a"],  # type: ignore[arg-type]
        stop_ids=np.array([4]),  # type: ignore[arg-type]
        allowed_token_ids=range(9),  # type: ignore[arg-type]
        density=0.5,
    )
    checked = settings_of_one(CONFIG, TOKENIZER, one)
    assert (checked.temperature, checked.top_k) == (0.5, 3)
    assert (checked.stop, checked.stop_ids) == (("a",), (4,))
    assert checked.allowed_token_ids == tuple(range(9))
    for name in ("temperature", "seed", "density", "echo", "logprobs", "n"):
        given = getattr(Settings(n=1, density=0.5, logprobs=1), name)
        assert getattr(settings_of(CONFIG, None, 1, {name: [given]})[0], name) == given
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got \["):
            settings_of_one(CONFIG, None, Settings(**{name: [given]}))
    with pytest.raises(ValueError, match=r"^density has 2 values for 3 prompts"):
        settings_of(CONFIG, None, 3, {"density": [0.5, 1]})


def test_settings_are_compared_and_hashed():
    kinds = [
        {"logit_bias": {1: 2.0}},
        {"logit_bias": {1: 3.0}},
        {"stop": ["a"]},
        {"stop_ids": [1]},
        {"allowed_token_ids": [1, 2]},
        {"seed": 1},
    ]
    known = {Settings(**kind): i for i, kind in enumerate(kinds)}
    assert len(known) == len(kinds)
    assert [known[Settings(**kind)] for kind in kinds] == list(range(len(kinds)))


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"stop": ("ab",) * 64}, {"stop": ("ab",) * 65}, "stop must be 64 strings at"),
        ({"stop": "x" * 256}, {"stop": "x" * 257}, "string of stop must have 256 char"),
        ({"stop_ids": [3] * 64}, {"stop_ids": [3] * 65}, "stop_ids must be 64 token i"),
        (
            {"allowed_token_ids": [3] * 257},
            {"allowed_token_ids": [3] * 258},
            "allowed_token_ids must be 257 token ids at most, got 258",
        ),
        (
            {"logit_bias": dict.fromkeys(range(257), 0.0)},
            {"logit_bias": dict.fromkeys(range(301), 0.0)},
            "logit_bias must name 300 tokens at most, got 301",
        ),
    ],
)
def test_bounds_of_what_a_client_sends(good, bad, message):
    settings_of_one(CONFIG, TOKENIZER, Settings(**good))
    with pytest.raises(ValueError, match=message):
        settings_of_one(CONFIG, TOKENIZER, Settings(**bad))


def test_many_requests_share_one_look_at_their_tokens():
    allowed = list(range(257))
    start = time.process_time()
    asked = settings_of(CONFIG, None, 20_000, {"allowed_token_ids": allowed})
    assert time.process_time() - start < 3
    assert asked[0].allowed_token_ids is asked[-1].allowed_token_ids


def test_the_longest_stop_strings_hold_up_nobody():
    # What a text ends in may begin each of them, at any length.
    stops = tuple("a" * (255 - i) + "b" * (1 + i) for i in range(64))
    request = Request([5], 3000, TOKENIZER, stops)
    [a] = TOKENIZER.encode("a")
    start = time.process_time()
    for _ in range(1000):
        request.add([a], [0.0], ended=False)
        request.piece()
    assert time.process_time() - start < 2
    assert request.going


def test_text_is_held_back_while_it_may_begin_a_stop_string():
    rng = np.random.default_rng(0)
    for _ in range(300):
        stops = ["".join(rng.choice([*"ab"], size=rng.integers(1, 6))) for _ in "abc"]
        request, text, told = Request([5], 99, TOKENIZER, tuple(stops)), "", ""
        while request.going and len(text) < 20:
            piece = str(rng.choice([*"abc"]))
            text += piece
            request.add(TOKENIZER.encode(piece), [0.0], ended=False)
            told += request.news()[0]
            cuts = [text.find(stop) for stop in stops if stop in text]
            starts = [stop[:n] for stop in stops for n in range(1, len(stop))]
            held = max((len(s) for s in starts if text.endswith(s)), default=0)
            assert request.going == (not cuts)
            assert told == text[: min(cuts) if cuts else len(text) - held]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


@pytest.mark.parametrize(
    "name",
    [
        "slots",
        "pages",
        "page",
        "prefill_tokens",
        "ahead",
        "swap_bytes",
        "context",
        "max_waiting",
    ],
)
def test_sizes_of_an_engine(params, name):
    bad = [-1, 1.5, True, "1", b"\x01", [1], float("inf"), Lines(), BAD["masked"]]
    huge = [2**31 - 1, 2**31, 2**63, 2**70, 10**400, 10**6000]
    if name == "swap_bytes":
        huge = huge[2:]
    if name in ("context", "max_waiting"):  # which are no sizes
        huge = []
    for value in (*bad, *huge):
        with pytest.raises(ValueError, match=rf"^{name} must be ") as error:
            polarjax.Engine(params, **{**SIZES, name: value})
        message_of(error)
    if huge and name != "page":  # also where the memory says how many pages there are
        asked = {**SIZES, "pages": None} if name != "pages" else SIZES
        with pytest.raises(ValueError, match=rf"^{name} must be at most "):
            polarjax.Engine(params, **{**asked, name: huge[0]})


def test_other_arguments_of_an_engine(params):
    for bad in (5, None, "x", [1], Lines()):
        with pytest.raises(TypeError, match=r"^variants must be Variants") as error:
            polarjax.Engine(params, **{**SIZES, "variants": bad})
        message_of(error)
    for bad in ([], "", 5, "x" * 10**6, 10**400, BAD["masked"]):
        with pytest.raises(ValueError, match=r"^implementation is ") as error:
            polarjax.Engine(params, implementation=bad, **SIZES)
        message_of(error)
    for field, value in (("batch", 10**400), ("context", 2**70), ("density", 2)):
        load = dataclasses.replace(Load(1, 1), **{field: value})
        with pytest.raises(ValueError, match=rf"^load's {field} must be") as error:
            polarjax.Engine(params, load=load, **SIZES)
        message_of(error)
    for name in ("policy", "load", "mesh", "densities", "prefix_cache", "logprobs"):
        for bad in (5, "x" * 10**6, Lines()):
            with pytest.raises(TypeError, match=name) as error:
                polarjax.Engine(params, **{**SIZES, name: bad})
            message_of(error)


@pytest.mark.parametrize(
    "name",
    [
        "prefill_tokens",
        "memory_fraction",
        "policy",
        "mesh",
        "implementation",
        "stream",
        "progress",
        "errors",
    ],
)
def test_arguments_of_a_call(params, name):
    for bad in (10**400, 2**40, b"\x02", "x" * 10**6, BAD["masked"], Lines()):
        with pytest.raises((ValueError, TypeError), match=name) as error:
            polarjax.generate(params, [[1]], max_new_tokens=1, **{name: bad})
        message_of(error)


def test_an_engine_says_what_it_lacks(params):
    policy = polarjax.Polar(flexible=False)
    with pytest.raises(ValueError, match=re.escape("or an Engine policy= with one")):
        polarjax.Engine(params, policy=policy, densities=False, **SIZES)
