import gzip
import json

import numpy as np
import pytest

from polarjax.engine import Tokenizer
from polarjax.training import Source, read_corpus, token_blocks
from polarjax.training import text as text_module
from tests.models import byte_tokenizer

PARAGRAPHS = [f"Paragraph {i} says {'héllo ' * (i % 7)}." for i in range(90)]
TEXT = "\n\n".join(PARAGRAPHS)


@pytest.fixture
def tokenizer():
    return Tokenizer(byte_tokenizer())


def write(tmp_path, name, text=TEXT):
    path = tmp_path / name
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def json_lines(texts):
    return "\n".join(json.dumps({"id": 1, "text": text}) for text in texts) + "\n\n"


def assert_is(blocks, ids):
    """Blocks are the whole of the ids, but for what does not fill one."""
    length = len(blocks[0])
    assert len(blocks) == len(ids) // length
    np.testing.assert_array_equal(np.concatenate(blocks), ids[: length * len(blocks)])


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("piece", [7, 100, 1 << 18])
def test_blocks_joined_are_the_text(tmp_path, tokenizer, monkeypatch, name, piece):
    monkeypatch.setattr(text_module, "_PIECE", piece)
    blocks = list(token_blocks(write(tmp_path, name), tokenizer, 32))
    assert_is(blocks, tokenizer.encode(TEXT))
    assert {block.dtype for block in blocks} == {np.dtype(np.int32)}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("piece", [7, 1 << 18])
def test_rows_of_json_lines_are_paragraphs(
    tmp_path, tokenizer, monkeypatch, name, piece
):
    monkeypatch.setattr(text_module, "_PIECE", piece)
    path = write(tmp_path, name, json_lines(PARAGRAPHS))
    blocks = list(token_blocks(path, tokenizer, 32))
    assert_is(blocks, tokenizer.encode(TEXT + "\n\n"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{no json", "line 3 is no JSON"),
        ('{"words": "a"}', 'line 3: it must be an object with a string "text"'),
        ('{"text": 5}', 'line 3: it must be an object with a string "text"'),
        ('["text"]', 'line 3: it must be an object with a string "text"'),
        ('{"text": "\\ud800"}', "line 3: its text is no Unicode"),
        ("[" * 100_000, "line 3 is no JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, message):
    path = write(tmp_path, "a.jsonl", '{"text": "one"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl {message}"):
        next(token_blocks(path, tokenizer, 8))


def test_a_saved_data_set(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets", reason="needs it: pip install datasets")
    rows = datasets.Dataset.from_dict({"text": PARAGRAPHS})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "several"))
    rows.rename_column("text", "words").save_to_disk(str(tmp_path / "words"))
    (tmp_path / "empty").mkdir()
    blocks = list(token_blocks(tmp_path / "one", tokenizer, 32))
    assert_is(blocks, tokenizer.encode(TEXT + "\n\n"))
    for name, message in (
        ("several", "holds several splits: pass the folder of one"),
        ("words", 'must be an object with a string "text"'),
        ("empty", "is no saved data set"),
    ):
        with pytest.raises(ValueError, match=f"{name}:? {message}|{name}.*{message}"):
            next(token_blocks(tmp_path / name, tokenizer, 8))


def test_it_reads_no_further_than_asked(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_module, "_PIECE", 50)
    seen, encode = [], Tokenizer.encode_many
    monkeypatch.setattr(
        Tokenizer, "encode_many", lambda self, t: seen.extend(t) or encode(self, t)
    )
    blocks = list(token_blocks(write(tmp_path, "a.txt"), tokenizer, 10, limit=3))
    assert len(blocks) == 3
    assert sum(map(len, seen)) < len(TEXT) / 4


@pytest.mark.parametrize("text", ["x" * 5000, "word " * 1000, "a\n" * 2500])
def test_text_without_paragraphs_is_cut_where_it_hurts_least(
    tmp_path, tokenizer, monkeypatch, text
):
    monkeypatch.setattr(text_module, "_PIECE", 64)
    pieces = list(text_module._pieces(write(tmp_path, "a.txt", text)))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 64
    if " " in text:  # no word is cut; a token may begin with a space
        assert all(piece.split() == ["word"] * piece.count("w") for piece in pieces)
    blocks = list(token_blocks(tmp_path / "a.txt", tokenizer, 10))
    assert_is(blocks, tokenizer.encode(text))


def test_what_is_no_text_is_named(tmp_path, tokenizer):
    zipped = gzip.compress(bytes(range(128)) * 900)
    torn = zipped[: len(zipped) // 2]
    garbled = bytearray(zipped)
    garbled[20:60] = b"\xff" * 40
    for name, data in (
        ("bad.txt", b"\xff\xfe\x00"),
        ("bad.gz", b"no gzip"),
        ("torn.gz", torn),
        ("garbled.gz", bytes(garbled)),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is no UTF-8 text"):
            list(token_blocks(tmp_path / name, tokenizer, 1))
    with pytest.raises(FileNotFoundError, match=r"no text file at .*nowhere"):
        next(token_blocks(tmp_path / "nowhere.txt", tokenizer, 8))


def test_a_corpus_shares_by_weight(tmp_path, tokenizer):
    rng, weights = np.random.default_rng(0), {"abc": 1, "def": 2.5, "ghi": 0.75}
    texts = {name: "".join(rng.choice(list(name), 4000)) for name in weights}
    sources = [
        Source(write(tmp_path, f"{name}.txt", texts[name]), weight)
        for name, weight in weights.items()
    ]
    for blocks in (1, 2, 10, 101):
        found = read_corpus(sources, tokenizer, 16, blocks, held_out=3)
        assert found.blocks.shape == (blocks, 16) and found.blocks.dtype == np.int32
        start = 0
        for name, weight in weights.items():
            ids = np.array(tokenizer.encode(texts[name]), np.int32)
            share = int(np.isin(found.blocks, ids).all(axis=1).sum())
            assert abs(share - weight / 4.25 * blocks) <= 1
            # What is measured on follows what is learned from.
            held = found.held_out[name]
            assert held.shape == (3, 16)
            both = np.concatenate([found.blocks[start : start + share], held])
            np.testing.assert_array_equal(both.ravel(), ids[: both.size])
            start += share
        assert start == blocks


def test_what_the_model_writes_is_a_source(tmp_path, tokenizer):
    asked = []

    def own(count):
        asked.append(count)
        return np.arange(count * 8).reshape(count, 8)

    sources = [Source.parse("self=3"), Source(write(tmp_path, "a.txt"))]
    found = read_corpus(sources, tokenizer, 8, 12, held_out=2, write=own)
    assert asked == [11]
    np.testing.assert_array_equal(found.blocks[:9].ravel(), np.arange(72))
    np.testing.assert_array_equal(found.held_out["self"].ravel(), np.arange(72, 88))
    assert found.held_out["a"].shape == (2, 8)


def test_sources_are_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd=2").write_text("x")
    for text, path, weight, name in (
        ("a.txt", "a.txt", 1, "a"),
        ("b/a.jsonl.gz=0.5", "b/a.jsonl.gz", 0.5, "a"),
        ("odd=2", "odd=2", 1, "odd=2"),
        ("odd=2=3", "odd=2", 3, "odd=2"),
        ("self=1e-1", "self", 0.1, "self"),
    ):
        found = Source.parse(text)
        assert (str(found.path), found.weight, found.name) == (path, weight, name)
        assert found.itself == (name == "self")
    for text in ("a=0", "a=-1", "a=nan", "a=inf", "a=", "a=b", "=2"):
        with pytest.raises(ValueError, match=r"is no PATH=WEIGHT, such as a\.txt=2"):
            Source.parse(text)
    with pytest.raises(ValueError, match=r"a\.txt: its weight must be positive: 0"):
        Source(tmp_path / "a.txt", 0)


def test_a_corpus_that_cannot_be_names_its_text(tmp_path, tokenizer):
    good = Source(write(tmp_path, "good.txt"))

    def refused(match, *sources, length=16, blocks=4):
        with pytest.raises(ValueError, match=match):
            read_corpus(sources, tokenizer, length, blocks, held_out=2)

    def bad(name, text):
        return Source(write(tmp_path, name, text))

    refused("no text to read")
    refused(r"empty\.txt has 0 tokens, less than 16", good, bad("empty.txt", ""))
    refused(r"short\.txt has 15 tokens, less than 16", bad("short.txt", "x" * 15))
    some = bad("some.txt", "word. " * 14)
    refused(r"some\.txt has 80 tokens in blocks of 16, its share is 96", some)
    refused(r"same\.txt is one token repeated", good, bad("same.txt", "x" * 999))
    refused(r"good\.txt has \d,\d+ tokens .* is 48,032: lower", good, blocks=3000)
    (tmp_path / "other").mkdir()
    twin = Source(write(tmp_path, "other/good.jsonl", json_lines(PARAGRAPHS)))
    refused("two texts are named 'good': rename one", good, twin)
    (tmp_path / "latin.txt").write_bytes(TEXT.encode("latin-1"))
    refused(r"latin\.txt is no UTF-8 text", good, Source(tmp_path / "latin.txt"))
