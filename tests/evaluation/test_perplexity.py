import gzip
import math

import numpy as np
import pytest

import polarjax
from polarjax.evaluation import decode_perplexity, paired_bootstrap, window_perplexity
from tests.models import LLAMA, OPT, random_params


def text(config, n, seed=0):
    return np.random.default_rng(seed).integers(config.vocab_size, size=n)


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_dense_decoding_scores_as_whole_windows_do(config):
    params = random_params(config)
    tokens = text(config, 24 * 5 + 7)
    dense = decode_perplexity(
        params, tokens, polarjax.Dense(), window=24, prefix=8, batch=4
    )
    windows = tokens[: 24 * 5].reshape(5, 24)
    logits = np.asarray(polarjax.logits(params, windows), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logp[:, :-1], windows[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(dense.nll, nll[:, 7:].sum(1), rtol=1e-5)
    assert dense.scored == 16 and dense.density == 1
    whole = window_perplexity(params, tokens, window=24, batch=2)
    np.testing.assert_allclose(whole.nll, nll.sum(1), rtol=1e-5)
    np.testing.assert_allclose(whole.value, math.exp(nll.mean()), rtol=1e-5)


def test_sparse_decoding_scores_as_generate_does():
    """The log-probability of the tokens that sparse `generate` drew, teacher-forced."""
    params = random_params(LLAMA, routers=True)
    prompt = text(LLAMA, 8).tolist()
    out = polarjax.generate(params, [prompt], density=0.5, max_new_tokens=17)
    # The first new token comes from dense prefill; the window's prefix takes it in.
    whole = np.array([*prompt, *out.tokens[0]])
    scored = decode_perplexity(
        params, whole, polarjax.Polar(0.5), window=25, prefix=9, batch=1
    )
    np.testing.assert_allclose(scored.nll[0], -sum(out.logprobs[0][1:]), rtol=1e-5)
    assert scored.density == pytest.approx((1 + 3 * 0.5) / 4)


def test_batch_size_changes_nothing():
    params = random_params(LLAMA, routers=True)
    tokens = text(LLAMA, 16 * 5)
    kwargs = {"window": 16, "prefix": 4}
    one, four = (
        decode_perplexity(params, tokens, polarjax.Polar(0.5), batch=b, **kwargs)
        for b in (1, 4)
    )
    np.testing.assert_allclose(one.nll, four.nll, rtol=1e-5)


def test_ratio_and_interval():
    rng = np.random.default_rng(0)
    base = rng.normal(300, 20, size=40)
    worse = polarjax.evaluation.Perplexity(base + rng.normal(10, 3, size=40), 100)
    ratio, low, high = worse.ratio(polarjax.evaluation.Perplexity(base, 100))
    difference = (worse.nll - base) / 100
    assert ratio == pytest.approx(math.exp(difference.mean()))
    # The windows differ by 20, their pairs by 3: the interval is that of the pairs.
    error = difference.std() / math.sqrt(40)
    assert math.log(high / low) == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert low < ratio < high


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = paired_bootstrap(rng.exponential(size=50), draws=400)
        hits += low <= 1 <= high
    assert 0.88 < hits / 200 < 0.985


def test_errors():
    params = random_params(LLAMA)
    dense, tokens = polarjax.Dense(), text(LLAMA, 40)
    with pytest.raises(ValueError, match="40 tokens are less than one window of 64"):
        decode_perplexity(params, tokens, dense, window=64, prefix=8)
    for prefix in (1, 16):
        with pytest.raises(ValueError, match="prefix must be from 2 to 15"):
            decode_perplexity(params, tokens, dense, window=16, prefix=prefix)
    with pytest.raises(ValueError, match="context 128"):
        window_perplexity(params, text(LLAMA, 400), window=129)


@pytest.mark.parametrize("count", [4096, pytest.param(20480, marks=pytest.mark.slow)])
def test_smollm2_perplexity_equals_transformers(
    smollm2, smollm2_gguf, shared_data, count
):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers")
    path = shared_data / "text" / "wikitext2_raw_test.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        words = file.read(8 * count)
    tokenizer = polarjax.generation.Tokenizer.load(smollm2.config)
    tokens = np.array(tokenizer.encode(words)[:count])
    assert len(tokens) == count
    ours = window_perplexity(smollm2, tokens, window=1024)

    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    nll = []
    with torch.no_grad():
        for window in tokens.reshape(-1, 1024):
            ids = torch.tensor(window[None])
            nll.append(theirs(ids, labels=ids).loss.item())
    expected = math.exp(np.mean(nll))
    assert abs(ours.value / expected - 1) < 1e-3
    assert 5 < ours.value < 60
