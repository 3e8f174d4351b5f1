"""A Hugging Face folder's tokenizer, from whichever files it has.

The order and the rules are those of transformers 5's AutoTokenizer. What it makes of a
tokenizer.json whose class it builds anew (it drops SmolLM2's cutting of digits, and the
space before LLaMA-2's texts that begin with one) is not followed: the file is what the
model has learned with, and transformers 4 and every other program read it as it is.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from convert.files import (
    LARGEST_TABLE,
    LARGEST_TEXT,
    check_file,
    is_there,
    read_json,
    read_text,
)
from convert.source import ConversionError
from convert.tokenizing.added import Declared, add, read_declared, surround
from convert.tokenizing.byte_level import (
    GPT2,
    QWEN2,
    byte_level,
    from_ranks,
    parse_ranks,
)
from convert.tokenizing.no_text import NoTextError
from convert.tokenizing.sentence_piece import (
    CONTROL,
    USER_DEFINED,
    as_llama,
    as_trained,
    parse,
)

_GPT2, _QWEN2, _LLAMA = "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"
# That LLaMA-1's files name.
_OLD_LLAMA = "LLaMATokenizer"
# Classes that say nothing: the file does.
_PLAIN = ("", "PreTrainedTokenizer", "TokenizersBackend")
# Of a model that names none.
_OF_MODEL = {"opt": _GPT2, "qwen2": _QWEN2, "qwen3": _QWEN2}
_DEFAULTS = {
    _GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    _QWEN2: dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    _LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
_MOST_RESERVED = 2**16  # ids behind a vocabulary that may be without a token
_SENTENCE_PIECE = ("tokenizer.model", "tiktoken.model")


def read(
    folder: Path, config: dict[str, Any], settings: dict[str, Any]
) -> tuple[str, list[str]]:
    """The folder's tokenizer as the text of a tokenizer.json.

    Args:
      folder: of the checkpoint.
      config: its config.json.
      settings: its tokenizer_config.json.

    Returns:
      The text, and notes for the user.

    Raises:
      ConversionError: if a file is damaged.
      NoTextError: if there is none, or it cannot be had exactly.
    """
    kind = _class(folder, config, settings)
    notes = []
    if settings.get("split_special_tokens"):
        notes.append(
            "split_special_tokens of tokenizer_config.json is not followed: special "
            "tokens in a text are matched"
        )
    if is_there(folder / "tokenizer.json"):
        return _from_json(folder, kind, settings), notes
    pair = all(is_there(folder / name) for name in ("vocab.json", "merges.txt"))
    if pair and kind in (_GPT2, _QWEN2):
        return _from_vocab_and_merges(folder, kind, settings), notes
    for name in _SENTENCE_PIECE:
        if is_there(folder / name) and kind not in (_GPT2, _QWEN2):
            if settings.get("add_bos_token") is None:
                notes.append(
                    f"nothing says whether {folder / name} starts a text with a token "
                    "(add_bos_token of tokenizer_config.json): like transformers 5, it "
                    "does not"
                )
            return _from_model(folder / name, kind, settings), notes
    if pair:
        raise NoTextError(
            f"vocab.json and merges.txt in {folder} do not say how text is split, and "
            f"neither does the tokenizer class {kind!r}: no tokenizer.json"
        )
    if is_there(folder / "tekken.json"):
        raise NoTextError(f"tekken.json in {folder} is not read: no tokenizer.json")
    raise NoTextError(f"no tokenizer.json in {folder}")


def read_roles(
    folder: Path, config: dict[str, Any], settings: dict[str, Any]
) -> dict[str, str]:
    """Texts of the special tokens that have a role, such as "bos_token".

    Args:
      folder: of a checkpoint that `read` has a tokenizer of.
      config: its config.json.
      settings: its tokenizer_config.json.

    Raises:
      ConversionError: if a file is damaged.
    """
    kind = _class(folder, config, settings)
    path = folder / "tokenizer.json"
    if is_there(path) and _is_misnamed(kind, read_text(path)):
        kind = ""
    declared = read_declared(folder, settings, _DEFAULTS.get(kind, {}))
    return {role: token.content for role, token in declared.named.items()}


def _is_misnamed(kind: str, tokenizer: str) -> bool:
    """Whether a tokenizer.json is not of its class: LLaMA-3's files say so, wrongly."""
    return kind == _LLAMA and '"ByteLevel"' in tokenizer


def _class(folder: Path, config: dict[str, Any], settings: dict[str, Any]) -> str:
    """The class that transformers takes; empty where the file decides."""
    model = config.get("model_type")
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(named, str | None):
        raise ConversionError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class must be a name, not "
            f"{named!r}"
        )
    if model == "qwen2":  # whatever its files say
        return _QWEN2
    if named is None:
        return _OF_MODEL.get(str(model), "")
    named = named.removesuffix("Fast")
    own = settings.get("auto_map")
    own = own.get("AutoTokenizer") if isinstance(own, dict) else own
    if own and named not in (*_PLAIN, *_DEFAULTS):
        raise NoTextError(
            f"the tokenizer class {named!r} of {folder} comes with code of its own, "
            "which is not run"
        )
    if named in _PLAIN or model == "mistral":
        return ""
    return _LLAMA if named == _OLD_LLAMA else named


def _from_json(folder: Path, kind: str, settings: dict[str, Any]) -> str:
    path = folder / "tokenizer.json"
    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare ones
        raise ConversionError(f"{path} is not a tokenizer: {error}") from None
    before = tokenizer.to_str()
    if _is_misnamed(kind, before):
        kind = ""
    prefix = settings.get("add_prefix_space")
    if kind in _DEFAULTS and isinstance(prefix, bool):
        tokenizer = _with_prefix(tokenizer, prefix)
    _add(tokenizer, read_declared(folder, settings, _DEFAULTS.get(kind, {})), kind)
    return text if tokenizer.to_str() == before else tokenizer.to_str(pretty=True)


def _with_prefix(tokenizer: Tokenizer, prefix: bool) -> Tokenizer:
    """The same with, or without, a space put before each text."""
    record = json.loads(tokenizer.to_str())
    for step in _steps(record, "pre_tokenizer", "pretokenizers"):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = prefix
        elif step["type"] == "Metaspace" and not prefix:
            step["prepend_scheme"] = "never"
    if not prefix:
        for name, inner, kind in (
            ("normalizer", "normalizers", "Prepend"),
            ("decoder", "decoders", "Strip"),
        ):
            kept = [s for s in _steps(record, name, inner) if s["type"] != kind]
            record[name] = {"type": "Sequence", inner: kept} if kept else None
    return Tokenizer.from_str(json.dumps(record))


def _steps(record: dict[str, Any], name: str, inner: str) -> list[dict[str, Any]]:
    step = record.get(name)
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def _from_vocab_and_merges(folder: Path, kind: str, settings: dict[str, Any]) -> str:
    """A pair of files as GPT-2, OPT and Qwen have them."""
    ids = read_json(folder / "vocab.json", LARGEST_TABLE)
    lines = read_text(folder / "merges.txt").replace("\r\n", "\n").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    splitting = QWEN2 if kind == _QWEN2 else GPT2
    declared = read_declared(folder, settings, _DEFAULTS[kind])
    try:
        tokenizer = byte_level(
            ids, merges, splitting, settings.get("add_prefix_space") is True
        )
    except Exception as error:  # the package raises bare ones
        raise ConversionError(
            f"vocab.json and merges.txt in {folder} are damaged: {error}"
        ) from None
    return _finished(tokenizer, declared, kind, settings)


def _from_model(path: Path, kind: str, settings: dict[str, Any]) -> str:
    """SentencePiece's file, or tiktoken's, which LLaMA-3 has under the same name."""
    if kind not in ("", _LLAMA):
        raise NoTextError(
            f"what the tokenizer class {kind!r} makes of {path} is not known: no "
            "tokenizer.json"
        )
    check_file(path, LARGEST_TEXT)
    raw, folder = path.read_bytes(), path.parent
    try:
        if ranks := parse_ranks(raw):
            declared = read_declared(folder, settings, _DEFAULTS.get(kind, {}))
            declared = _without_gaps(declared, len(ranks))
            tokenizer = from_ranks(ranks)
        else:
            tokenizer, declared = _from_pieces(raw, folder, kind, settings)
    except (ConversionError, NoTextError) as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # the package raises bare ones
        raise ConversionError(f"{path} is damaged: {error}") from None
    return _finished(tokenizer, declared, kind, settings)


def _without_gaps(declared: Declared, size: int) -> Declared:
    """Tokens for the ids from `size` on that nothing is said of, so that others fit."""
    last = max(declared.listed, default=0)
    if last > size + _MOST_RESERVED:
        raise NoTextError(f"added token {last} is far behind the {size} tokens")
    listed = {
        i: AddedToken(f"<|reserved_token_{i}|>", special=True)
        for i in range(size, last)
    }
    listed |= declared.listed
    return dataclasses.replace(declared, listed=dict(sorted(listed.items())))


def _from_pieces(
    raw: bytes, folder: Path, kind: str, settings: dict[str, Any]
) -> tuple[Tokenizer, Declared]:
    model = parse(raw)
    declared = read_declared(folder, settings, _DEFAULTS.get(kind, model.special))
    if kind == _LLAMA:
        if model.unigram or not model.bytes_for_unknown:
            raise NoTextError(f"{kind} reads BPE whose unknown characters become bytes")
        legacy = bool(settings.get("legacy"))
        prefix = settings.get("add_prefix_space") is not False
        tokenizer = as_llama(model, legacy, prefix)
        matched = (CONTROL, USER_DEFINED)
    else:
        names = {i: token.content for i, token in declared.listed.items()}
        tokenizer = as_trained(model, names, bool(settings.get("legacy", True)))
        matched = (CONTROL,)
        if (
            model.prefix
        ):  # a normalised text begins with a space, which none of them has
            declared = declared.as_written()
    if declared.extra is None:
        extra = [
            AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
            for piece in model.pieces
            if piece.kind in matched
        ]
        declared = dataclasses.replace(declared, extra=extra)
    return tokenizer, declared


def _add(tokenizer: Tokenizer, declared: Declared, kind: str) -> None:
    add(tokenizer, declared)
    if kind == _QWEN2:  # matches them in the text as it was given, whatever the flags
        texts = [token.content for token in declared.special()]
        tokenizer.add_tokens([AddedToken(text, special=True) for text in texts])


def _finished(
    tokenizer: Tokenizer, declared: Declared, kind: str, settings: dict[str, Any]
) -> str:
    """With its added tokens, and those that start and end a text, as JSON."""
    _add(tokenizer, declared, kind)
    ends = []
    for role in ("bos", "eos"):
        token = declared.named.get(f"{role}_token")
        wanted = settings.get(f"add_{role}_token") is True
        ends.append(token.content if wanted and token else None)
    surround(tokenizer, *ends)
    return tokenizer.to_str(pretty=True)
