"""Does a converted tokenizer give the ids that `transformers` gives?"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from convert.readers.gguf_header import read_header
from convert.source import ConversionError
from convert.tokenizing.byte_level import SMOLLM
from convert.tokenizing.gguf import splitting, starts_texts
from polarjax.storage.repository import first_line

# What tokenizers differ in: digits, spaces, line ends, composed and decomposed accents,
# scripts, joined emoji, contractions, upper and lower case, code, tokens of others.
PROBES = (
    "",
    " ",
    "   ",
    " a",
    "  two  spaces ",
    "a   b",
    "tab\there",
    "\n",
    "a\n\n b\n",
    "line\r\nline\r\n",
    "\u00a0\u200b",
    "▁a ▁▁b",
    "12345",
    " 1999 and 3.14159, 1e-9",
    "½ ² Ⅷ ٣٤ १२",
    "naïve Straße Ωmega",
    "nai\u0308ve cafe\u0301",
    "ﬁ ﷺ Å ℌ",
    "日本語の文章。 한국어",
    "नमस्ते दुनिया",
    "שלום مرحبا",
    "👩‍👩‍👧‍👦 🙂🙃 🇩🇪",
    "It's we'll THEY'RE don't I'M o'clock",
    "CamelCase HTTPServer iPhone XMLhttp",
    "def f(x):\n    return x**2  # 3.14\n",
    "/usr/bin/env --a=b;c",
    "!?...)](«»",
    "\x00\x7f\ufeff",
    "aaaaaaaaaaaaaaaaa",
    "<s>a</s> <|im_start|>user\nb<|im_end|>",
    "[INST] a [/INST]",
    "<|begin_of_text|><|endoftext|>",
    "<unk><pad> <think>",
)
# And how they cut a text where one kind of character meets the next: all triples.
_KINDS = (
    "word",
    "UP",
    "12",
    " ",
    "  ",
    "\n",
    "\t",
    ".",
    "'s",
    "é",
    "e\u0301",
    "日本",
    "🙂",
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The tokenizer of `transformers` that the checkpoint's own agrees with.

    Attributes:
      tokenizer: of transformers.
      notes: where it is not AutoTokenizer's as it stands, why.
    """

    tokenizer: Any
    notes: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return _encode(self.tokenizer, text)


def same_tokens(
    transformers: Any,
    source: Path,
    checkpoint: str,
    ours: Tokenizer,
    texts: Sequence[str],
) -> Reference:
    """Compare the ids of texts that tell tokenizers apart.

    Args:
      transformers: the package.
      source: what was converted.
      checkpoint: what was made of it, for messages.
      ours: its tokenizer.
      texts: further ones to compare.

    Returns:
      The reference.

    Raises:
      ConversionError: if transformers cannot load the source's tokenizer, or at the
        first text that it reads in another way.
    """
    theirs = _load(transformers.AutoTokenizer, source)
    triples = map("".join, itertools.product(_KINDS, repeat=3))
    probes = [*texts, *PROBES, *triples, *_around(_special(ours, theirs))]
    found = _first_difference(ours, theirs, probes)
    if found is None:
        return Reference(theirs)
    name = f"{type(theirs).__name__} of transformers {transformers.__version__}"
    if (source / "tokenizer.json").exists():
        whole = _load(transformers.PreTrainedTokenizerFast, source)
        if _first_difference(ours, whole, probes) is None:
            note = (
                f"{name} does not read tokenizer.json as it stands ({found}); "
                "PreTrainedTokenizerFast does, and the checkpoint agrees with it"
            )
            return Reference(whole, (note,))
    elif source.is_file():
        reasons = _mend(theirs.backend_tokenizer, ours, source)
        if reasons and _first_difference(ours, theirs, probes) is None:
            but = "but for that it gives the checkpoint's ids"
            return Reference(theirs, tuple(f"{name} {r}; {but}" for r in reasons))
    raise ConversionError(
        f"{checkpoint} is not the same model as {source}: {found} ({name})"
    )


def _load(kind: Any, source: Path) -> Any:
    folder, options = source, {}
    if source.is_file():
        folder, options = source.parent, {"gguf_file": source.name}
    try:
        return kind.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )
    except Exception as error:  # of many types
        hint = ""
        if importlib.util.find_spec("sentencepiece") is None:
            if (folder / "tokenizer.model").exists():
                hint = "; it reads tokenizer.model by sentencepiece (pip install it)"
        raise ConversionError(
            f"transformers cannot load the tokenizer of {source}: {first_line(error)}"
            f"{hint}"
        ) from error


def _encode(theirs: Any, text: str) -> list[int]:
    return list(theirs(text, verbose=False)["input_ids"])


def _special(ours: Tokenizer, theirs: Any) -> list[str]:
    """Texts of the added and special tokens of either."""
    own = [token.content for token in ours.get_added_tokens_decoder().values()]
    return sorted(
        {*own, *theirs.get_added_vocab(), *map(str, theirs.all_special_tokens)}
    )


def _around(tokens: Iterable[str]) -> Iterator[str]:
    for token in tokens:
        yield from (token, f"a{token}b", f" a {token} b{token}\n")


def _first_difference(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> str | None:
    """The first text of which the ids differ, in words; None if there is none."""
    for text in dict.fromkeys(texts):
        our, their = ours.encode(text).ids, _encode(theirs, text)
        if our == their:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(our, their, strict=False)) if a != b),
            min(len(our), len(their)),
        )
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        return (
            f"token {at + 1} of {shown!r} is {_named(ours, our, at)}, not "
            f"{_named(ours, their, at)}"
        )
    return None


def _named(tokenizer: Tokenizer, ids: list[int], at: int) -> str:
    if at >= len(ids):
        return "none"
    return f"{ids[at]} {tokenizer.id_to_token(ids[at])!r}"


def _mend(theirs: Tokenizer, ours: Tokenizer, source: Path) -> list[str]:
    """Take over from ours what transformers does not read in a GGUF file.

    Args:
      theirs: to change.
      ours: the checkpoint's.
      source: the file.

    Returns:
      What that is.
    """
    fields, _ = read_header(np.memmap(source, mode="r"), source)
    if fields.get("tokenizer.ggml.model") == "llama":
        theirs.normalizer = ours.normalizer
        theirs.pre_tokenizer = ours.pre_tokenizer
        return ["does not put a space before texts as the file says"]
    _, split = splitting(fields)
    reasons = []
    if split == SMOLLM:
        theirs.pre_tokenizer = ours.pre_tokenizer
        reasons.append("does not split digits as the file's pre-tokenizer says")
    elif split is not None and split.composed:
        theirs.normalizer = ours.normalizer
        reasons.append("does not compose accents (NFC) as the model was trained")
    if starts_texts(fields) and "tokenizer.ggml.add_bos_token" not in fields:
        theirs.post_processor = ours.post_processor
        reasons.append("starts no text with a token, which the file leaves open")
    return reasons
