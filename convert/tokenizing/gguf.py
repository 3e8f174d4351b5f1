"""The tokenizer that a GGUF file's metadata describe."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer

from convert.source import ConversionError
from convert.tokenizing.added import surround
from convert.tokenizing.byte_level import (
    GPT2,
    LLAMA3,
    QWEN2,
    SMAUG,
    SMOLLM,
    TEKKEN,
    Splitting,
    byte_level,
)
from convert.tokenizing.no_text import NoTextError
from convert.tokenizing.sentence_piece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    bpe,
    decoder,
    space_before_each,
)

# llama.cpp's names of pre-tokenizers. Several models may share a splitting.
_SPLITTINGS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact"), SMOLLM),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), SMAUG),
    "tekken": TEKKEN,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
}
# Metadata that would change what a text becomes, and that are not followed.
_UNREAD = ("remove_extra_whitespaces", "precompiled_charsmap")


def splitting(fields: dict[str, Any]) -> tuple[str, Splitting | None]:
    """The name of a file's pre-tokenizer, and what it does; None for an unknown one.

    Args:
      fields: the metadata.
    """
    qwen = str(fields.get("general.architecture")).startswith("qwen")
    name = fields.get("tokenizer.ggml.pre", "qwen2" if qwen else "default")
    return str(name), _SPLITTINGS.get(str(name))


def starts_texts(fields: dict[str, Any]) -> bool:
    """Whether llama.cpp starts texts with a token where the metadata do not say.

    Args:
      fields: the metadata.
    """
    llama = fields.get("tokenizer.ggml.model") == "llama"
    return llama or splitting(fields)[1] in (LLAMA3, TEKKEN)


def read(fields: dict[str, Any]) -> str:
    """The tokenizer as the text of a tokenizer.json.

    Args:
      fields: the metadata.

    Raises:
      ConversionError: if the description contradicts itself.
      NoTextError: if there is none, or it cannot be had exactly.
    """
    model = fields.get("tokenizer.ggml.model")
    if model is None:
        raise NoTextError("no tokenizer in the file")
    if model not in ("gpt2", "llama"):
        raise NoTextError(f"the file's tokenizer model {model!r} is not supported")
    for name in _UNREAD:
        if fields.get(f"tokenizer.ggml.{name}"):
            raise NoTextError(f"the file's tokenizer.ggml.{name} is not supported")
    pieces = _pieces(fields)
    if whole := fields.get("tokenizer.huggingface.json"):
        return _whole(whole, pieces)
    try:
        if model == "gpt2":
            tokenizer = _byte_level(pieces, fields)
        else:
            tokenizer = _sentence_piece(pieces, fields)
        _add_special(tokenizer, pieces)
        ends = []
        for role, default in (("bos", starts_texts(fields)), ("eos", False)):
            i = fields.get(f"tokenizer.ggml.{role}_token_id")
            wanted = fields.get(f"tokenizer.ggml.add_{role}_token", default)
            ends.append(_text(pieces, i) if wanted and i is not None else None)
        surround(tokenizer, *ends)
        return tokenizer.to_str(pretty=True)
    except (ConversionError, NoTextError):
        raise
    except Exception as error:  # the package raises bare ones
        raise ConversionError(f"the file's tokenizer is damaged: {error}") from None


def _pieces(fields: dict[str, Any]) -> list[Piece]:
    """Tokens with their scores and types, checked."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise ConversionError("tokenizer.ggml.tokens must be a list of texts")
    if len(set(tokens)) != len(tokens):
        raise ConversionError("tokenizer.ggml.tokens holds a token twice")
    for i, token in enumerate(tokens):
        if not token.isascii() and (raw := as_bytes(token)) is not None:
            raise NoTextError(f"the file's token {i}, {raw!r}, is not UTF-8")
    scores, kinds = (
        fields.get(f"tokenizer.ggml.{name}") for name in ("scores", "token_type")
    )
    kinds = kinds if isinstance(kinds, list) else [NORMAL] * len(tokens)
    scores = scores if isinstance(scores, list) else [0.0] * len(tokens)
    for name, values in (("token_type", kinds), ("scores", scores)):
        if len(values) != len(tokens):
            raise ConversionError(
                f"tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} "
                "tokens"
            )
    return [Piece(*entry) for entry in zip(tokens, scores, kinds, strict=True)]


def as_bytes(text: str) -> bytes | None:
    """The bytes of a text of the metadata that is not UTF-8; None of one that is.

    Args:
      text: as `convert.readers.gguf_header` hands it over.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="surrogateescape")
    return None


def _text(pieces: list[Piece], i: Any) -> str:
    if type(i) is not int or not 0 <= i < len(pieces):
        raise ConversionError(
            f"token id {i!r} is beyond the {len(pieces)} tokens of the file"
        )
    return pieces[i].text


def _whole(text: Any, pieces: list[Piece]) -> str:
    """The tokenizer.json that a file may hold."""
    key = "tokenizer.huggingface.json"
    try:
        ids = Tokenizer.from_str(text).get_vocab()
    except Exception as error:  # the package raises bare ones
        raise ConversionError(f"{key} is not a tokenizer: {error}") from None
    for i, piece in enumerate(pieces):
        if piece.kind == NORMAL and ids.get(piece.text) != i:
            raise ConversionError(
                f"{key} has no token {piece.text!r} of the id {i}, as "
                "tokenizer.ggml.tokens has"
            )
    return text


def _byte_level(pieces: list[Piece], fields: dict[str, Any]) -> Tokenizer:
    name, split = splitting(fields)
    if split is None:
        raise NoTextError(f"the file's pre-tokenizer {name!r} is not supported")
    merges = fields.get("tokenizer.ggml.merges") or []
    longer = [p.text for p in pieces if p.kind == NORMAL and len(p.text) > 1]
    if not merges and longer:
        raise NoTextError(
            f"the file has no merges (tokenizer.ggml.merges) for tokens such as "
            f"{longer[0]!r}"
        )
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    return byte_level(ids, merges, split)


def _sentence_piece(pieces: list[Piece], fields: dict[str, Any]) -> Tokenizer:
    if "tokenizer.ggml.scores" not in fields:
        raise NoTextError("the file has no scores (tokenizer.ggml.scores) for merges")
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    _text(pieces, unknown)
    has_bytes = any(piece.kind == BYTE for piece in pieces)
    tokenizer = Tokenizer(bpe(pieces, unknown, has_bytes))
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = space_before_each(prefix)
    tokenizer.decoder = decoder(prefix)
    return tokenizer


def _add_special(tokenizer: Tokenizer, pieces: list[Piece]) -> None:
    """Make control and user-defined tokens match in text before anything else."""
    for kinds, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
        tokenizer.add_tokens(
            [
                AddedToken(piece.text, normalized=False, special=special)
                for piece in pieces
                if piece.kind in kinds
            ]
        )
