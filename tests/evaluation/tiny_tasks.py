"""A tiny model, rows of three tasks for lm-eval, and the requests they make."""

import dataclasses

import numpy as np

import polarjax
from polarjax.engine import Tokenizer
from tests.models import LLAMA, random_params, write_checkpoint

CONTEXT = 64
CONFIG = dataclasses.replace(
    LLAMA, vocab_size=257, layers=2, context=CONTEXT, eos_ids=(256,), bos_ids=(256,)
)
SPARSE = polarjax.Polar(0.25)
WORDS = "one two three four five six seven eight nine ten".split()
GENERATION = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}


def some_words(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def make_rows():
    """Rows of each task; texts of zero, one and several windows, one window exactly."""
    rng = np.random.default_rng(0)
    texts = [some_words(rng, 60, 80), *("x" * n for n in (CONTEXT, CONTEXT + 1, 1))]
    return {
        "choose": [
            {
                "context": "" if i == 3 else some_words(rng, 1, 3),
                "choices": [some_words(rng, 1, 3) for _ in range(3)],
                "label": int(rng.integers(3)),
            }
            for i in range(16)
        ],
        "read": [{"text": text} for text in texts],
        "write": [
            {"context": some_words(rng, 8, 20), "target": "four"} for _ in range(8)
        ],
    }


ROWS = make_rows()


def make_params(folder):
    params = random_params(CONFIG, routers=True, scale=0.4)
    return write_checkpoint(folder / "model", params)


def request(kind, *arguments, task="t"):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, (task, 0, 1))


def choices(params):
    """Context and continuation of every choice, in text and in tokens."""
    encode = Tokenizer.require(params.config, "").encode
    for row in ROWS["choose"]:
        for choice in row["choices"]:
            context, tail = row["context"], " " + choice
            head = encode(context) if context else [256]
            yield (context, tail), head, encode(context + tail)[len(encode(context)) :]
