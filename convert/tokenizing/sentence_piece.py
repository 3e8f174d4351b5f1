"""SentencePiece: its model files, and its algorithms as `tokenizers` has them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from convert.source import ConversionError
from convert.tokenizing.no_text import NoTextError

SPACE = "▁"  # stands for a space in the pieces
# Kinds of pieces; GGUF's types of tokens are the same.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2


@dataclasses.dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary.

    Attributes:
      text: of the piece.
      score: the higher, the earlier it is merged.
      kind: NORMAL, CONTROL and so on.
    """

    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class Model:
    """What a model file says, as far as it bears on encoding.

    Attributes:
      pieces: in the order of their ids.
      unigram: the algorithm is Unigram, not BPE.
      bytes_for_unknown: characters that no piece has become bytes.
      special: texts of the tokens "unk_token", "bos_token" and "eos_token" by these
        names; those that the file has not are missing.
      unknown: id of the piece for what is unknown.
      charsmap: SentencePiece's own form of Unicode normalisation; empty for none.
      prefix: a text is read as if a space stood before it.
      single_spaces: runs of spaces count as one, those at the ends not at all.
    """

    pieces: tuple[Piece, ...]
    unigram: bool
    bytes_for_unknown: bool
    special: dict[str, str]
    unknown: int
    charsmap: bytes
    prefix: bool
    single_spaces: bool


def message_class() -> Any:
    """The class of a model file's message.

    The fields that are read, with the numbers, types and defaults that
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    gives them. A pool of its own: a process may hold the package's definition, too.
    """
    proto = descriptor_pb2.FileDescriptorProto(name="model.proto", package="pieces")
    kinds = descriptor_pb2.FieldDescriptorProto
    messages = {
        "Piece": [
            ("piece", 1, kinds.TYPE_BYTES, ""),  # to say which one is not UTF-8
            ("score", 2, kinds.TYPE_FLOAT, "0"),
            ("type", 3, kinds.TYPE_INT32, str(NORMAL)),
        ],
        "Trainer": [
            ("model_type", 3, kinds.TYPE_INT32, str(_UNIGRAM)),
            ("treat_whitespace_as_suffix", 24, kinds.TYPE_BOOL, "false"),
            ("byte_fallback", 35, kinds.TYPE_BOOL, "false"),
            ("unk_id", 40, kinds.TYPE_INT32, "0"),
            ("bos_id", 41, kinds.TYPE_INT32, "1"),
            ("eos_id", 42, kinds.TYPE_INT32, "2"),
        ],
        "Normalizer": [
            ("precompiled_charsmap", 2, kinds.TYPE_BYTES, ""),
            ("add_dummy_prefix", 3, kinds.TYPE_BOOL, "true"),
            ("remove_extra_whitespaces", 4, kinds.TYPE_BOOL, "true"),
            ("escape_whitespaces", 5, kinds.TYPE_BOOL, "true"),
        ],
    }
    for name, fields in messages.items():
        message = proto.message_type.add(name=name)
        for field, number, kind, default in fields:
            message.field.add(
                name=field,
                number=number,
                type=kind,
                label=kinds.LABEL_OPTIONAL,
                default_value=default,
            )
    model = proto.message_type.add(name="Model")
    for field, number, message in (
        ("pieces", 1, "Piece"),
        ("trainer_spec", 2, "Trainer"),
        ("normalizer_spec", 3, "Normalizer"),
    ):
        several = kinds.LABEL_REPEATED if number == 1 else kinds.LABEL_OPTIONAL
        model.field.add(
            name=field,
            number=number,
            type=kinds.TYPE_MESSAGE,
            type_name=f".pieces.{message}",
            label=several,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("pieces.Model"))


def parse(raw: bytes) -> Model:
    """Read a model file.

    Args:
      raw: the file.

    Raises:
      ConversionError: if it is damaged.
      NoTextError: if it wants what `tokenizers` does not do.
    """
    try:
        message = message_class().FromString(raw)
    except DecodeError as error:
        raise ConversionError(f"not a SentencePiece model: {error}") from None
    trainer, normalizer = message.trainer_spec, message.normalizer_spec
    if not message.pieces:
        raise ConversionError("a SentencePiece model without pieces")
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise NoTextError("it splits text into words or characters, not BPE or Unigram")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise NoTextError("it does not keep spaces at the start of words")
    pieces = []
    for i, piece in enumerate(message.pieces):
        try:
            text = piece.piece.decode()
        except UnicodeDecodeError:
            raise NoTextError(f"its piece {i}, {piece.piece!r}, is not UTF-8") from None
        pieces.append(Piece(text, piece.score, piece.type))
    if len({piece.text for piece in pieces}) < len(pieces):
        raise ConversionError("a SentencePiece model that holds a piece twice")
    if not 0 <= trainer.unk_id < len(pieces):
        raise ConversionError(
            f"the unknown piece is {trainer.unk_id}, but there are {len(pieces)} pieces"
        )
    special = {
        f"{role}_token": pieces[i].text
        for role in ("unk", "bos", "eos")
        if 0 <= (i := getattr(trainer, f"{role}_id")) < len(pieces)
    }
    return Model(
        pieces=tuple(pieces),
        unigram=trainer.model_type == _UNIGRAM,
        bytes_for_unknown=trainer.byte_fallback,
        special=special,
        unknown=trainer.unk_id,
        charsmap=normalizer.precompiled_charsmap,
        prefix=normalizer.add_dummy_prefix,
        single_spaces=normalizer.remove_extra_whitespaces,
    )


def _merges(pieces: Sequence[Piece], kinds: Container[int]) -> list[tuple[str, str]]:
    """SentencePiece's BPE: the pair whose piece scores highest merges first.

    Every way to cut a piece into two is a merge with that piece's rank.
    """
    ranks = {
        piece.text: (-piece.score, i)
        for i, piece in enumerate(pieces)
        if piece.kind in kinds
    }
    ranked = sorted(
        (rank, text[:cut], text[cut:])
        for text, rank in ranks.items()
        for cut in range(1, len(text))
        if text[:cut] in ranks and text[cut:] in ranks
    )
    return [(left, right) for _, left, right in ranked]


def bpe(
    pieces: Sequence[Piece],
    unknown: int,
    bytes_for_unknown: bool,
    kinds: Container[int] = (NORMAL,),
    whole: bool = False,
) -> models.BPE:
    """The model of a BPE vocabulary.

    Args:
      pieces: in the order of their ids.
      unknown: id of the piece for what is unknown.
      bytes_for_unknown: characters that no piece has become bytes.
      kinds: of pieces that are merged.
      whole: a part of a text that is a piece is not put together by merges.
    """
    return models.BPE(
        vocab={piece.text: i for i, piece in enumerate(pieces)},
        merges=_merges(pieces, kinds),
        unk_token=pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=bytes_for_unknown,
        ignore_merges=whole,
    )


def decoder(prefix: bool) -> decoders.Sequence:
    """Pieces to text: spaces back, bytes to characters, the first space away.

    Args:
      prefix: whether encoding puts a space before a text.
    """
    return decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )


def space_before_each(prefix: bool) -> normalizers.Sequence:
    """Spaces as the pieces have them, one more before each part of a text.

    The parts are what lies between added tokens.

    Args:
      prefix: whether there is one more.
    """
    spaces = normalizers.Replace(" ", SPACE)
    return normalizers.Sequence(
        [normalizers.Prepend(SPACE), spaces] if prefix else [spaces]
    )


def as_trained(model: Model, names: Mapping[int, str], legacy: bool) -> Tokenizer:
    """Build the tokenizer that encodes as the SentencePiece package does.

    Args:
      model: of the file.
      names: further names of pieces, by id.
      legacy: whether the space before a text stands after each added token, too.
    """
    pieces = _renamed(model.pieces, names)
    defined = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    if model.unigram:
        scored = [(piece.text, piece.score) for piece in model.pieces]
        core = models.Unigram(scored, model.unknown, model.bytes_for_unknown)
    else:
        core = bpe(pieces, model.unknown, model.bytes_for_unknown, whole=bool(defined))
    tokenizer = Tokenizer(core)
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.single_spaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.prefix and legacy:  # Metaspace puts none before one
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), 2 * SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    parts: list[pre_tokenizers.PreTokenizer] = []
    if model.prefix:
        scheme = "always" if legacy else "first"
        parts.append(pre_tokenizers.Metaspace(SPACE, scheme, split=False))
    if defined:  # they are whole whatever is around them
        longest_first = sorted(defined, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        parts.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if parts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoder(model.prefix)
    return tokenizer


def _renamed(pieces: Sequence[Piece], names: Mapping[int, str]) -> list[Piece]:
    """Pieces under new names; a name that another piece keeps is not given away."""
    kept = {piece.text for i, piece in enumerate(pieces) if i not in names}
    return [
        dataclasses.replace(piece, text=names[i])
        if i in names and names[i] not in kept
        else piece
        for i, piece in enumerate(pieces)
    ]


def as_llama(model: Model, legacy: bool, prefix: bool) -> Tokenizer:
    """Build the tokenizer that transformers 5's LlamaTokenizer is.

    It takes BPE's pieces alone from the file. A text that begins with a space gets no
    other one before it, unlike in `as_trained`.

    Args:
      model: of the file, BPE.
      legacy: whether the space before a text stands after each added token, too.
      prefix: whether there is one.
    """
    kinds = (NORMAL, USER_DEFINED)
    tokenizer = Tokenizer(bpe(model.pieces, model.unknown, True, kinds))
    scheme = ("always" if legacy else "first") if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    tokenizer.decoder = decoder(prefix)
    return tokenizer
