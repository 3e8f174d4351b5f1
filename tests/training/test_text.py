import gzip

import numpy as np
import pytest

from polarjax.generation import Tokenizer
from polarjax.training import text as text_module
from polarjax.training import token_blocks
from tests.models import byte_tokenizer

TEXT = "\n\n".join(f"Paragraph {i} says {'héllo ' * (i % 7)}." for i in range(90))


@pytest.fixture
def tokenizer():
    return Tokenizer(byte_tokenizer())


def write(tmp_path, name, text=TEXT):
    path = tmp_path / name
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("piece", [7, 100, 1 << 18])
def test_blocks_joined_are_the_text(tmp_path, tokenizer, monkeypatch, name, piece):
    monkeypatch.setattr(text_module, "_PIECE", piece)
    blocks = list(token_blocks(write(tmp_path, name), tokenizer, 32))
    whole = np.array(tokenizer.encode(TEXT), np.int32)
    assert len(blocks) == len(whole) // 32
    np.testing.assert_array_equal(np.concatenate(blocks), whole[: 32 * len(blocks)])


def test_it_reads_no_further_than_asked(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_module, "_PIECE", 50)
    seen = []
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer,
        "encode",
        lambda self, t, **kw: seen.append(t) or encode(self, t, **kw),
    )
    assert (
        len(list(token_blocks(write(tmp_path, "a.txt"), tokenizer, 10, limit=3))) == 3
    )
    assert sum(map(len, seen)) < len(TEXT) / 4


def test_errors(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no text file at .*nowhere"):
        next(token_blocks(tmp_path / "nowhere.txt", tokenizer, 8))
    with pytest.raises(ValueError, match="less than 10000 tokens"):
        next(token_blocks(write(tmp_path, "a.txt"), tokenizer, 10_000))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    for name in ("bad.txt", "bad.gz"):
        with pytest.raises(ValueError, match=f"{name} is no UTF-8 text"):
            next(token_blocks(tmp_path / name, tokenizer, 1))
