"""Carry a tokenizer and its chat template over, or rebuild it from a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from convert.source import ConversionError
from polarjax.params import CHAT_TEMPLATE_FILE, TOKENIZER_FILE

Files = dict[str, str]

# Token types of GGUF.
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_UNDERLINE = "▁"  # stands for a space in SentencePiece's tokens

# How LLaMA-3 splits text before the merges: contractions, words, up to three digits,
# punctuation, line breaks, spaces.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("default", "gpt-2")
_SMOLLM = ("smollm",)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


def from_folder(folder: Path) -> tuple[Files, list[str]]:
    """Read tokenizer.json and the chat template of a Hugging Face folder.

    Args:
      folder: of the checkpoint.

    Returns:
      Text files by name, and notes for the user.

    Raises:
      ConversionError: if a file is damaged.
    """
    files, notes = {}, []
    if (folder / "tokenizer.json").exists():
        text = _text(folder / "tokenizer.json")
        try:
            Tokenizer.from_str(text)
        except Exception as error:  # the package raises bare ones
            raise ConversionError(
                f"{folder / 'tokenizer.json'} is not a tokenizer: {error}"
            ) from None
        files[TOKENIZER_FILE] = text
    else:
        notes.append(
            f"no tokenizer.json in {folder}: the checkpoint will serve token ids, "
            "not text"
        )
    template = _folder_template(folder)
    if template:
        files[CHAT_TEMPLATE_FILE] = template
    return files, notes


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ConversionError(f"{path} is not UTF-8 text: {error}") from None


def _folder_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return _text(folder / "chat_template.jinja")
    if not (folder / "tokenizer_config.json").exists():
        return None
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(_text(path))
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} is damaged: {error!r}") from None
    if not isinstance(template, str | None):
        raise ConversionError(f"{path}: chat_template must be text")
    return template


def from_gguf(fields: dict[str, Any]) -> tuple[Files, list[str]]:
    """Rebuild the tokenizer that a GGUF file's metadata describe.

    Args:
      fields: the metadata.

    Returns:
      Text files by name, and notes for the user.

    Raises:
      ConversionError: if the description contradicts itself.
    """
    files: Files = {}
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        files[CHAT_TEMPLATE_FILE] = template
    model = fields.get("tokenizer.ggml.model")
    pre = fields.get("tokenizer.ggml.pre", "default")
    unknown = None
    if model is None:
        unknown = "no tokenizer in the file"
    elif model not in ("gpt2", "llama"):
        unknown = f"the file's tokenizer model {model!r} is not supported"
    elif model == "gpt2" and pre not in (*_GPT2, *_SMOLLM, *_LLAMA3):
        unknown = f"the file's pre-tokenizer {pre!r} is not supported"
    if unknown:
        return files, [f"{unknown}: the checkpoint will serve token ids, not text"]
    vocabulary = _Vocabulary(fields)
    try:
        if model == "gpt2":
            tokenizer = _byte_level(vocabulary, fields, pre)
        else:
            tokenizer = _sentence_piece(vocabulary, fields)
        _add_special(tokenizer, vocabulary)
        _add_ends(tokenizer, vocabulary, fields, model == "llama" or pre in _LLAMA3)
        files[TOKENIZER_FILE] = tokenizer.to_str(pretty=True)
    except ConversionError:
        raise
    except Exception as error:  # the package raises bare ones
        raise ConversionError(f"the file's tokenizer is damaged: {error}") from None
    return files, []


class _Vocabulary:
    """Tokens with their types, checked."""

    def __init__(self, fields: dict[str, Any]):
        tokens = fields.get("tokenizer.ggml.tokens")
        kinds = fields.get("tokenizer.ggml.token_type")
        if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
            raise ConversionError("tokenizer.ggml.tokens must be a list of texts")
        self.tokens: list[str] = tokens
        self.kinds: list[int] = kinds if isinstance(kinds, list) else [1] * len(tokens)
        if len(self.kinds) != len(tokens):
            raise ConversionError(
                f"tokenizer.ggml.token_type has {len(self.kinds)} entries for "
                f"{len(tokens)} tokens"
            )
        self.ids = {token: i for i, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            raise ConversionError("tokenizer.ggml.tokens holds a token twice")


def _byte_level(vocabulary: _Vocabulary, fields: dict[str, Any], pre: str) -> Tokenizer:
    """GPT-2's byte-level BPE; the splitting before it differs from model to model."""
    merges = fields.get("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges] if merges else []
    if not all(len(pair) == 2 for pair in pairs):
        raise ConversionError("tokenizer.ggml.merges must hold pairs of tokens")
    # LLaMA-3 takes a whole word's token before it tries merges.
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=pairs, ignore_merges=pre in _LLAMA3)
    )
    if pre in _LLAMA3:
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
        parts = [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    else:
        parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if pre in _SMOLLM:
            parts = [pre_tokenizers.Digits(individual_digits=True), *parts]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(vocabulary: _Vocabulary, fields: dict[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: the pair whose token scores highest merges first.

    Every way to split a token into two tokens is a merge with that token's rank.
    """
    scores = fields.get("tokenizer.ggml.scores")
    ids = vocabulary.ids
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise ConversionError("tokenizer.ggml.scores must have one number per token")
    special = (_CONTROL, _USER_DEFINED, _BYTE)
    ranked = []
    for token, i in ids.items():
        if vocabulary.kinds[i] in special:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[i], ids[left], ids[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=merges,
            unk_token=vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=_BYTE in vocabulary.kinds,
        )
    )
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [
            *([normalizers.Prepend(_UNDERLINE)] if prefix else []),
            normalizers.Replace(" ", _UNDERLINE),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_UNDERLINE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer


def _add_special(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Make control and user-defined tokens match in text before anything else."""
    pairs = list(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    control = [token for token, kind in pairs if kind == _CONTROL]
    defined = [token for token, kind in pairs if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in defined])


def _add_ends(
    tokenizer: Tokenizer, vocabulary: _Vocabulary, fields: dict[str, Any], bos: bool
) -> None:
    """Put the tokens that start and end a text around it, where the model wants it.

    Args:
      tokenizer: to change.
      vocabulary: of the file.
      fields: the metadata.
      bos: whether this kind of tokenizer starts texts if the metadata do not say.
    """
    around = {"bos": "", "eos": ""}
    special = []
    for name, default in (("bos", bos), ("eos", False)):
        token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is None or not fields.get(
            f"tokenizer.ggml.add_{name}_token", default
        ):
            continue
        token = vocabulary.tokens[token_id]
        around[name] = token
        special.append((token, token_id))
    if special:
        parts = (around["bos"], "$A", around["eos"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in parts if part], special_tokens=special
        )
