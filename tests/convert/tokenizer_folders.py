"""Folders of every source of a tokenizer, as the hub has them."""

import functools
from collections.abc import Callable

from tokenizers import Tokenizer, processors

from convert.tokenizer import from_gguf
from convert.tokenizing.sentence_piece import parse
from tests.convert.tokenizers import (
    GPT2,
    LLAMA3,
    QWEN2,
    SMOLLM,
    SPECIAL,
    byte_level,
    named,
    pair,
    sentence_piece,
    token,
    with_tokens,
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
