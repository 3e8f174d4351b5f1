import dataclasses
import gzip
import json

import numpy as np
import pytest

import polarjax
from polarjax.evaluation import evaluate_task, read_rows
from polarjax.generation import Tokenizer
from tests.models import LLAMA, random_params, write_checkpoint

WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    config = dataclasses.replace(LLAMA, vocab_size=257, layers=2)
    folder = tmp_path_factory.mktemp("tasks") / "model"
    return write_checkpoint(folder, random_params(config, routers=True))


def make_rows(count=12, seed=0):
    rng = np.random.default_rng(seed)
    pick = lambda n: " ".join(rng.choice(WORDS, n))  # noqa: E731
    return [
        {
            "id": f"row-{i}",
            "context": "" if i == 3 else pick(rng.integers(1, 5)),
            "choices": [pick(rng.integers(1, 4)) for _ in range(3)],
            "label": int(rng.integers(3)),
        }
        for i in range(count)
    ]


def independent(params, rows):
    """Dense log-likelihoods of each choice alone, from the logits of the whole."""
    tokenizer, found = Tokenizer.load(params.config), []
    for row in rows:
        prompt = tokenizer.encode(row["context"]) if row["context"] else [0, 0]
        for choice in row["choices"]:
            text = (" " if row["context"] else "") + choice
            ids = tokenizer.encode(text)
            padded = [[*prompt, *ids, *[0] * (64 - len(prompt) - len(ids))]]
            logits = np.asarray(polarjax.logits(params, padded)[0], float)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            at = np.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
            found.append(logp[at, ids].sum())
    return np.array(found).reshape(len(rows), 3)


def test_dense_choices_equal_an_independent_scorer(params):
    rows = make_rows()
    scores = independent(params, rows)
    labels = np.array([row["label"] for row in rows])
    sizes = np.array([[len(c) for c in row["choices"]] for row in rows])
    for batch in (5, 16):
        result = evaluate_task(params, rows, polarjax.Dense(), batch=batch)
        np.testing.assert_array_equal(result.correct, scores.argmax(1) == labels)
        np.testing.assert_array_equal(
            result.correct_per_byte, (scores / sizes).argmax(1) == labels
        )
        assert result.density == 1
        assert result.ids == [row["id"] for row in rows]


def test_targets_are_right_where_generate_writes_them(params):
    prompts = [row["context"] for row in make_rows() if row["context"]][:6]
    # generate's first token comes from dense prefill: one token more in the context.
    first = polarjax.generate(
        params, prompts, policy=polarjax.Dense(), max_new_tokens=1
    )
    ids = [[*p.encode(), *t] for p, t in zip(prompts, first.tokens, strict=True)]
    tokenizer = Tokenizer.load(params.config)
    contexts = [
        p + tokenizer.decode(t) for p, t in zip(prompts, first.tokens, strict=True)
    ]
    rows = []
    for i, context in enumerate(contexts):
        if tokenizer.encode(context)[-1] != ids[i][-1]:
            continue  # a lone byte of a longer character is no text
        out = polarjax.generate(params, [context], max_new_tokens=1, density=0.5)
        target = tokenizer.decode(out.tokens[0])
        if tokenizer.encode(target) == out.tokens[0]:
            rows.append({"id": i, "context": context, "target": target})
    rows.append({"id": "wrong", "context": "one two", "target": " zzzz"})
    result = evaluate_task(params, rows, polarjax.Dense())
    assert result.correct[:-1].all() and not result.correct[-1]


def test_sparse_differs_and_says_its_density(params):
    rows = make_rows(30, seed=1)
    dense = evaluate_task(params, rows, polarjax.Dense())
    sparse = evaluate_task(params, rows, polarjax.Polar(0.25))
    assert sparse.density == pytest.approx((1 + 0.25) / 2)
    change, low, high = sparse.difference(dense)
    assert low <= change <= high
    assert change == pytest.approx(sparse.accuracy - dense.accuracy)


def test_rows_are_read_and_checked(tmp_path):
    rows = make_rows(3)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    assert read_rows(tmp_path / "a.jsonl.gz") == rows
    assert read_rows(tmp_path / "a.jsonl.gz", limit=2) == rows[:2]
    with pytest.raises(FileNotFoundError, match="no task file"):
        read_rows(tmp_path / "nowhere")
    for bad in ("{}", "no json", '{"context": "a", "choices": ["b"], "label": 1}'):
        (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0]) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match="line 2: a row needs a context"):
            read_rows(tmp_path / "bad.jsonl")


def test_damaged_task_files_are_named(tmp_path):
    whole = gzip.compress(json.dumps(make_rows(1)[0]).encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("cut.jsonl.gz", "bytes.jsonl"):
        with pytest.raises(ValueError, match=f"{name} is no UTF-8 text"):
            read_rows(tmp_path / name)


def test_rows_beyond_the_context_are_named(params):
    row = {"id": "long", "context": "a" * 126, "choices": ["bcd"], "label": 0}
    with pytest.raises(ValueError, match="row long has 130 tokens"):
        evaluate_task(params, [row], polarjax.Dense())
