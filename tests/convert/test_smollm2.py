"""The default model, a real one: its GGUF file here and in transformers."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from polarjax.model import Decoder, extend
from polarjax.params import read_folder
from tests.models import empty_cache, read_prompts

PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5,",
    "It was the best of times, it was the worst of times, it was the age of wisdom,",
]
TEXTS = [
    *PROMPTS,
    "Hello world 2024, it's 10:30\n\n  and we'll go.",
    "naïve Ωmega 日本語 🙂🙃\u200b\ufeff",
    "\ttabs\r\n   and   runs   of   spaces   ",
    "3.14159 + x1y2 = (7/8)^2 <|endoftext|><|im_end|>",
    "",
]
NEW = 32


@pytest.fixture(scope="module")
def model(smollm2_folder):
    params = read_folder(smollm2_folder)
    return params, Decoder(params.config)


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def transformers(smollm2_gguf):
    pytest.importorskip("torch", reason="needs it: pip install torch")
    return pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )


@pytest.fixture(scope="module")
def reference(smollm2_torch):
    return smollm2_torch


def padded(prompts):
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32)


@pytest.fixture(scope="module")
def continued(tokenizer, reference):
    """Each prompt with the tokens that transformers adds, and where they begin.

    In one batch, padded on the left, which saves time; that they are what each prompt
    alone yields, `test_logits_equal_transformers` checks.
    """
    import torch

    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ids = reference.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    rows = zip(ids.tolist(), prompts, strict=True)
    return [(row[width - len(prompt) :], len(prompt)) for row, prompt in rows]


def test_configuration(model):
    config = model[0].config
    shape = (config.dim, config.heads, config.kv_heads, config.head_dim)
    assert shape == (576, 9, 3, 64)
    assert (config.layers, config.neurons, config.vocab_size) == (30, 1536, 49152)
    assert config.rope.theta == 1e5 and config.tied_embeddings
    # The end of a turn, which the metadata name, and the end of a text.
    assert config.eos_ids == (2, 0)


def test_logits_equal_transformers(model, tokenizer, reference, continued):
    """Those of whole texts; and the largest is the token that transformers chose."""
    import torch

    params, decoder = model
    texts = [tokenizer.encode(text).ids for text in TEXTS[len(PROMPTS) :] if text]
    sequences = [ids for ids, _ in continued] + texts
    tokens, _ = padded(sequences)
    run = jax.jit(lambda w, t: decoder.apply({"params": w}, t))
    ours = run(params.weights, tokens)
    ours = [np.asarray(row[: len(s)]) for row, s in zip(ours, sequences, strict=True)]
    theirs = []
    for sequence in sequences:
        with torch.no_grad():
            theirs.append(reference(torch.tensor([sequence])).logits[0].numpy())
    for mine, other in zip(ours, theirs, strict=True):
        assert np.linalg.norm(mine - other) < 1e-3 * np.linalg.norm(other)
    for i, (sequence, start) in enumerate(continued):
        added = sequence[start:]
        assert theirs[i][start - 1 : -1].argmax(-1).tolist() == added
        assert ours[i][start - 1 : -1].argmax(-1).tolist() == added


@pytest.mark.slow
def test_greedy_decoding_equals_transformers(model, continued):
    """The same token by token, through the cache."""
    params, decoder = model

    @jax.jit
    def run(weights, tokens, lengths):
        b, t = tokens.shape
        live = jnp.ones(b, bool)

        def step(carry, _):
            token, cache = carry
            found = extend(decoder, weights, token, live, cache)
            return (found.logits.argmax(-1), found.cache), token

        cache = empty_cache(params.config, b, t + NEW)
        read = read_prompts(decoder, weights, tokens, lengths, cache)
        first = read.logits.argmax(-1), read.cache
        return jax.lax.scan(step, first, length=NEW)[1].T

    ours = run(params.weights, *padded([ids[:start] for ids, start in continued]))
    assert np.asarray(ours).tolist() == [ids[start:] for ids, start in continued]


def test_the_model_knows_its_capital(model, tokenizer):
    """Without transformers: a scrambled conversion would not."""
    params, decoder = model
    ids = tokenizer.encode("The capital of France is").ids
    run = jax.jit(lambda w, t: decoder.apply({"params": w}, t)[0, -1].argmax())
    token = run(params.weights, jnp.asarray([ids]))
    assert tokenizer.decode([int(token)]) == " Paris"


def test_tokens_equal_transformers(tokenizer, transformers, smollm2_gguf):
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    for text in TEXTS:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text


def test_digits_leave_the_spaces_before_them(tokenizer):
    """Where transformers' GGUF loading, which ignores the file's `pre`, is wrong."""
    assert tokenizer.encode("a   12").tokens == ["a", "ĠĠĠ", "1", "2"]


def test_round_trips(tokenizer):
    rng = random.Random(0)
    ranges = [(0x20, 0x7F), (0xA0, 0x2FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F5FF)]
    texts = TEXTS + [
        "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(50))
        for _ in range(50)
    ]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_chat_template(smollm2_folder):
    jinja2 = pytest.importorskip("jinja2", reason="needs it: pip install jinja2")
    template = (smollm2_folder / "chat_template.jinja").read_text()
    text = jinja2.Template(template).render(
        messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
