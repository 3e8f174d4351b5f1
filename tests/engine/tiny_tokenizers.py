"""Tiny tokenizers of the kinds that there are, with special and added tokens."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.models import byte_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>"]
ADDED = ["<tool>", "x y", "日é", "éÿ"]
WORDS = ["a", "b", "ab", "The", "end", ".", "é", "日本", "ÿ"]
TEXTS = ["ab", "é", "€", "😀", "\n", " ", "日本", "नम", "The end.", "<tool>", "x y"]


def _finish(tokenizer):
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_level():
    """Byte-level BPE, as GPT-2's, LLaMA-3's and Qwen's."""
    return _finish(byte_tokenizer())


def byte_fallback(prefix: bool):
    """SentencePiece's BPE with bytes as a fallback, as LLaMA-2's (with a prefix)."""
    words = [*WORDS, *(f"▁{word}" for word in WORDS), "▁", "▁▁", "e", "n", "d", "T"]
    names = ["<unk>", *words, *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(dict.fromkeys(names))},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    tokenizer.add_special_tokens(["<unk>"])
    return _finish(tokenizer)


def word_piece():
    """BERT's: a token knows from "##" whether a space stands before it."""
    names = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS), "'", "s", "do", "not"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finish(tokenizer)


def metaspace():
    """T5's: the first token's spaces are dropped."""
    names = ["<unk>", *WORDS, *(f"▁{word}" for word in WORDS), "▁", "▁▁"]
    tokenizer = Tokenizer(
        models.Unigram([(name, -1.0) for name in names], unk_id=0, byte_fallback=False)
    )
    tokenizer.decoder = decoders.Metaspace()
    return _finish(tokenizer)


def words():
    """No decoder at all: tokens with spaces between them."""
    names = ["<unk>", *WORDS]
    vocabulary = {name: i for i, name in enumerate(names)}
    return _finish(Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>")))


def suffixes():
    """Tokens that end in a mark for the space behind them."""
    names = ["<unk>", *WORDS, *(f"{word}</w>" for word in WORDS)]
    tokenizer = Tokenizer(
        models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[])
    )
    tokenizer.decoder = decoders.BPEDecoder()
    return _finish(tokenizer)


BYTE_KINDS = {
    "byte-level": byte_level,
    "byte-fallback": lambda: byte_fallback(prefix=False),
    "byte-fallback, prefix": lambda: byte_fallback(prefix=True),
}
KINDS = {
    **BYTE_KINDS,
    "WordPiece": word_piece,
    "Metaspace": metaspace,
    "no decoder": words,
    "suffixes": suffixes,
}


def some_tokens(rng, tokenizer, most=20):
    """Ids of some text, or any ids, or a mixture, special ones among them."""
    size = tokenizer.get_vocab_size()
    tokens = []
    while len(tokens) < most:
        kind = rng.random()
        if kind < 0.6:
            text = "".join(rng.choice(TEXTS, size=rng.integers(1, 4)))
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokens += ids[: rng.integers(len(ids) + 1)] if kind < 0.1 else ids
        elif kind < 0.8:
            tokens += rng.integers(size, size=2).tolist()
        elif kind < 0.9:
            tokens.append(tokenizer.token_to_id(str(rng.choice([*SPECIAL, *ADDED]))))
        else:  # half a character
            head = tokenizer.encode("😀", add_special_tokens=False).ids
            tokens += head[: rng.integers(1, max(2, len(head)))]
    return tokens[: rng.integers(1, most + 1)]
