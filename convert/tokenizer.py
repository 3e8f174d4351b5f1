"""Carry a tokenizer and its chat template over, or rebuild it from a GGUF file."""

from __future__ import annotations

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

from convert.files import LARGEST_TABLE, is_there, read_json_if_there, read_text
from convert.source import ConversionError
from polarjax.params import CHAT_TEMPLATE_FILE, TOKENIZER_FILE

Files = dict[str, str]

# Token types of GGUF.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_UNDERLINE = "▁"  # stands for a space in SentencePiece's tokens

# How LLaMA-3 and Qwen split text before the merges: contractions, words, up to three
# digits or each alone, punctuation, line breaks, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("default", "gpt-2")
_SMOLLM = ("smollm",)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN = ("qwen2", "deepseek-r1-qwen")


def from_folder(folder: Path) -> tuple[Files, list[str]]:
    """Read the tokenizer and the chat template of a Hugging Face folder.

    Args:
      folder: of the checkpoint, with tokenizer.json, or vocab.json and merges.txt.

    Returns:
      Text files by name, and notes for the user.

    Raises:
      ConversionError: if a file is damaged.
    """
    config = read_json_if_there(folder / "tokenizer_config.json")
    files, notes = {}, []
    if is_there(folder / "tokenizer.json"):
        text = read_text(folder / "tokenizer.json")
        try:
            Tokenizer.from_str(text)
        except Exception as error:  # the package raises bare ones
            raise ConversionError(
                f"{folder / 'tokenizer.json'} is not a tokenizer: {error}"
            ) from None
        files[TOKENIZER_FILE] = text
    elif all(is_there(folder / name) for name in ("vocab.json", "merges.txt")):
        files[TOKENIZER_FILE] = _from_vocab_and_merges(folder, config)
    else:
        notes.append(
            f"no tokenizer.json in {folder}: the checkpoint will serve token ids, "
            "not text"
        )
    template = _folder_template(folder, config)
    if template:
        files[CHAT_TEMPLATE_FILE] = template
    return files, notes


def _from_vocab_and_merges(folder: Path, config: dict[str, Any]) -> str:
    """GPT-2's own pair of files, as OPT has them."""
    ids = read_json_if_there(folder / "vocab.json", LARGEST_TABLE)
    # Beyond the vocabulary, and of tokenizers older than tokenizer.json.
    ids |= read_json_if_there(folder / "added_tokens.json")
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    names = {**read_json_if_there(folder / "special_tokens_map.json"), **config}
    special = {}
    for role in ("bos", "eos", "unk", "pad"):
        token = names.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            special[role] = token
    try:
        tokenizer = _byte_level(ids, merges, "gpt-2")
        tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False) for token in special.values()]
        )
        if config.get("add_bos_token") and "bos" in special:
            _surround(tokenizer, (special["bos"], ids[special["bos"]]), None)
        return tokenizer.to_str(pretty=True)
    except ConversionError:
        raise
    except Exception as error:  # the package raises bare ones
        raise ConversionError(
            f"vocab.json and merges.txt in {folder} are damaged: {error}"
        ) from None


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    if is_there(folder / "chat_template.jinja"):
        return read_text(folder / "chat_template.jinja")
    template = config.get("chat_template")
    try:
        if isinstance(template, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
    except (KeyError, TypeError):
        template = False
    if not isinstance(template, str | None):
        raise ConversionError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be text, or a "
            "list of named texts"
        )
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
    qwen = str(fields.get("general.architecture")).startswith("qwen")
    pre = fields.get("tokenizer.ggml.pre", "qwen2" if qwen else "default")
    unknown = None
    if model is None:
        unknown = "no tokenizer in the file"
    elif model not in ("gpt2", "llama"):
        unknown = f"the file's tokenizer model {model!r} is not supported"
    elif model == "gpt2" and pre not in (*_GPT2, *_SMOLLM, *_LLAMA3, *_QWEN):
        unknown = f"the file's pre-tokenizer {pre!r} is not supported"
    if unknown:
        return files, [f"{unknown}: the checkpoint will serve token ids, not text"]
    vocabulary = _Vocabulary(fields)
    try:
        if model == "gpt2":
            merges = fields.get("tokenizer.ggml.merges") or []
            tokenizer = _byte_level(vocabulary.ids, merges, pre)
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

    def token(self, i: int) -> str:
        """The text of an id."""
        if not 0 <= i < len(self.tokens):
            raise ConversionError(
                f"token id {i} is beyond the {len(self.tokens)} tokens of the file"
            )
        return self.tokens[i]


def _byte_level(ids: dict[str, int], merges: list[str], pre: str) -> Tokenizer:
    """GPT-2's byte-level BPE; the splitting before it differs from model to model."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left and right):
            raise ConversionError(f"the tokenizer's merge {merge!r} is no pair")
        pairs.append((left, right))
    # LLaMA-3 takes a whole word's token before it tries merges.
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=pairs, ignore_merges=pre in _LLAMA3)
    )
    if pre in (*_LLAMA3, *_QWEN):
        digits = "{1,3}" if pre in _LLAMA3 else ""
        split = pre_tokenizers.Split(Regex(_SPLIT % digits), behavior="isolated")
        parts = [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    else:
        parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if pre in _SMOLLM:
            parts = [pre_tokenizers.Digits(individual_digits=True), *parts]
    if pre in _QWEN:
        tokenizer.normalizer = normalizers.NFC()
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
    special = (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
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
            unk_token=vocabulary.token(unknown),
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
    control = [token for token, kind in pairs if kind in (_UNKNOWN, _CONTROL)]
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
    ends: list[tuple[str, int] | None] = []
    for name, default in (("bos", bos), ("eos", False)):
        token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
        wanted = fields.get(f"tokenizer.ggml.add_{name}_token", default)
        if wanted and token_id is not None:
            ends.append((vocabulary.token(token_id), token_id))
        else:
            ends.append(None)
    _surround(tokenizer, *ends)


def _surround(
    tokenizer: Tokenizer, first: tuple[str, int] | None, last: tuple[str, int] | None
) -> None:
    """Put these tokens around every text."""
    around = [part for part in (first, last) if part]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[
                *([first[0]] if first else []),
                "$A",
                *([last[0]] if last else []),
            ],
            special_tokens=around,
        )
