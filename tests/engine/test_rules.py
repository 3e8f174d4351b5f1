"""Biases, bans and penalties: by hand, and by `transformers`."""

import dataclasses

import jax
import numpy as np
import pytest

from polarjax.engine.checks import settings_of, stop_table
from polarjax.engine.filters import filtered
from polarjax.engine.rules import History, make_rules, ruled
from tests.engine.rules_by_hand import CONFIG, EVERYTHING, by_hand

CONTEXT = 24

# Bits depend on what a compiler makes of a program.
pytestmark = pytest.mark.usefixtures("as_users_do")

jitted = jax.jit(ruled)


def rules_of(asked, config=CONFIG):
    settings = [settings_of(config, None, 1, one)[0] for one in asked]
    return make_rules(config, settings, stop_table(settings))


def batch(rows, seed=0, v=CONFIG.vocab_size):
    """Logits, and histories of few different tokens: prompt, output, and garbage."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(rows, v)) * 3).astype(np.float32)
    logits[:, 5] = 0
    prompt = rng.integers(1, 9, rows).astype(np.int32)
    position = (prompt + rng.integers(0, 14, rows)).astype(np.int32)
    tokens = rng.integers(0, 9, (rows, CONTEXT)).astype(np.int32)
    tokens[np.arange(CONTEXT) >= position[:, None]] = 20
    return logits, History(tokens, prompt), position


@pytest.mark.parametrize("name", [*EVERYTHING, "all"])
def test_each_does_what_it_says(name):
    asked = EVERYTHING if name == "all" else {name: EVERYTHING[name]}
    # One row in three asks for nothing, and stays as it is.
    each = [{} if i % 3 == 0 else asked for i in range(30)]
    logits, history, position = batch(30)
    found = np.asarray(jitted(logits, rules_of(each), history, position))
    assert found[::3].tobytes() == logits[::3].tobytes()
    for i, one in enumerate(each):
        own = history.tokens[i, : position[i]].tolist()
        expected = by_hand(logits[i], one, own, history.prompt[i])
        np.testing.assert_array_equal(found[i], expected)
    changed = (found != logits).any(axis=1)
    assert changed[np.arange(30) % 3 > 0].sum() >= (18 if name != "min_tokens" else 5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name",
    ["logit_bias", "allowed_token_ids", "min_tokens", "repetition_penalty", "all"],
)
def test_each_is_that_of_transformers(name, seed):
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    process = pytest.importorskip(
        "transformers.generation.logits_process",
        reason="needs it: pip install transformers",
    )
    asked = dict(EVERYTHING, presence_penalty=0.0, frequency_penalty=0.0)
    asked = asked if name == "all" else {name: asked[name]}
    sampled = {"temperature": 0.7, "min_p": 0.02, "top_k": 15, "top_p": 0.9}
    logits, history, position = batch(12, seed)
    rules = rules_of([asked] * 12)

    @jax.jit
    def both(logits, rules, history, position):
        scores = ruled(logits, rules, history, position)
        every = np.ones(12, np.float32)
        warm = scores / (every * sampled["temperature"])[:, None]
        k, p, m = (sampled[x] * every for x in ("top_k", "top_p", "min_p"))
        return scores, filtered(warm, k.astype(np.int32), p, m)

    scores, kept = both(logits, rules, history, position)
    given = {"logit_bias": None, "allowed_token_ids": None, "min_tokens": 0, **asked}
    for i in range(12):
        prompt, ids = int(history.prompt[i]), history.tokens[i : i + 1, : position[i]]
        ids = torch.from_numpy(ids).long()
        chain = []
        if given["logit_bias"]:
            sequences = {(k,): float(x) for k, x in given["logit_bias"].items()}
            chain.append(process.SequenceBiasLogitsProcessor(sequences))
        if given["allowed_token_ids"]:
            allowed = given["allowed_token_ids"]
            chain.append(
                process.PrefixConstrainedLogitsProcessor(
                    lambda _, __, allowed=allowed: allowed, 1
                )
            )
        chain.append(
            process.MinNewTokensLengthLogitsProcessor(
                prompt, given["min_tokens"], list(CONFIG.eos_ids)
            )
        )
        chain.append(
            process.RepetitionPenaltyLogitsProcessor(
                float(asked.get("repetition_penalty", 1.0))
            )
        )
        theirs = torch.from_numpy(logits[i : i + 1])
        for one in chain:
            theirs = one(ids, theirs)
        np.testing.assert_array_equal(scores[i], theirs[0].numpy())
        for one in (
            process.TemperatureLogitsWarper(sampled["temperature"]),
            process.MinPLogitsWarper(sampled["min_p"]),
            process.TopKLogitsWarper(sampled["top_k"]),
            process.TopPLogitsWarper(sampled["top_p"]),
        ):
            theirs = one(ids, theirs)
        np.testing.assert_allclose(kept[i], theirs[0].numpy(), rtol=3e-7)


def test_a_row_does_not_depend_on_its_mates():
    logits, history, position = batch(32, seed=4)
    kinds = [{}, EVERYTHING, *({name: x} for name, x in EVERYTHING.items())]
    each = [kinds[i % len(kinds)] for i in range(32)]
    found = np.asarray(jitted(logits, rules_of(each), history, position))
    order = np.random.default_rng(0).permutation(32)
    moved = History(history.tokens[order], history.prompt[order])
    rules = rules_of([each[i] for i in order])
    other = np.asarray(jitted(logits[order], rules, moved, position[order]))
    assert other.tobytes() == found[order].tobytes()
    # What lies behind a history is not looked at, nor is its room.
    behind = np.arange(CONTEXT) >= position[:, None]
    wild = np.where(behind, np.int32(2**31 - 1), history.tokens)
    wild = np.concatenate([wild, np.full((32, 5), -(2**31), np.int32)], axis=1)
    other = jitted(logits, rules_of(each), History(wild, history.prompt), position)
    assert np.asarray(other).tobytes() == found.tobytes()


@pytest.mark.parametrize("v", [31, 32, 33, 75])
def test_any_vocabulary_may_be_allowed_or_biased_to_its_end(v):
    config = dataclasses.replace(CONFIG, vocab_size=v)
    logits, history, position = batch(3, v=v)
    asked = [
        {"allowed_token_ids": [v - 1]},
        {"logit_bias": {i: float(i % 7) for i in range(v)}},
        {"allowed_token_ids": range(v)},
    ]
    found = np.asarray(jitted(logits, rules_of(asked, config), history, position))
    assert np.isfinite(found[0]).nonzero()[0].tolist() == [v - 1]
    np.testing.assert_array_equal(found[1], logits[1] + np.float32(np.arange(v) % 7))
    np.testing.assert_array_equal(found[2], logits[2])


def test_a_history_grows_by_what_the_live_draw():
    history = jax.device_put(History.empty(3, 4))
    live, token = np.array([True, False, True]), np.array([7, 8, 9], np.int32)
    after = history.add(token, np.array([1, 1, 4], np.int32), live)
    assert np.asarray(after.tokens).tolist() == [[0, 7, 0, 0], [0] * 4, [0] * 4]
