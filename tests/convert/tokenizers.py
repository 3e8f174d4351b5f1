"""Small tokenizers, trained on generated text, and folders as the hub has them."""

import io
import json
import random
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# What a text may be made of; the last ones are added or special tokens of some.
_PLAIN = """
Once|upon| a| time|the|The| sheep|12345|0| 1999|3.14|é|e\u0301|naïve|日本語|नमस्ते|
👩‍👩‍👧‍👦|🙂|don't|WE'LL|'s|it's|def f(x):|return x**2|/usr/bin|...|!?|\u200b|\u00a0|
Straße|ﬁ|▁|▁▁x|ab|Ω|\ufeff|½|x=1;|CamelCase|HTTPServer|Ä|ﷺ|한국어|a\u0300\u0316|שלום|١٢٣|\x7f
""".replace("\n", "").split("|")
_BLANKS = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n "]
_TOKENS = [*SPECIAL, "<s>", "</s>", "<unk>", "<pad>", "<think>", "<extra>", "[INST]"]
_RANGES = (
    *((0x20, 0x7E), (0xA0, 0x17F), (0x370, 0x5FF), (0x900, 0x97F), (0x3040, 0x30FF)),
    *((0x4E00, 0x4EFF), (0x1F600, 0x1F64F)),
)


def mixed_texts(count: int, tokens=_TOKENS, seed=0) -> list[str]:
    """Texts of all that tokenizers differ in.

    Args:
      count: how many.
      tokens: added and special ones that may stand among them.
      seed: of the choice.
    """
    rng = random.Random(seed)
    parts = [*_PLAIN, *_BLANKS, *tokens]
    texts = ["", *parts]
    while len(texts) < count:
        text = "".join(
            rng.choice(parts) + rng.choice(["", "", " ", "  "])
            for _ in range(rng.randint(1, 8))
        )
        if rng.random() < 0.2:
            ranges = rng.choices(_RANGES, k=rng.randint(1, 20))
            text += "".join(chr(rng.randint(*ends)) for ends in ranges)
        texts.append(text)
    return texts[:count]


def corpus() -> list[str]:
    """Lines to train on."""
    rng = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "an")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(400)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    mixed = mixed_texts(300, [], seed=2)
    return [*lines, *(text.replace("\n", " ").replace("\r", " ") for text in mixed)]


GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
SMOLLM = [pre_tokenizers.Digits(individual_digits=True), *GPT2]
LLAMA3, QWEN2 = (
    [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + "|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            behavior="isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)


def byte_level(parts, special=(), composed=False, whole=False, size=800) -> Tokenizer:
    """A byte-level tokenizer.

    Args:
      parts: its pre-tokenizers.
      special: tokens that get the first ids.
      composed: with NFC.
      whole: words that are tokens are not merged.
      size: of the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def with_tokens(tokenizer: Tokenizer, tokens) -> Tokenizer:
    """A copy that has further special tokens."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens])
    return tokenizer


def sentence_piece(kind="bpe", **options) -> bytes:
    """A SentencePiece model's file, trained as LLaMA's was unless options differ.

    Args:
      kind: "bpe" or "unigram".
      options: of the trainer.
    """
    import sentencepiece

    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=file,
        model_type=kind,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 800, "byte_fallback": True, "split_digits": True}
        | (plain | options),
    )
    return file.getvalue()


def token(text: str, special=True, **flags) -> dict:
    """A token as `added_tokens_decoder` has it."""
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **plain, "special": special, **flags}


def named(text: str) -> dict:
    """A token as transformers 4 writes it for a role."""
    return {"__type": "AddedToken", **token(text, normalized=True)}


def pair(tokenizer: Tokenizer) -> dict:
    """vocab.json and merges.txt of a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    return {"vocab.json": model["vocab"], "merges.txt": f"#version: 0.2\n{merges}\n"}


def write(folder: Path, files: dict, **config) -> Path:
    """A folder with the files of a tokenizer and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, "config.json": config}.items():
        if isinstance(content, dict):
            content = json.dumps(content)
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(content)
    return folder
