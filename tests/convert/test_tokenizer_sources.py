"""The tokenizers of every source give the ids of `transformers.AutoTokenizer`."""

from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer

from convert.readers.gguf_header import read_header
from convert.same_tokens import same_tokens
from convert.tokenizer import from_folder, from_gguf
from tests.convert.checkpoints import LLAMA, write_gguf
from tests.convert.tokenizer_folders import (
    FOLDERS,
    SIZE,
    gpt2,
    llama3,
    piece_fields,
    pieces,
    qwen2,
    smollm,
    user_defined,
)
from tests.convert.tokenizers import SPECIAL, mixed_texts, pair, with_tokens, write


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip(
        "transformers",
        minversion="5.24",  # 5.17 has other classes for some files
        reason="needs 5.24: pip install 'transformers>=5.24'",
    )


def check_folder(transformers, files, model_type, count, folder):
    content = files()
    if "tokenizer.model" in content:
        pytest.importorskip(
            "sentencepiece", reason="needs it: pip install sentencepiece"
        )
    write(folder, content, model_type=model_type)
    made, _ = from_folder(folder)
    ours = Tokenizer.from_str(made["tokenizer.json"])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in mixed_texts(count):
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


CASES = [pytest.param(*case[1:], id=case[0]) for case in FOLDERS]


@pytest.mark.parametrize(("model_type", "files"), CASES)
def test_folder(model_type, files, transformers, tmp_path):
    check_folder(transformers, files, model_type, 200, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "files"), CASES)
def test_folder_on_2000_texts(model_type, files, transformers, tmp_path):
    check_folder(transformers, files, model_type, 2000, tmp_path)


@pytest.mark.slow
def test_gpt2_itself(transformers, shared_data, tmp_path):
    folder = shared_data / "tokenizers/gpt2"
    files = {
        "vocab.json": (folder / "encoder.json").read_bytes(),
        "merges.txt": (folder / "vocab.bpe").read_bytes(),
    }
    check_folder(transformers, lambda: files, "opt", 2000, tmp_path)


def gguf_fields(tokenizer: Tokenizer, pre: str, **more) -> list[tuple]:
    model = pair(tokenizer)
    ids = with_tokens(tokenizer, ["<s>", *SPECIAL]).get_vocab()
    tokens = sorted(ids, key=lambda text: ids[text])
    special = {"<s>", "</s>", "<pad>", "<unk>", *SPECIAL}
    return [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", pre),
        ("add_token_list", tokens),
        ("add_token_types", [3 if text in special else 1 for text in tokens]),
        ("add_token_merges", model["merges.txt"].split("\n")[1:-1]),
        *((f"add_{name}", value) for name, value in more.items()),
    ]


def gguf_pieces(raw: Callable[[], bytes], **more) -> list[tuple]:
    names = {"tokens": "token_list", "token_type": "token_types"}
    names |= {"scores": "token_scores", "model": "tokenizer_model"}
    names |= {"unknown_token_id": "unk_token_id"}
    return [
        *(
            (f"add_{names.get(name, name)}", value)
            for key, value in piece_fields(raw()).items()
            for name in [key.removeprefix("tokenizer.ggml.")]
        ),
        *((f"add_{name}", value) for name, value in more.items()),
    ]


# (name, architecture, metadata, what transformers does not read)
GGUFS: list[tuple[str, str, Callable[[], list[tuple]], str]] = [
    ("gpt-2", "llama", lambda: gguf_fields(gpt2(), "gpt-2"), ""),
    ("default", "llama", lambda: gguf_fields(gpt2(), "default"), ""),
    ("smollm", "llama", lambda: gguf_fields(smollm(), "smollm"), "split digits"),
    (
        "llama-bpe",
        "llama",
        lambda: gguf_fields(
            llama3(), "llama-bpe", bos_token_id=SIZE, add_bos_token=True
        ),
        "",
    ),
    (
        "llama-bpe, the start left open",
        "llama",
        lambda: gguf_fields(llama3(), "llama-bpe", bos_token_id=SIZE),
        "starts no text",
    ),
    ("smaug-bpe", "llama", lambda: gguf_fields(llama3(), "smaug-bpe"), ""),
    ("tekken", "llama", lambda: gguf_fields(llama3(), "tekken"), ""),
    ("qwen2", "qwen2", lambda: gguf_fields(qwen2(), "qwen2"), "NFC"),
    ("pieces", "llama", lambda: gguf_pieces(pieces), "space before"),
    ("defined pieces", "llama", lambda: gguf_pieces(user_defined), "space before"),
    (
        "pieces without a space",
        "llama",
        lambda: gguf_pieces(pieces, add_space_prefix=False),
        "space before",
    ),
]


def check_gguf(transformers, architecture, fields, note, count, tmp_path):
    path = tmp_path / "model.gguf"
    try:
        fields = fields()
    except ImportError:
        pytest.skip("needs it: pip install sentencepiece")
    size = next(len(value) for name, value in fields if name == "add_token_list")
    config = {**LLAMA, "vocab_size": size, "model_type": architecture}
    write_gguf(path, config, fields=fields)
    metadata, _ = read_header(np.memmap(path, mode="r"), path)
    made, notes = from_gguf(metadata)
    assert not notes
    ours = Tokenizer.from_str(made["tokenizer.json"])
    found = same_tokens(transformers, path, "here", ours, mixed_texts(count))
    assert len(found.notes) == bool(note)
    assert note in "".join(found.notes)


GGUF_CASES = [pytest.param(*case[1:], id=case[0]) for case in GGUFS]


@pytest.mark.parametrize(("architecture", "fields", "note"), GGUF_CASES)
def test_gguf(architecture, fields, note, transformers, tmp_path):
    pytest.importorskip("torch", reason="needs it: pip install torch")
    check_gguf(transformers, architecture, fields, note, 200, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "fields", "note"), GGUF_CASES)
def test_gguf_on_2000_texts(architecture, fields, note, transformers, tmp_path):
    pytest.importorskip("torch", reason="needs it: pip install torch")
    check_gguf(transformers, architecture, fields, note, 2000, tmp_path)
