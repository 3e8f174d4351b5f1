"""The three modes score the same thing where they must, and as `generate` would."""

import dataclasses

import jax
import numpy as np
import pytest

import polarjax
from polarjax.evaluation import Continuation, Scorer, measure, programs
from polarjax.evaluation.batches import make_batches
from tests.models import LLAMA, OPT, OPT_AFTER, random_params

POLICIES = {
    "Dense": polarjax.Dense(),
    "Polar": polarjax.Polar(0.5),
    "Oracle": polarjax.Oracle(0.5),
    "Random": polarjax.Random(0.5),
    "Whole": polarjax.Polar(1.0),
}
NEURONS = {"Neurons": polarjax.Polar(0.5, neuron_density=0.3)}


# Layer 0 is dense; two that are not show that sparse states go on.
SMALL = {
    "llama": dataclasses.replace(LLAMA, layers=3, rotary=(True, False, True)),
    "opt": dataclasses.replace(OPT, layers=3),
    "opt-norm-after": dataclasses.replace(OPT_AFTER, layers=3),
}


def make_items(config, families=4, choices=3, longest=9, seed=0):
    """Contexts, some of a single token, with several continuations each."""
    rng = np.random.default_rng(seed)

    def draw(most):
        return rng.integers(config.vocab_size, size=rng.integers(1, most)).tolist()

    contexts = [draw(2), *(draw(longest) for _ in range(families - 1))]
    pairs = [(context, draw(8)) for context in contexts for _ in range(choices)]
    return [Continuation((*c, *new), len(new)) for c, new in pairs]


def per_token(params, items, policies, mode, batch=4, **options):
    """{label: {item: nll of each scored token}}, and the batches' scores."""
    scorer = Scorer(params, policies, mode=mode, batch=batch, **options)
    found = {label: {} for label in policies}
    batches = scorer.plan(items)
    scorer.compile(batches)
    for part in batches:
        for label, scores in scorer.score(part).items():
            for row, nll in zip(part.rows, scores.nll, strict=True):
                found[label][row.item] = nll
    assert all(sorted(some) == list(range(len(items))) for some in found.values())
    return found


def largest_difference(one, other):
    return max(np.abs(one[i] - other[i]).max() for i in one)


@pytest.mark.parametrize("name", SMALL)
def test_kernel_equals_mask(name):
    config = SMALL[name]
    params = random_params(config, routers=True, neuron_rank=4, head_rank=3)
    policies = POLICIES | (NEURONS if config.family == "opt" else {})
    if config.norm_after:  # the modes differ from OPT's in the layer alone
        policies = {"Polar": POLICIES["Polar"], **NEURONS}
    items = make_items(config)
    kernel, mask, decode = (
        per_token(params, items, policies, mode)
        for mode in ("kernel", "mask", "decode")
    )
    for label in policies:
        assert largest_difference(kernel[label], mask[label]) < 5e-5, label
        # A context that is read sparsely is another one: the modes do differ.
        same = largest_difference(decode[label], mask[label]) < 1e-3
        assert same == (label in ("Dense", "Whole")), label
    # Each policy chooses otherwise.
    labels = [label for label in policies if label != "Whole"]
    for i, label in enumerate(labels):
        for other in labels[:i]:
            assert largest_difference(mask[label], mask[other]) > 1e-2


def test_interpreted_kernels_equal_the_mask():
    params = random_params(SMALL["llama"], routers=True)
    items = make_items(LLAMA, families=2, choices=2, longest=6)
    policies = {"Polar": POLICIES["Polar"]}
    mask = per_token(params, items, policies, "mask")
    for mode, expected in (("kernel", mask), ("decode", None)):
        options = {"implementation": "triton_interpret"}
        found = per_token(params, items, policies, mode, **options)
        if expected is None:
            expected = per_token(params, items, policies, mode)
        assert largest_difference(found["Polar"], expected["Polar"]) < 5e-5


@pytest.mark.parametrize(
    ("config", "policy"),
    [(LLAMA, polarjax.Polar(0.5)), (OPT, NEURONS["Neurons"])],
    ids=["heads", "union-of-neurons"],
)
def test_decode_equals_generate(config, policy):
    """The log-probabilities of what sparse `generate` drew, teacher-forced."""
    params = random_params(config, routers=True, neuron_rank=4)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(config.vocab_size, size=n).tolist() for n in (5, 15, 1, 9)]
    out = polarjax.generate(
        params, prompts, policy=policy, max_new_tokens=11, stop_ids=[]
    )
    # The first new token comes from dense prefill: it belongs to the context.
    items = [
        Continuation((*prompt, *new), 10)
        for prompt, new in zip(prompts, out.tokens, strict=True)
    ]
    found = per_token(params, items, {"it": policy}, "decode", batch=4)["it"]
    for i, logprobs in enumerate(out.logprobs):
        np.testing.assert_allclose(found[i], -np.array(logprobs[1:]), atol=2e-5)


def test_contexts_of_several_pages(monkeypatch):
    """Whose full pages rows share, read by several programs' worth of tokens."""
    monkeypatch.setattr(programs, "_TOKENS", 48)
    params = random_params(LLAMA, routers=True)
    rng = np.random.default_rng(3)

    def draw(n):
        return rng.integers(LLAMA.vocab_size, size=n).tolist()

    # The last token of a context is decoded: 63, 64, 65 and 100 are read dense.
    contexts = [draw(n) for n in (64, 65, 66, 101)]
    pairs = [(context, draw(n)) for context in contexts for n in (2, 7, 20)]
    items = [Continuation((*c, *new), len(new)) for c, new in pairs]
    policies = {name: POLICIES[name] for name in ("Whole", "Polar")}
    found = per_token(params, items, policies, "decode", batch=6)
    mask = per_token(params, items, {"Whole": POLICIES["Whole"]}, "mask", batch=6)
    assert largest_difference(found["Whole"], mask["Whole"]) < 1e-4
    alone = per_token(params, items, {"Polar": POLICIES["Polar"]}, "decode", batch=1)
    assert largest_difference(found["Polar"], alone["Polar"]) < 2e-5


def test_everything_selected_is_dense():
    params = random_params(SMALL["llama"], routers=True)
    items = make_items(LLAMA, longest=20)
    tokens = np.zeros((len(items), 32), np.int32)
    for row, item in zip(tokens, items, strict=True):
        row[: len(item.tokens)] = item.tokens
    logits = np.asarray(polarjax.logits(params, tokens), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    whole = {"Whole": POLICIES["Whole"]}
    for mode in ("decode", "kernel", "mask"):
        found = per_token(params, items, whole, mode)["Whole"]
        for i, item in enumerate(items):
            n = len(item.tokens)
            at = np.arange(n - item.scored, n)
            expected = -logp[i, at - 1, tokens[i, at]]
            np.testing.assert_allclose(found[i], expected, atol=1e-4)


def test_batch_size_changes_nothing_under_head_sparsity():
    params = random_params(LLAMA, routers=True)
    items = make_items(LLAMA)
    policies = {"Polar": POLICIES["Polar"]}
    one, seven = (
        per_token(params, items, policies, "decode", batch=b)["Polar"] for b in (1, 7)
    )
    assert largest_difference(one, seven) < 2e-5


def test_sums_use_and_density():
    params = random_params(LLAMA, routers=True)
    items = make_items(LLAMA)
    policies = {"Polar": POLICIES["Polar"], "Dense": polarjax.Dense()}
    found = measure(Scorer(params, policies, batch=4), items)
    tokens = per_token(params, items, policies, "decode")["Polar"]
    sums = [tokens[i].sum() for i in range(len(items))]
    np.testing.assert_allclose(found["Polar"].nll, sums, rtol=1e-5)
    # The context's last token and all scored ones but the last go through a step.
    assert found["Polar"].positions == sum(item.scored for item in items)
    np.testing.assert_array_equal(
        found["Polar"].use.sum(axis=1) / found["Polar"].positions, [4, 2, 2, 2]
    )
    assert found["Polar"].density == pytest.approx((1 + 3 * 0.5) / 4)
    assert found["Dense"].density == 1 and (found["Dense"].use > 0).all()
    kernel = measure(Scorer(params, policies, mode="kernel", batch=4), items)
    assert kernel["Polar"].positions == sum(len(item.tokens) - 1 for item in items)


@pytest.mark.parametrize("mode", ["decode", "kernel", "mask"])
def test_batches_hold_every_item_once(mode):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        items = [
            item
            for part in range(rng.integers(1, 6))
            for item in make_items(
                *(LLAMA, rng.integers(1, 9), rng.integers(1, 7)),
                *(rng.integers(2, 90), 100 * seed + part),
            )
        ]
        size = int(rng.integers(1, 20))
        batches = make_batches(items, size, 128, mode)
        assert batches == make_batches(items, size, 128, mode)
        rows = [row for batch in batches for row in batch.rows]
        assert sorted(row.item for row in rows) == list(range(len(items)))
        for batch in batches:
            assert len(batch.rows) <= size
            (contexts, lengths, places), (tokens, counts) = jax.tree.map(
                np.asarray, batch.arrays(size)
            )
            assert counts[len(batch.rows) :].sum() == 0
            for i, row in enumerate(batch.rows):
                item = items[row.item]
                head = contexts[places[i]][: lengths[places[i]]]
                whole = [*head, *tokens[i, : counts[i] + 1]]
                assert tuple(whole) == item.tokens
                if mode == "decode":
                    assert counts[i] == item.scored
                else:
                    assert not len(head)


def test_choices_share_the_cache_of_their_context():
    items = [
        Continuation((*range(20 + c), 7, k), 1) for c in range(8) for k in range(4)
    ]
    batches = make_batches(items, 16, 128, "decode")
    assert [len(batch.rows) for batch in batches] == [16, 16]
    assert {(batch.contexts, batch.prefix) for batch in batches} == {(4, 32)}


def test_what_cannot_be_scored():
    params = random_params(LLAMA)
    for scored in (0, 3):
        with pytest.raises(ValueError, match=f"{scored} of 3 tokens are to be scored"):
            Continuation((1, 2, 3), scored)
    long = [Continuation((1,) * 130, 4, "line 7")]
    with pytest.raises(ValueError, match="line 7 has 130 tokens, the model's context"):
        Scorer(params, {}, batch=2).plan(long)
    with pytest.raises(ValueError, match="no mode 'fast': there are decode, kernel"):
        Scorer(params, {}, mode="fast")  # pyright: ignore
    with pytest.raises(ValueError, match="has nothing to score"):
        measure(Scorer(params, {"Dense": polarjax.Dense()}), [])
    broken = polarjax.Params(
        {**params.weights, "final_norm": {"scale": np.full(48, np.nan, np.float32)}},
        polarjax.Dense(),
        params.config,
    )
    scorer = Scorer(broken, {"Dense": polarjax.Dense()})
    with pytest.raises(ValueError, match="no finite log-likelihood for line 3"):
        measure(scorer, [Continuation((1, 2, 3), 1, "line 3")])
