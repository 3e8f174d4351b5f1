import dataclasses
import gzip
import inspect
import json

import numpy as np
import pytest

import polarjax
from polarjax.engine import Tokenizer, start_token
from polarjax.evaluation import Scorer, grade, measure, read_rows, task_items
from polarjax.evaluation.tasks import encode_pair
from tests.models import LLAMA, random_params, write_checkpoint

WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    config = dataclasses.replace(LLAMA, vocab_size=257, eos_ids=(256,))
    folder = tmp_path_factory.mktemp("tasks") / "model"
    return write_checkpoint(folder, random_params(config, routers=True))


def make_rows(count=12, seed=0):
    """Contexts of words, one of them empty, and three choices of other lengths."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        context = " ".join(rng.choice(WORDS, size=rng.integers(1, 6))) if i else ""
        choices = [" ".join(rng.choice(WORDS, size=1 + j)) for j in range(3)]
        label = int(rng.integers(3))
        rows.append({"id": i, "context": context, "choices": choices, "label": label})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def score(params, rows, policy, batch=8, **options):
    items = task_items(rows, Tokenizer.load(params.config), params.config)
    scorer = Scorer(params, {"it": policy}, batch=batch, **options)
    return measure(scorer, items)["it"]


def test_dense_choices_equal_an_independent_scorer(params, tmp_path):
    given, tokenizer = make_rows(), Tokenizer.load(params.config)
    expected = []
    for row in given:
        head = tokenizer.encode(row["context"]) if row["context"] else [256]
        assert len(head) == len(row["context"].encode() or [256])
        for choice in row["choices"]:
            new = (" " if row["context"] else "") + choice
            ids = tokenizer.encode(new, special=False)
            assert len(ids) == len(new.encode())
            sequence = [*head, *ids]
            padded = [*sequence, *[0] * (64 - len(sequence))]  # one program for all
            logits = np.asarray(polarjax.logits(params, [padded])[0], float)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            expected.append(logp[np.arange(len(head), len(sequence)) - 1, ids].sum())
    expected = np.array(expected).reshape(len(given), 3)
    labels = np.array([row["label"] for row in given])
    sizes = np.array([[len(c) for c in row["choices"]] for row in given])
    rows = read_rows(write(tmp_path / "a.jsonl", given))
    for batch in (5, 16):
        found = score(params, rows, polarjax.Dense(), batch)
        np.testing.assert_allclose(-found.nll.reshape(-1, 3), expected, atol=1e-4)
        answers = grade(rows, found.nll, found.greedy)
        np.testing.assert_array_equal(answers.right, expected.argmax(1) == labels)
        np.testing.assert_array_equal(
            answers.right_per_byte, (expected / sizes).argmax(1) == labels
        )


def test_targets_are_right_where_generate_writes_them(params, tmp_path):
    tokenizer = Tokenizer.load(params.config)
    prompts = [" ".join(WORDS[i : i + 3]) for i in range(6)]
    out = polarjax.generate(params, prompts, policy=polarjax.Dense(), max_new_tokens=2)
    given = []
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        target = tokenizer.decode(tokens)
        if tokens and tokenizer.encode(target) == tokens and target.strip():
            given.append({"context": prompt, "target": target})
    assert given
    given.append({"id": "wrong", "context": "one two", "target": " zzzz"})
    rows = read_rows(write(tmp_path / "a.jsonl", given))
    found = score(params, rows, polarjax.Dense())
    answers = grade(rows, found.nll, found.greedy)
    assert answers.right[:-1].all() and not answers.right[-1]
    assert answers.right_per_byte is None
    assert [row.id for row in rows][-1] == "wrong" and rows[0].id == "0"


def test_pairs_are_tokenized_together(params):
    tokenizer = Tokenizer.load(params.config)
    assert start_token(tokenizer, params.config) == 256
    assert encode_pair(tokenizer, params.config, "", "one")[0] == [256]
    head, tail = encode_pair(tokenizer, params.config, "one  ", "two")
    assert tokenizer.decode(head) == "one" and tokenizer.decode(tail) == "  two"


GOOD = '{"context": "a", "choices": ["b", "c"], "label": 1}'
TARGET = '{"context": "a", "target": " b"}'


def test_rows_are_read(tmp_path):
    given = make_rows(3)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in given))
    rows = read_rows(tmp_path / "a.jsonl.gz")
    assert [row.context for row in rows] == [row["context"] for row in given]
    assert rows[0].choices == tuple(given[0]["choices"])  # nothing to join them to
    assert rows[1].choices == tuple(" " + c for c in given[1]["choices"])
    assert [row.label for row in rows] == [row["label"] for row in given]
    assert rows[2].source.endswith("a.jsonl.gz, line 3")
    assert read_rows(tmp_path / "a.jsonl.gz", limit=2) == rows[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "no JSON"),
        ("", "no JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "context must be a string, got None"),
        ('{"context": 3, "choices": ["b", "c"], "label": 1}', "context must be a str"),
        ('{"context": "a", "choices": [], "label": 0}', "at least two strings"),
        ('{"context": "a", "choices": ["b"], "label": 0}', "at least two strings"),
        ('{"context": "a", "choices": "bc", "label": 0}', "at least two strings"),
        ('{"context": "a", "choices": ["b", ""], "label": 0}', "not empty, got ''"),
        ('{"context": "a", "choices": ["b", 1], "label": 0}', "not empty, got 1"),
        ('{"context": "a", "choices": ["b", "c"], "label": 2}', "from 0 to 1, got 2"),
        ('{"context": "a", "choices": ["b", "c"], "label": -1}', "from 0 to 1, got -1"),
        ('{"context": "a", "choices": ["b", "c"], "label": true}', "1, got True"),
        ('{"context": "a", "choices": ["b", "c"]}', "from 0 to 1, got None"),
        ('{"context": "a", "target": " "}', "target must be a string that is not em"),
        ('{"context": "a", "target": "b", "choices": []}', "choices or a target"),
        (TARGET, "must all have choices or all a target"),
        (r'{"context": "\ud800", "target": "b"}', "no Unicode text"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert f"{path}, line 2" in str(error.value)


def test_damaged_task_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no task file"):
        read_rows(tmp_path / "nowhere")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl has no rows"):
        read_rows(tmp_path / "empty.jsonl")
    whole = gzip.compress(json.dumps(make_rows(1)[0]).encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("cut.jsonl.gz", "bytes.jsonl"):
        with pytest.raises(ValueError, match=f"{name} is no UTF-8 text"):
            read_rows(tmp_path / name)


def test_rows_beyond_the_context_are_named(params, tmp_path):
    row = {"id": "long", "context": "a" * 126, "choices": ["bcd", "e"], "label": 0}
    path = write(tmp_path / "a.jsonl", [*make_rows(2), row])
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: row 'long' has 130 tokens"):
        score(params, read_rows(path), polarjax.Dense())


TASKS = [
    *("arc_easy", "arc_challenge", "openbookqa", "copa", "hellaswag_1000"),
    *("lambada", "blimp"),
]


@pytest.fixture(scope="module")
def scorer(smollm2_pair):
    """One for all tasks: they share its programs."""
    return Scorer(smollm2_pair[0], {"Dense": polarjax.Dense()}, batch=8)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("smollm2_pair", "count"),
    [(6, 6), pytest.param(30, 200, marks=pytest.mark.slow)],
    indirect=["smollm2_pair"],
)
def test_smollm2_equals_transformers(scorer, smollm2_pair, shared_data, task, count):
    """Item by item, unless a choice between two is closer than 1e-3 nats."""
    _, model = smollm2_pair
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    path = shared_data / "eval" / f"{task}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file][:count]
    config = scorer.params.config
    tokenizer = Tokenizer.load(config)
    backend, rows = tokenizer.backend, read_rows(path, count)
    found = measure(scorer, task_items(rows, tokenizer, config))["Dense"]
    answers = grade(rows, found.nll, found.greedy)
    # As newer versions of transformers call it, and older ones.
    names = inspect.signature(model.forward).parameters
    cache = "cache" if "cache" in names else "past_key_values"
    near = at = 0
    for i, line in enumerate(lines):
        head = backend.encode(line["context"] or "<|endoftext|>").ids
        texts = [line["target"]] if "target" in line else line["choices"]
        space = " " if "choices" in line and line["context"] else ""
        scores, margins = [], []
        news = [backend.encode(space + text).ids for text in texts]
        longest = max(map(len, news))
        # Causal: what fills a row up at its end changes nothing before it.
        tails = [[head[-1], *new, *[0] * (longest - len(new))] for new in news]
        with torch.no_grad():
            past = {}
            if len(head) > 1:  # read once for all choices
                past = {cache: model(torch.tensor([head[:-1]]))[cache]}
                past[cache].batch_repeat_interleave(len(news))
            logits = model(torch.tensor(tails), **past).logits
        for new, row in zip(news, logits, strict=True):
            logp = row[: len(new)].log_softmax(-1)
            scores.append(sum(logp[j, token].item() for j, token in enumerate(new)))
            top = logp.topk(2).values
            margins.append((top[:, 0] - top[:, 1]).min().item())
            greedy = bool((logp.argmax(-1) == torch.tensor(new)).all())
            assert abs(-found.nll[at] - scores[-1]) < 2e-3 * len(new)
            at += 1
        if "target" in line:
            assert answers.right[i] == greedy or margins[0] < 1e-3
            near += margins[0] < 1e-3
            continue
        per_byte = np.array(scores) / [len(text.encode()) for text in texts]
        for mine, theirs in (
            (answers.right[i], np.array(scores)),
            (answers.right_per_byte[i], per_byte),
        ):
            best, second = np.sort(theirs)[:-3:-1]
            assert mine == (theirs.argmax() == line["label"]) or best - second < 1e-3
            near += best - second < 1e-3
    assert near < max(2, 0.05 * count)
