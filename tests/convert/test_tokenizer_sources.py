"""The tokenizers of every source give the ids of `transformers.AutoTokenizer`."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from convert.readers.gguf_header import read_header
from convert.same_tokens import same_tokens
from convert.tokenizer import from_folder, from_gguf
from convert.tokenizing.sentence_piece import parse
from tests.convert.checkpoints import LLAMA, write_gguf
from tests.convert.tokenizers import (
    GPT2,
    LLAMA3,
    QWEN2,
    SMOLLM,
    SPECIAL,
    byte_level,
    mixed_texts,
    named,
    pair,
    sentence_piece,
    token,
    with_tokens,
    write,
)


@functools.cache
def gpt2() -> Tokenizer:
    return byte_level(GPT2, ["<s>", "<pad>", "</s>", "<unk>"])


@functools.cache
def smollm() -> Tokenizer:
    return byte_level(SMOLLM, SPECIAL)


@functools.cache
def llama3() -> Tokenizer:
    return byte_level(LLAMA3, whole=True)


@functools.cache
def qwen2() -> Tokenizer:
    return byte_level(QWEN2, composed=True)


@functools.cache
def pieces(kind="bpe", **options) -> bytes:
    return sentence_piece(kind, **options)


def user_defined() -> bytes:
    return pieces(user_defined_symbols="<extra>,ab", control_symbols="<pad>")


SIZE = 800  # of the vocabularies, and so the first id of what is added
LISTED = {str(SIZE + i): token(text) for i, text in enumerate(SPECIAL)}
OPT = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_bos_token": True,
    **{f"{role}_token": named("</s>") for role in ("bos", "eos", "unk")},
}
ROLES = {
    role: token("</s>") | {"normalized": True} for role in ("bos_token", "eos_token")
} | {"pad_token": token("<pad>")}
QWEN = {
    "tokenizer_class": "Qwen2Tokenizer",
    "added_tokens_decoder": LISTED,
    "additional_special_tokens": SPECIAL[1:],
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
}
LLAMA2 = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    **{f"{r}_token": named(t) for r, t in (("bos", "<s>"), ("eos", "</s>"))},
    "unk_token": named("<unk>"),
}
FIRST = {str(i): token(text) for i, text in enumerate(("<unk>", "<s>", "</s>"))}
MORE = {
    str(SIZE): token("<pad>"),
    str(SIZE + 1): token("<extra>", special=False, lstrip=True),
    str(SIZE + 2): token("<think>", special=False, normalized=True),
}
MISTRAL = {
    **LLAMA2,
    "legacy": True,
    "added_tokens_decoder": FIRST,
    **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}


def llama3_json(tokens=("<s>", *SPECIAL)) -> str:
    tokenizer = with_tokens(llama3(), tokens)
    if "<s>" in tokens:
        start = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[start]
        )
    return tokenizer.to_str()


def llama2_json() -> str:
    """As LLaMA-2's and Mistral's is published."""
    files, _ = from_gguf(piece_fields(pieces()))
    return files["tokenizer.json"]


def piece_fields(raw: bytes) -> dict:
    model = parse(raw)
    values = {
        "model": "llama",
        "tokens": [piece.text for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [piece.kind for piece in model.pieces],
        **{"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def settings(**record) -> dict:
    return {"tokenizer_config.json": record}


def model_file(raw: Callable[[], bytes], *, more=None, **record) -> Callable[[], dict]:
    return lambda: {"tokenizer.model": raw(), **settings(**record), **(more or {})}


# (name, model_type, files of the folder)
FOLDERS: list[tuple[str, str, Callable[[], dict]]] = [
    ("opt", "opt", lambda: {**pair(gpt2()), **settings(**OPT)}),
    (
        "opt's special_tokens_map",
        "opt",
        lambda: {
            **pair(gpt2()),
            **settings(tokenizer_class="GPT2Tokenizer"),
            "special_tokens_map.json": ROLES,
        },
    ),
    ("opt without a word", "opt", lambda: pair(gpt2())),
    (
        "opt with a space",
        "opt",
        lambda: {**pair(gpt2()), **settings(**OPT, add_prefix_space=True)},
    ),
    (
        "opt with a space, tokenizer.json",
        "opt",
        lambda: {
            "tokenizer.json": gpt2().to_str(),
            **settings(**OPT, add_prefix_space=True),
        },
    ),
    (
        "gpt2's class in a llama",
        "llama",
        lambda: {
            **pair(gpt2()),
            **settings(
                tokenizer_class="GPT2TokenizerFast",
                bos_token="<s>",
                eos_token="</s>",
                unk_token="<unk>",
            ),
        },
    ),
    ("qwen2", "qwen2", lambda: {**pair(qwen2()), **settings(**QWEN)}),
    ("qwen2 without a word", "qwen2", lambda: pair(qwen2())),
    (
        "qwen2's added_tokens",
        "qwen2",
        lambda: {
            **pair(qwen2()),
            "added_tokens.json": {
                text: SIZE + i for i, text in enumerate([*SPECIAL, "<extra>"])
            },
            "special_tokens_map.json": {
                "eos_token": "<|endoftext|>",
                "additional_special_tokens": SPECIAL[1:],
            },
            **settings(tokenizer_class="Qwen2Tokenizer"),
        },
    ),
    (
        "qwen3",
        "qwen3",
        lambda: {
            **pair(qwen2()),
            **settings(
                **QWEN
                | {
                    "added_tokens_decoder": {
                        **LISTED,
                        str(SIZE + 3): token("<think>", special=False),
                        str(SIZE + 4): token("e\u0301", normalized=True),
                    }
                }
            ),
        },
    ),
    (
        "qwen2's tokenizer.json, more in the configuration",
        "qwen2",
        lambda: {
            "tokenizer.json": with_tokens(qwen2(), SPECIAL).to_str(),
            **settings(
                **QWEN
                | {
                    "added_tokens_decoder": {
                        **LISTED,
                        str(SIZE + 3): token("<think>", special=False),
                        str(SIZE + 4): token("<extra>", special=False, lstrip=True),
                    }
                }
            ),
        },
    ),
    (
        "llama3",
        "llama",
        lambda: {
            "tokenizer.json": llama3_json(),
            # False has no effect on a tokenizer.json.
            **settings(tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False),
        },
    ),
    (
        "llama3 that says LlamaTokenizer",
        "llama",
        lambda: {
            "tokenizer.json": llama3_json(),
            **settings(tokenizer_class="LlamaTokenizer", add_prefix_space=False),
        },
    ),
    (
        "llama3, tokens in the configuration alone",
        "llama",
        lambda: {
            "tokenizer.json": llama3_json(()),
            **settings(
                tokenizer_class="PreTrainedTokenizerFast",
                added_tokens_decoder=LISTED | {str(SIZE + 3): token("<think>", False)},
                bos_token="<|im_start|>",
                pad_token="<pad>",
                additional_special_tokens=["<extra>"],
            ),
        },
    ),
    (
        "smollm3",
        "smollm3",
        lambda: {
            "tokenizer.json": llama3_json(SPECIAL),
            **settings(
                tokenizer_class="PreTrainedTokenizerFast",
                bos_token=None,
                eos_token="<|im_end|>",
            ),
        },
    ),
    (
        "llama2's tokenizer.json in a mistral",
        "mistral",
        lambda: {"tokenizer.json": llama2_json(), **settings(**MISTRAL)},
    ),
    (
        "llama2's tokenizer.json without a space",
        "llama",
        lambda: {
            "tokenizer.json": llama2_json(),
            **settings(**LLAMA2, add_prefix_space=False),
        },
    ),
    ("llama2's model", "llama", model_file(pieces, **LLAMA2)),
    ("llama2's model, new", "llama", model_file(pieces, **LLAMA2, legacy=False)),
    ("llama2's model, legacy", "llama", model_file(pieces, **LLAMA2, legacy=True)),
    (
        "llama2's model without a space",
        "llama",
        model_file(pieces, **LLAMA2, add_prefix_space=False),
    ),
    (
        "llama2's model with an end",
        "llama",
        model_file(pieces, **LLAMA2 | {"add_bos_token": False, "add_eos_token": True}),
    ),
    (
        "llama2's model and more tokens",
        "llama",
        model_file(pieces, **LLAMA2, added_tokens_decoder=FIRST | MORE),
    ),
    (
        "llama2's model and added_tokens",
        "llama",
        model_file(
            pieces,
            **LLAMA2,
            more={
                "added_tokens.json": {"<pad>": SIZE, "<extra>": SIZE + 1},
                "special_tokens_map.json": {"pad_token": "<pad>", "bos_token": "<s>"},
            },
        ),
    ),
    ("llama's model, defined pieces", "llama", model_file(user_defined, **LLAMA2)),
    (
        "llama's model, defined pieces, others named",
        "llama",
        model_file(user_defined, **LLAMA2, additional_special_tokens=["[INST]"]),
    ),
    ("a model without a word", "llama", lambda: {"tokenizer.model": pieces()}),
    (
        "a model without a class",
        "llama",
        model_file(
            pieces, **{k: v for k, v in LLAMA2.items() if k != "tokenizer_class"}
        ),
    ),
    ("mistral's model", "mistral", model_file(pieces, **MISTRAL)),
    (
        "mistral's model and more tokens",
        "mistral",
        model_file(
            pieces,
            **MISTRAL | {"added_tokens_decoder": FIRST | MORE, "legacy": False},
        ),
    ),
    ("mistral's model, defined pieces", "mistral", model_file(user_defined, **MISTRAL)),
    (
        "mistral's model, renamed",
        "mistral",
        model_file(
            user_defined,
            **MISTRAL | {"added_tokens_decoder": FIRST | {"3": token("<think>")}},
        ),
    ),
    (
        "unigram",
        "mistral",
        model_file(lambda: pieces("unigram"), **MISTRAL),
    ),
    (
        "normalised, without bytes",
        "mistral",
        model_file(
            lambda: pieces(
                byte_fallback=False,
                normalization_rule_name="nmt_nfkc",
                remove_extra_whitespaces=True,
            ),
            **MISTRAL,
        ),
    ),
]


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reason = "what version 5 reads is the reference"
    return pytest.importorskip("transformers", minversion="5", reason=reason)


def check_folder(transformers, files, model_type, count, folder):
    content = files()
    if "tokenizer.model" in content:
        pytest.importorskip("sentencepiece", reason="transformers reads it by that")
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
        pytest.skip("sentencepiece trains the model")
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
    check_gguf(transformers, architecture, fields, note, 200, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "fields", "note"), GGUF_CASES)
def test_gguf_on_2000_texts(architecture, fields, note, transformers, tmp_path):
    check_gguf(transformers, architecture, fields, note, 2000, tmp_path)
