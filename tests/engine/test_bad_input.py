"""Bad input to `generate` and `logits`: one clear error each, that names it."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax import Polar, Random
from polarjax.engine import Tokenizer
from polarjax.engine.checks import settings_of
from tests.models import GREEDY, LLAMA, random_params, write_checkpoint

CONFIG = dataclasses.replace(LLAMA, layers=2, vocab_size=257, context=32)
GOOD = [[1, 2, 3], [4]]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


@pytest.fixture(scope="module")
def with_tokenizer(params, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("bytes") / "model", params)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("a text", TypeError, "prompts must be a list of str or .* got str"),
        (None, TypeError, "prompts must be a list .* got NoneType"),
        (7, TypeError, "prompts must be a list .* got int"),
        ({"a": 1}, TypeError, "prompts must be a list .* got dict"),
        (np.ones(3, int), TypeError, "prompts must be a list .* got ndarray"),
        (np.ones((2, 3, 1), int), TypeError, "prompts must be a list .* got ndarray"),
        (np.ones((2, 3)), TypeError, "prompt 0 must be a str or a list of token ids"),
        ([], ValueError, "prompts is empty"),
        ((), ValueError, "prompts is empty"),
        ([[1], []], ValueError, "prompt 1 is empty"),
        ([1, 2, 3], TypeError, "prompt 0 must be a str or a list of token ids"),
        ([[1], None], TypeError, "prompt 1 must be a str or a list of token ids"),
        ([[1], [True]], TypeError, "prompt 1 must be"),
        ([[1], [2.0]], TypeError, "prompt 1 must be"),
        ([[1], ["a"]], TypeError, "prompt 1 must be"),
        ([[1], [[2]]], TypeError, "prompt 1 must be"),
        ([np.array([1.0])], TypeError, "prompt 0 must be"),
        ([[1], [2, 257]], ValueError, "prompt 1 has token id 257; ids go .* to 256"),
        ([[1], [-1]], ValueError, "prompt 1 has token id -1; ids go from 0"),
        ([[1], [10**30]], ValueError, "prompt 1 has token id 1000"),
        ([[1], [2] * 32], ValueError, "prompt 1 has 32 tokens; .* may have 31 at"),
        ([[1], "text"], ValueError, "prompt 1 is a str, but .* no tokenizer"),
    ],
)
def test_prompts(params, prompts, error, message):
    with pytest.raises(error, match=message):
        polarjax.generate(params, prompts)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["text", ""], "prompt 1 is empty"),
        (["x" * 32], "prompt 0 has 32 tokens; the model's context is 32"),
        (
            ["text", os.fsdecode(b"caf\xe9")],
            r"prompt 1 is no Unicode text: its character 3 is the lone surrogate "
            r"'\\udce9'",
        ),
        (["\ud83d"], r"prompt 0 is no .* character 0 is the lone surrogate '\\ud83d'"),
    ],
)
def test_texts(with_tokenizer, prompts, message):
    with pytest.raises(ValueError, match=message):
        polarjax.generate(with_tokenizer, prompts)


def test_a_tokenizer_beyond_the_vocabulary(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=50)
    small = write_checkpoint(tmp_path / "model", random_params(config, 0))
    with pytest.raises(ValueError, match=r"prompt 0 has token id 93; .* to 49"):
        polarjax.generate(small, ["!~"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"max_new_tokens": bad}, "max_new_tokens must be a positive integer")
            for bad in (0, -1, 1.5, True, None, "8", float("nan"), [4, 0])
        ),
        *(
            ({"prefill_tokens": bad}, "prefill_tokens must be a positive integer")
            for bad in (0, -1, 1.5, True)
        ),
        *(
            ({"temperature": bad}, "temperature must be a number from 0.0")
            for bad in (-0.1, float("nan"), float("inf"), None, "1", True, [1.0, None])
        ),
        *(
            ({"top_p": bad}, "top_p must be")
            for bad in (0, 0.0, -0.5, 1.1, float("nan"), None, "1", [0.5, 0.0])
        ),
        *(
            ({"top_k": bad}, "top_k must be an integer from 0")
            for bad in (-1, 2.5, float("nan"), None, "1", True, [1, -1], 2**31)
        ),
        *(
            ({"seed": bad}, "seed must be an integer from 0")
            for bad in (-1, 2**32, 10**400, 1.5, None, "1", True, [1, -1])
        ),
        *(
            ({"min_p": bad}, "min_p must be a number from 0.0 to 1.0, got")
            for bad in (-0.1, 1.1, float("nan"), None, "1", True, [0.5, 2])
        ),
        *(
            (
                {"repetition_penalty": bad},
                "repetition_penalty must be a number from 0.01 to 100.0, got",
            )
            for bad in (0, -1.0, 101, float("inf"), float("nan"), None, [1, 0])
        ),
        *(
            ({name: bad}, f"{name} must be a number from -2.0 to 2.0, got")
            for name in ("presence_penalty", "frequency_penalty")
            for bad in (-2.1, 2.1, float("nan"), None, "1", True, [1, 3])
        ),
        *(
            ({"logit_bias": bad}, f"logit_bias must be None or a dict .* got {shown}")
            for bad, shown in ((5, "5"), ("5", "'5'"), ([{1: 1}, 7], "7"))
        ),
        *(
            ({"logit_bias": {bad: 1.0}}, "logit_bias must name token ids from 0 to 256")
            for bad in (-1, 257, 1.0, "1", True, None)
        ),
        *(
            (
                {"logit_bias": [None, {5: bad}]},
                "logit_bias of token 5 must be a number from -100 to 100, got",
            )
            for bad in (-101, 100.1, float("nan"), float("inf"), None, "1", True)
        ),
        ({"logit_bias": [{}, {}, {}]}, "logit_bias has 3 values for 2 prompts"),
        ({"logit_bias": dict.fromkeys(range(301), 0)}, "300 tokens at most, got 301"),
        *(
            ({"allowed_token_ids": bad}, "allowed_token_ids must be None or a list of")
            for bad in ([], 5, "5", [[1], []], {1: 2}, np.zeros(0, int), set())
        ),
        *(
            ({"allowed_token_ids": bad}, "allowed_token_ids must name .* to 256, got")
            for bad in ([257], [-1], [1.5], [True], ["1"], [[1], [257]], {1, 300})
        ),
        ({"allowed_token_ids": [[1]] * 3}, "allowed_token_ids has 3 values for 2"),
        *(
            ({"min_tokens": bad}, "min_tokens must be an integer from 0")
            for bad in (-1, 1.5, None, True, "1", [1, -1])
        ),
        (
            {"min_tokens": 9, "max_new_tokens": [9, 8]},
            "min_tokens must be at most max_new_tokens, 8, got 9",
        ),
        (
            {"min_tokens": 1, "stop_ids": [5, 6], "allowed_token_ids": [6]},
            "min_tokens 1 leaves nothing to draw: all allowed_token_ids .* stop_ids",
        ),
        *(
            ({"ignore_eos": bad}, "ignore_eos must be True or False, got")
            for bad in (1, None, "yes", [True, 0])
        ),
        *(
            ({name: [1, 1, 1]}, f"{name} has 3 values for 2 prompts")
            for name in ("temperature", "top_p", "top_k", "seed", "max_new_tokens")
        ),
        ({"temperature": []}, "temperature has 0 values for 2 prompts"),
        ({"temperature": np.array([1.0])}, "temperature has 1 values for 2 prompts"),
        *(
            ({"stop_ids": bad}, "stop_ids must be")
            for bad in (7, "7", [-1], [257], [1.5], [True], [None], [[1]], 2.0)
        ),
        ({"stop": "end"}, "stop strings need a tokenizer"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; it must be one of"),
        ({"memory_fraction": "x"}, "memory_fraction must be above 0"),
        (
            {"policy": Random(0.5, seed="x")},
            "seed must be an integer from 0.*, got 'x'",
        ),
        *(
            ({"policy": Polar(0.5, balanced=bad)}, "balanced must be a positive integ")
            for bad in ("x", 2.0, 0)
        ),
        ({"policy": Polar(0.5, asks=("heads",))}, "asks may name .*, got 'heads'"),
    ],
)
def test_settings(params, settings, message):
    with pytest.raises(ValueError, match=message):
        polarjax.generate(params, GOOD, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"n": bad}, "n must be an integer from 1 to 128, got")
            for bad in (0, 129, 1.5, None, True, [1, 0])
        ),
        *(
            ({"sample": bad}, "sample must be an integer from 0 to 1073741824, got")
            for bad in (-1, 2**31, 1.5, None)
        ),
        *(
            ({name: bad}, f"{name} must be None or an integer from 0 to 20, got")
            for name in ("logprobs", "prompt_logprobs")
            for bad in (-1, 21, 1.5, True, "5", [None, 30])
        ),
        *(({"echo": bad}, "echo must be True or False, got") for bad in (1, None)),
    ],
)
def test_settings_that_no_engine_follows_yet(settings, message):
    with pytest.raises(ValueError, match=message):
        settings_of(CONFIG, None, 2, settings)


def test_a_vocabulary_that_ends_at_every_token():
    small = dataclasses.replace(CONFIG, vocab_size=60)
    with pytest.raises(ValueError, match="min_tokens 1 leaves nothing to draw"):
        settings_of(small, None, 2, {"min_tokens": 1, "stop_ids": range(60)})


def test_settings_of_one_request_or_of_each():
    asked = {
        "logit_bias": [{1: 2}, None],
        "allowed_token_ids": [None, np.array([5, 4, 5])],
        "logprobs": [3, None],
        "echo": [True, False],
        "ignore_eos": True,
        "min_p": np.float32(0.5),
        "n": 3,
        "top_k": np.array([4, 5]),
        "max_new_tokens": 9,
        "min_tokens": [0, 9],
    }
    one, other = settings_of(CONFIG, None, 2, asked)
    assert (one.logit_bias, other.logit_bias) == ({1: 2.0}, None)
    assert (one.allowed_token_ids, other.allowed_token_ids) == (None, (4, 5))
    assert (one.logprobs, other.logprobs, one.echo, other.echo) == (
        3,
        None,
        True,
        False,
    )
    assert (one.min_p, other.n, other.min_tokens, one.stop_ids) == (0.5, 3, 9, ())
    assert type(one.min_p) is float and type(other.top_k) is int
    # One dict and one list are one value, and checked settings stay as they are.
    for several in (
        {"logit_bias": {1: 2}, "allowed_token_ids": [4, 5]},
        {"allowed_token_ids": {4, 5}, "stop_ids": [9], "ignore_eos": True},
    ):
        one, other = settings_of(CONFIG, None, 2, {**several, "seed": [1, 1]})
        assert one == other
        assert settings_of(CONFIG, None, 1, dataclasses.asdict(one)) == [one]


def test_what_an_engine_is_not_made_for_is_refused(params):
    with polarjax.Engine(params, slots=1, **GREEDY) as engine:
        for settings, error in (
            ({"echo": True}, "^echo needs a tokenizer"),
            ({"logprobs": 0}, "^this engine tells no .* make it with logprobs=True"),
            ({"prompt_logprobs": 5}, "^this engine .* with prompt_logprobs=True"),
            ({"temperature": 1.0}, "^prompt 0 needs sampled drawing, and this engine"),
        ):
            with pytest.raises(ValueError, match=error):
                engine.add([1], polarjax.Settings(**settings))
            with pytest.raises(ValueError, match=error):
                engine.generate(GOOD, **settings)
        with pytest.raises(ValueError, match=r"^n must be 1 for one request, got 2"):
            engine.add([1], polarjax.Settings(n=2))


def test_settings_of_another_kind(params):
    with pytest.raises(
        TypeError, match=r"mesh must be a jax\.sharding\.Mesh.* got 'x'"
    ):
        polarjax.generate(params, GOOD, mesh="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"load must be .*Load, got 3"):
        polarjax.Engine(params, load=3)  # type: ignore[arg-type]


def test_weights_of_another_shape(params):
    weights = jax.tree.map(lambda leaf: leaf, params.weights)
    weights["layers_1"]["attention"]["qkv"] = jnp.zeros((3, CONFIG.dim))
    other = dataclasses.replace(params, weights=weights)
    with pytest.raises(ValueError, match=r"layers_1.*qkv.* is float32\[3, .* needs \["):
        polarjax.generate(other, GOOD)


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [1], 5, None, [None], {"a": 1}])
def test_stop_strings(with_tokenizer, stop):
    with pytest.raises(ValueError, match="stop must be non-empty strings"):
        polarjax.generate(with_tokenizer, ["text"], stop=stop)


def test_a_stop_string_that_is_no_text(with_tokenizer):
    with pytest.raises(
        ValueError, match=r"the stop string 'a\\udcff' is no Unicode text.* character 1"
    ):
        polarjax.generate(with_tokenizer, ["text"], stop=["b", "a\udcff"])


def test_texts_that_are_none(with_tokenizer):
    tokenizer = Tokenizer.require(with_tokenizer.config, "the test")
    with pytest.raises(ValueError, match=r"text 1 is no Unicode .* character 2 is"):
        tokenizer.encode_many(["good", "ba\ud800d"])
    with pytest.raises(ValueError, match=r"the text is no Unicode text"):
        tokenizer.encode("\udcff")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', "\0"])
def test_a_damaged_tokenizer(with_tokenizer, tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    config = dataclasses.replace(with_tokenizer.config, folder=str(tmp_path))
    damaged = dataclasses.replace(with_tokenizer, config=config)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        polarjax.generate(damaged, ["text"])


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, 2], None, r"tokens must be integers of shape \[b, t\], got int64 \[2\]"),
        (5, None, "tokens must be integers of shape"),
        ("text", None, "tokens must be integers of shape"),
        ([[1.5]], None, "tokens must be integers of shape"),
        ([[True]], None, "tokens must be integers of shape"),
        ([[[1]]], None, "tokens must be integers of shape"),
        ([], None, "tokens must be integers of shape"),
        (np.zeros((0, 3), int), None, r"tokens has shape \[0, 3\]"),
        (np.zeros((2, 0), int), None, r"tokens has shape \[2, 0\]; t may be 1 to 32"),
        (np.zeros((1, 33), int), None, r"tokens has shape \[1, 33\]; t may be 1 to 32"),
        ([[1, 2], [3]], None, "rows of tokens differ in length"),
        ([[1, 257]], None, "ids go from 0 to 256, got 1 to 257"),
        ([[-1, 2]], None, "ids go from 0 to 256, got -1 to 2"),
        ([[1, 2]], [3], "lengths must be 1 integers from 1 to 2"),
        ([[1, 2]], [0], "lengths must be 1 integers from 1 to 2"),
        ([[1, 2]], [1, 1], "lengths must be 1 integers from 1 to 2"),
        ([[1, 2]], 1, "lengths must be 1 integers from 1 to 2"),
        ([[1, 2]], [1.5], "lengths must be 1 integers from 1 to 2"),
    ],
)
def test_logits(params, tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        polarjax.logits(params, tokens, lengths)
