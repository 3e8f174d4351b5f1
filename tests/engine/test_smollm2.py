"""The default model through `generate` writes what `transformers` writes."""

import pytest

import polarjax
from polarjax.engine import Tokenizer

NEW = 32
# Prompts, and the 32 greedy tokens that transformers adds to each, in float32; a slow
# test computes them again.
CONTINUATIONS = {
    "Once upon a time": (
        ", the city of Nova Haven was a thriving metropolis, with towering skyscrapers "
        "and bustling streets. But as the years went by, the city began to lose its "
        "original"
    ),
    "The capital of France is": (
        " Paris.\n\nThe answer is: 2018-01-22 12:12:53.<|im_end|>\n<|im_start|>"
    ),
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n": (
        "The sky blue is a result of the Earth's atmosphere scattering sunlight in a "
        "specific wavelength range, specifically blue. This phenomenon occurs because "
        "of the way our eyes perceive"
    ),
    "def fibonacci(n):\n": (
        "\ndef fibonacci(n):\n    if n <= 1:\n        return n\n    else:\n"
        "        return fibonacci(n - 1) + fib"
    ),
    "1, 2, 3, 4, 5,": " 6, 7, 8, 9, 10, 11, 12, 13, 14,",
    "It was the best of times, it was the worst of times, it was the age of wisdom,": (
        " it was the age of love, it was the age of laughter, it was the age of "
        "laughter, it was the age of laughter, it was the age"
    ),
}
PROMPTS = list(CONTINUATIONS)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer.load(smollm2.config)


@pytest.fixture(scope="module")
def expected(tokenizer):
    tokens = [tokenizer.encode(text) for text in CONTINUATIONS.values()]
    assert [len(ids) for ids in tokens] == [NEW] * 6
    return tokens


def test_greedy_text_equals_transformers(smollm2, expected):
    # Two ids that nothing draws: as many as the model's own, to share a program.
    unused = (smollm2.config.vocab_size - 1, smollm2.config.vocab_size - 2)
    out = polarjax.generate(smollm2, PROMPTS, max_new_tokens=NEW, stop_ids=unused)
    assert out.tokens == expected
    assert out.finish_reasons == ["length"] * 6


def test_the_models_own_stop_tokens_end_a_text(smollm2, expected):
    out = polarjax.generate(smollm2, PROMPTS, max_new_tokens=NEW)
    end = expected[1].index(smollm2.config.eos_ids[0])
    assert out.tokens == [*expected[:1], expected[1][:end], *expected[2:]]
    assert out.finish_reasons == ["length", "stop"] + ["length"] * 4
    texts = list(CONTINUATIONS.values())
    texts[1] = texts[1].split("<|im_end|>")[0]
    assert out.texts == texts


@pytest.mark.slow
def test_transformers_writes_these_texts(smollm2_torch, tokenizer, expected):
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    model = smollm2_torch
    for prompt, continuation in zip(PROMPTS, expected, strict=True):
        ids = tokenizer.encode(prompt)
        with torch.no_grad():
            row = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert row[0, len(ids) :].tolist() == continuation
