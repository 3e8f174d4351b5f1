"""The model that lm-eval is given: its numbers, windows and texts are right."""

import functools
import logging

import numpy as np
import pytest

import polarjax
from polarjax.engine import Tokenizer
from tests.evaluation.tiny_tasks import (
    CONTEXT,
    GENERATION,
    ROWS,
    SPARSE,
    choices,
    make_params,
    request,
)
from tests.models import byte_tokenizer

pytest.importorskip("lm_eval", reason="needs it: pip install lm-eval")

from lm_eval.utils import get_rolling_token_windows

from polarjax.evaluation.lm_eval.model import PolarLM


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    return make_params(tmp_path_factory.mktemp("lm_eval"))


def log_probabilities(params, tokens):
    padded = np.pad(tokens, (0, CONTEXT - len(tokens)))  # one program for all
    logits = polarjax.logits(params, padded[None], [len(tokens)])
    logits = np.asarray(logits[0, : len(tokens)], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def independent(params, context, continuation):
    """Log-likelihood of token ids, and if they are greedy, from the whole's logits."""
    tokens = [*context, *continuation][-CONTEXT - 1 :]
    found = log_probabilities(params, tokens[:-1])[-len(continuation) :]
    best = (found.argmax(-1) == continuation).all()
    return found[np.arange(len(continuation)), continuation].sum(), best


def test_loglikelihood_is_that_of_the_whole(params, caplog):
    requests = [request("loglikelihood", *text) for text, *_ in choices(params)]
    pairs = [(head, tail) for _, head, tail in choices(params)]
    long = "one two three " * 9  # is cut
    requests.append(request("loglikelihood", long, "four"))
    encode = Tokenizer.require(params.config, "").encode
    pairs.append((encode(long.rstrip()), encode(" four")))
    model = PolarLM(params, polarjax.Dense(), batch=4)
    with caplog.at_level(logging.WARNING):
        found = model.loglikelihood(requests)
    for (value, greedy), pair in zip(found, pairs, strict=True):
        expected, best = independent(params, *pair)
        assert type(value) is float and type(greedy) is bool
        assert value == pytest.approx(expected, rel=1e-5) and greedy == best
    assert model.truncated == {("t", "loglikelihood"): 1}
    assert "1 of 49 loglikelihood requests of task t were cut" in caplog.text
    best = encode("one")
    for _ in range(3):
        best.append(int(log_probabilities(params, best)[-1].argmax()))
    [(_, greedy)] = model._loglikelihood_tokens([(("one", "?"), best[:3], best[3:])])
    assert greedy


def test_rolling_windows_are_those_of_lm_eval(params):
    encode = Tokenizer.require(params.config, "").encode
    texts = [row["text"] for row in ROWS["read"]] + [""]
    model = PolarLM(params, polarjax.Dense(), batch=4)
    found = model.loglikelihood_rolling([request("", text) for text in texts])
    assert len(encode(texts[0])) > 4 * CONTEXT
    for value, text in zip(found, texts, strict=True):
        windows = get_rolling_token_windows(encode(text), 256, CONTEXT, 1)
        expected = 0.0
        for read, scored in windows:
            found_here = log_probabilities(params, read)[-len(scored) :]
            expected += found_here[np.arange(len(scored)), scored].sum()
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["kernel", "mask"])
def test_modes(params, mode):
    """From the first token on, sparse is what the step makes of it in every mode."""
    text, other = ROWS["read"][0]["text"], "x" * 30
    requests = [request("", text), request("", other)]
    decoded = PolarLM(params, SPARSE, batch=4).loglikelihood_rolling(requests[1:])
    found = PolarLM(params, SPARSE, batch=4, mode=mode).loglikelihood_rolling(requests)
    assert found[1] == pytest.approx(decoded[0], rel=1e-5)


def test_texts_are_those_of_generate(params, caplog):
    prompts = [*(row["context"] for row in ROWS["write"][:7]), ""]
    encode = Tokenizer.require(params.config, "").encode
    room = CONTEXT - GENERATION["max_gen_toks"]
    ids = [encode(prompt)[-room:] or [256] for prompt in prompts]
    assert max(map(len, ids)) == room

    def write(**options):
        options.update(policy=SPARSE, max_new_tokens=12)
        parts = (polarjax.generate(params, x, **options) for x in (ids[:4], ids[4:]))
        return [text for part in parts for text in part.texts]

    whole = write()
    stop = next(c for c in "".join(whole) if " " < c < "~")
    expected = write(stop=stop)
    assert 0 < sum(map(str.__eq__, whole, expected)) < len(whole)
    settings = {**GENERATION, "until": [stop, "\n\n"]}
    draw = {**settings, "do_sample": True, "temperature": 0.9, "num_beams": 3}
    requests = [request("", prompt, settings) for prompt in prompts]
    requests[2:2] = drawn = [request("", "one", draw)]
    model = PolarLM(params, SPARSE, batch=4)
    with caplog.at_level(logging.WARNING):
        found = model.generate_until(requests)
    assert found[:2] + found[3:] == expected
    assert model.density("policy", ["t"]) == pytest.approx((1 + 0.25) / 2)
    assert "ignored num_beams" in caplog.text
    first, second = PolarLM(params, SPARSE, batch=1).generate_until(2 * drawn)
    assert first != second, "two batches draw alike"
    with pytest.raises(ValueError, match=r"64 new tokens.* no room"):
        model.generate_until([request("", "one", {"max_gen_toks": CONTEXT})])


def test_cache_and_journal(params, tmp_path, monkeypatch):
    from lm_eval.api.model import CachingLM

    journal = {}
    make = functools.partial(PolarLM, params, SPARSE, batch=4, journal=journal)
    requests = [request("", "one", " two"), request("", "one", " three")]
    texts = [request("", "one", GENERATION)]
    first = CachingLM(make(), str(tmp_path / "cache.db"))
    expected = (
        first.loglikelihood(requests),
        first.loglikelihood_rolling([request("", "one")]),
        first.generate_until(texts),
    )
    assert len(first.dbdict) == 4
    with monkeypatch.context() as patch:
        patch.setattr("polarjax.evaluation.scoring.Scorer.score", None)
        patch.setattr("polarjax.evaluation.lm_eval.model.generate", None)
        again = CachingLM(make(journal={}), str(tmp_path / "cache.db"))
        assert expected == (
            again.loglikelihood(requests),
            again.loglikelihood_rolling([request("", "one")]),
            again.generate_until(texts),
        )
        assert make().loglikelihood(requests) == expected[0]
    with pytest.raises(TypeError):  # other requests are not in the journal
        monkeypatch.setattr("polarjax.evaluation.scoring.Scorer.score", None)
        make().loglikelihood(requests[:1])


def test_chat_template(params):
    model = PolarLM(params, polarjax.Dense())
    asked = [{"role": "user", "content": "one"}]
    begun = [*asked, {"role": "assistant", "content": "tw"}]
    assert model.apply_chat_template(asked) == "<user>one<answer>"
    assert model.apply_chat_template(begun, False) == "<user>one<assistant>tw"
    assert model.chat_template(True) == model.tokenizer.chat_template
    # A text that brings its own start gets no second one.
    assert model.tokenizer.bos == "<end>"
    assert model.tok_encode("<end>one") == [256, *model.tok_encode("one")]


def make_pair(folder, backend, batch=4, template=None, **roles):
    """lm-eval's own Hugging Face model, and ours of the same weights.

    Args:
      folder: to write to.
      backend: the tokenizer.
      batch: texts that theirs takes at once.
      template: of chats.
      **roles: texts of the tokenizer's special tokens.
    """
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    transformers = pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )
    pytest.importorskip("accelerate", reason="needs it: pip install accelerate")
    from lm_eval.models.huggingface import HFLM

    from convert import convert

    config = transformers.LlamaConfig(
        **dict(vocab_size=257, hidden_size=48, intermediate_size=80, head_dim=16),
        **dict(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4),
        **dict(max_position_embeddings=CONTEXT, tie_word_embeddings=True),
        **dict(rms_norm_eps=1e-5, bos_token_id=256, eos_token_id=256),
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    tokenizer.chat_template = template
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "ours", dtype="float32", progress=False)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=batch)
    ours = PolarLM(polarjax.load(folder / "ours"), polarjax.Dense(), batch=4)
    return theirs, ours


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<end>")
    return make_pair(tmp_path_factory.mktemp("parity"), byte_tokenizer(), **roles)


def test_parity_with_the_model_that_lm_eval_brings(pair):
    theirs, ours = pair
    assert theirs.prefix_token_id == ours.prefix_token_id == 256
    assert theirs.max_length == ours.max_length
    requests = [
        *(
            request("", row["context"], " " + row["choices"][0])
            for row in ROWS["choose"]
        ),
        *(request("", head, "four") for head in ("one  ", "one two " * 20, "<end>x")),
    ]
    for mine, other in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert mine == pytest.approx(other, rel=1e-4)
    requests = [request("", row["text"]) for row in ROWS["read"]]
    assert ours.loglikelihood_rolling(requests) == pytest.approx(
        theirs.loglikelihood_rolling(requests), rel=1e-4
    )
    whole, settings = "", GENERATION
    for _ in range(2):
        requests = [request("", row["context"], settings) for row in ROWS["write"]]
        texts = ours.generate_until(requests)
        assert texts == theirs.generate_until(requests)
        assert len("".join(texts)) > 20 and texts != whole, "a degenerate comparison"
        stop = next(c for c in "".join(texts) if " " < c < "~")
        whole, settings = texts, {**GENERATION, "until": [stop]}


CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.mark.parametrize("roles", [{"bos_token": "b", "eos_token": "e"}, {}])
def test_prefix_and_end_are_those_of_the_tokenizer(roles, tmp_path):
    roles = {"eos_token": "c", "pad_token": "d", **roles}
    theirs, ours = make_pair(tmp_path, byte_tokenizer(), template=CHAT, **roles)
    assert theirs.prefix_token_id == ours.prefix_token_id != 256
    assert theirs.eot_token_id == ours.eot_token_id != 256
    requests = [request("", row["text"]) for row in ROWS["read"]]
    assert ours.loglikelihood_rolling(requests) == pytest.approx(
        theirs.loglikelihood_rolling(requests), rel=1e-4
    )
    requests = [request("", "", row["choices"][0]) for row in ROWS["choose"][:4]]
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    for (mine, _), (other, _) in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    asked = [{"role": "user", "content": "one"}]
    begun = [*asked, {"role": "assistant", "content": "tw "}]
    for chat, new in ((asked, True), (begun, False)):
        expected = theirs.apply_chat_template(chat, new)
        assert ours.apply_chat_template(chat, new) == expected


def test_a_special_token_stops_as_it_stops_the_model_that_lm_eval_brings(tmp_path):
    backend = byte_tokenizer()
    # `until` stops, and the tokenizer's own end, which the configuration does not know.
    options = {"batch": 1, "bos_token": "<end>", "pad_token": "<end>"}
    _, ours = make_pair(tmp_path / "plain", backend, **options, eos_token="<end>")
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    prompts = [row["context"] for row in ROWS["write"]]
    texts = ours.generate_until([request("", p, settings) for p in prompts])
    special, end = [c for c in dict.fromkeys("".join(texts)) if " " < c < "~"][3:5]
    backend.add_special_tokens([special, end])
    theirs, ours = make_pair(tmp_path / "special", backend, **options, eos_token=end)
    settings["until"] = [special]
    requests = [request("", prompt, settings) for prompt in prompts]
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests)
    stopped = [text for text in texts if special in text or end in text]
    assert stopped and found != texts


def test_errors(params):
    model = PolarLM(params, polarjax.Dense(), batch=4)
    with pytest.raises(
        ValueError, match=r"continuation 'xx.* of task 't' has 65 tokens"
    ):
        model.loglikelihood([request("", "", "x" * (CONTEXT + 1))])
    with pytest.raises(ValueError, match="batch must be a positive integer"):
        PolarLM(params, polarjax.Dense(), batch=0)
