"""Tokenizers and chat templates, carried over or rebuilt."""

import itertools
import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from convert import ConversionError, convert
from tests.convert.checkpoints import LLAMA, llama_tensors, write_gguf, write_hf

TEXTS = [
    "Once upon a time, in 1999, there were 12345 sheep.",
    "  two  spaces\n\nand\tlines\r\n ",
    "It's we'll THEY'RE don't",
    "naïve Ωmega 日本語 🙂🙃 \u200b",
    "def f(x):\n    return x**2  # 3.14",
    "",
    " ",
]
CORPUS = TEXTS * 3 + ["the sheep and the time of the sheep in the lines of time"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 400
CONFIG = {**LLAMA, "vocab_size": VOCABULARY}


def byte_level(parts) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


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


def gguf_fields(tokenizer: Tokenizer, pre: str) -> list[tuple]:
    """The metadata that describe a byte-level tokenizer."""
    ids = tokenizer.get_vocab()
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(ids, key=lambda token: ids[token])
    return [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", pre),
        ("add_token_list", tokens),
        ("add_token_types", [3 if token in SPECIAL else 1 for token in tokens]),
        ("add_token_merges", [" ".join(pair) for pair in model["merges"]]),
    ]


def from_gguf(tmp_path, fields, config=CONFIG) -> Tokenizer:
    write_gguf(tmp_path / "model.gguf", config, fields=fields)
    out = tmp_path / "out"
    convert(tmp_path / "model.gguf", out, overwrite=True, progress=False)
    return Tokenizer.from_file(str(out / "tokenizer.json"))


@pytest.mark.parametrize(
    ("pre", "parts"),
    [
        *(("gpt-2", GPT2), ("default", GPT2)),
        *(("smollm", SMOLLM), ("llama-bpe", LLAMA3), ("qwen2", QWEN2)),
    ],
)
def test_byte_level(pre, parts, tmp_path):
    original = byte_level(parts)
    rebuilt = from_gguf(tmp_path, gguf_fields(original, pre))
    for text in TEXTS:
        ids = rebuilt.encode(text).ids
        assert ids == original.encode(text).ids, text
        assert rebuilt.decode(ids) == text
    marked = "<|im_start|>user\nhi<|im_end|>"
    ids = rebuilt.encode(marked).ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert rebuilt.decode(ids, skip_special_tokens=False) == marked
    assert rebuilt.decode(ids) == "user\nhi"


def test_digits(tmp_path):
    """What tells the pre-tokenizers apart most."""
    cut = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        tokenizer = from_gguf(tmp_path, gguf_fields(byte_level(GPT2), pre))
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str("12345")
        cut[pre] = [piece for piece, _ in pieces]
    assert cut == {
        "gpt-2": ["12345"],
        "smollm": ["1", "2", "3", "4", "5"],
        "llama-bpe": ["123", "45"],
        "qwen2": ["1", "2", "3", "4", "5"],
    }


def test_qwen_composes_letters(tmp_path):
    tokenizer = from_gguf(tmp_path, gguf_fields(byte_level(QWEN2), "qwen2"))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids
    # Files that do not name the pre-tokenizer are told by their architecture.
    fields = [f for f in gguf_fields(byte_level(QWEN2), "") if f[0][-4:] != "_pre"]
    unnamed = from_gguf(tmp_path, fields, {**CONFIG, "model_type": "qwen2"})
    assert unnamed.to_str() == tokenizer.to_str()


@pytest.mark.parametrize(
    ("pre", "flags", "around"),
    [
        ("gpt-2", {}, ([], [])),
        ("gpt-2", {"bos": True}, ([1], [])),
        ("gpt-2", {"bos": True, "eos": True}, ([1], [2])),
        ("gpt-2", {"bos": False, "eos": True}, ([], [2])),
        ("llama-bpe", {}, ([1], [])),
        ("llama-bpe", {"bos": False}, ([], [])),
    ],
)
def test_tokens_around_a_text(pre, flags, around, tmp_path):
    fields = gguf_fields(byte_level(GPT2), pre)
    fields += [("add_bos_token_id", 1), ("add_eos_token_id", 2)]
    fields += [(f"add_add_{name}_token", value) for name, value in flags.items()]
    tokenizer = from_gguf(tmp_path, fields)
    plain = tokenizer.encode("the sheep", add_special_tokens=False).ids
    first, last = around
    assert tokenizer.encode("the sheep").ids == [*first, *plain, *last]


# A SentencePiece vocabulary: scores need not fall with the id.
PIECES = {
    **{"<unk>": (0.0, 2), "<s>": (0.0, 3), "</s>": (0.0, 3)},
    **{f"<0x{byte:02X}>": (0.0, 6) for byte in range(256)},
    **{"▁": (-30.0, 1), "t": (-31.0, 1), "h": (-32.0, 1), "e": (-33.0, 1)},
    **{"r": (-34.0, 1), "a": (-35.0, 1), "▁t": (-5.0, 1), "th": (-4.0, 1)},
    **{"▁th": (-9.0, 1), "he": (-3.0, 1), "▁the": (-6.0, 1), "re": (-7.0, 1)},
    **{"ther": (-8.0, 1), "▁there": (-10.0, 1), "the": (-11.0, 1), "er": (-2.5, 1)},
    **{"at": (-12.0, 1), "hat": (-13.0, 1), "that": (-14.0, 1), "▁▁": (-15.0, 1)},
    **{"▁▁▁▁": (-16.0, 1), "ar": (-17.0, 1), "tt": (-17.5, 1), "te": (-18.0, 1)},
}


def sentence_piece(text: str) -> list[int]:
    """SentencePiece's BPE as its paper has it: merge the best pair, the leftmost."""
    names = list(PIECES)
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        scored = [
            (-PIECES[a + b][0], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in PIECES
        ]
        if not scored:
            break
        _, i = min(scored)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        if part in PIECES:
            ids.append(names.index(part))
        else:
            ids += [names.index(f"<0x{byte:02X}>") for byte in part.encode()]
    return ids


def sentence_piece_fields() -> list[tuple]:
    names = [*PIECES, *(f"<spare{i}>" for i in range(VOCABULARY - len(PIECES)))]
    kinds = [*(kind for _, kind in PIECES.values())]
    scores = [*(score for score, _ in PIECES.values())]
    spare = VOCABULARY - len(PIECES)
    return [
        ("add_tokenizer_model", "llama"),
        ("add_token_list", names),
        ("add_token_types", kinds + [5] * spare),
        ("add_token_scores", scores + [-1000.0] * spare),
        ("add_bos_token_id", 1),
        ("add_eos_token_id", 2),
    ]


def test_sentence_piece(tmp_path):
    tokenizer = from_gguf(tmp_path, sentence_piece_fields())
    alphabet = "the ra"
    words = ["the", "there that", "ether tat", "    the", "hé🙂", "at  ", "tthe hehe"]
    words += ["".join(alphabet[(i * j) % 6] for j in range(1, 30)) for i in range(40)]
    for text in words:
        ids = tokenizer.encode(text).ids
        assert ids == [1, *sentence_piece(text)], text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("the</s>").ids[-1] == 2


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (("add_tokenizer_pre", "viking"), "pre-tokenizer 'viking' is not supported"),
        (("add_tokenizer_model", "rwkv"), "tokenizer model 'rwkv' is not supported"),
    ],
)
def test_unknown_kinds_convert_without_a_tokenizer(change, note, tmp_path, capsys):
    fields = [
        change if name == change[0] else (name, *arguments)
        for name, *arguments in gguf_fields(byte_level(GPT2), "gpt-2")
    ]
    write_gguf(tmp_path / "model.gguf", CONFIG, fields=fields)
    convert(tmp_path / "model.gguf", tmp_path / "out", progress=False)
    err = capsys.readouterr().err
    assert note in err and err.count("\n") == 1
    assert not (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        ("add_token_merges", ["a"]),
        ("add_token_merges", ["a zzz"]),
        ("add_token_types", [1, 2, 3]),
        ("add_token_list", ["a"] * VOCABULARY),
        ("add_bos_token_id", VOCABULARY + 5),
    ],
    ids=str,
)
def test_contradictions_are_refused(change, tmp_path):
    fields = gguf_fields(byte_level(GPT2), "gpt-2")
    fields += [("add_bos_token_id", 1), ("add_add_bos_token", True)]
    fields = [change if field[0] == change[0] else field for field in fields]
    write_gguf(tmp_path / "model.gguf", CONFIG, fields=fields)
    with pytest.raises(ConversionError, match="token"):
        convert(tmp_path / "model.gguf", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_chat_template_of_a_gguf(tmp_path):
    template = "{% for m in messages %}\r\n{{ m.content }}🙂{% endfor %}"
    fields = [("add_chat_template", template)]
    write_gguf(tmp_path / "model.gguf", fields=fields)
    convert(tmp_path / "model.gguf", tmp_path / "out", progress=False)
    stored = (tmp_path / "out/chat_template.jinja").read_bytes().decode()
    assert stored == template


def test_tokenizer_json_is_copied_verbatim(tmp_path, capsys):
    folder = write_hf(tmp_path / "hf", CONFIG, llama_tensors(CONFIG))
    original = byte_level(SMOLLM).to_str()
    (folder / "tokenizer.json").write_text(original)
    convert(folder, tmp_path / "out", progress=False)
    assert (tmp_path / "out/tokenizer.json").read_text() == original
    assert capsys.readouterr().err == ""
    (folder / "tokenizer.json").write_text(original[:-100])
    with pytest.raises(ConversionError, match=r"tokenizer.json is not a tokenizer"):
        convert(folder, tmp_path / "other", progress=False)


def test_a_tokenizer_beyond_the_vocabulary_is_named(tmp_path, capsys):
    folder = write_hf(tmp_path / "hf")
    tokenizer = byte_level(GPT2)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    convert(folder, tmp_path / "out", progress=False)
    last = tokenizer.get_vocab_size() - 1
    assert f"up to {last}, but the vocabulary 61" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": "{}"}, None),
        ({"tokenizer_config.json": '{"chat_template": "A"}'}, "A"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "chat_template": [
                            {"name": "tool_use", "template": "T"},
                            {"name": "default", "template": "D"},
                        ]
                    }
                )
            },
            "D",
        ),
        (
            {
                "tokenizer_config.json": '{"chat_template": "A"}',
                "chat_template.jinja": "J",
            },
            "J",
        ),
        ({"tokenizer_config.json": '{"chat_template": [1]}'}, ConversionError),
        ({"tokenizer_config.json": '{"chat_template": 1}'}, ConversionError),
        ({"tokenizer_config.json": "{"}, ConversionError),
        ({"chat_template.jinja": b"\xff"}, ConversionError),
    ],
    ids=str,
)
def test_chat_template_of_a_folder(files, expected, tmp_path):
    folder = write_hf(tmp_path / "hf")
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(content)
    if expected is ConversionError:
        with pytest.raises(ConversionError, match=r"tokenizer_config|chat_template"):
            convert(folder, tmp_path / "out", progress=False)
        return
    convert(folder, tmp_path / "out", progress=False)
    path = tmp_path / "out/chat_template.jinja"
    assert (path.read_text() if path.exists() else None) == expected


def write_vocab_and_merges(folder, config) -> Tokenizer:
    original = byte_level(GPT2)
    model = json.loads(original.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(original.get_vocab()))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return original


OPT_TOKENS = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_bos_token": True,
    "bos_token": {"__type": "AddedToken", "content": "<|im_start|>"},
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


def test_vocab_and_merges(tmp_path):
    folder = write_hf(tmp_path / "hf", CONFIG, llama_tensors(CONFIG))
    original = write_vocab_and_merges(folder, OPT_TOKENS)
    convert(folder, tmp_path / "out", progress=False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text).ids == [1, *original.encode(text).ids]
    assert tokenizer.encode("hi<|im_end|>").ids[-1] == 2
    (folder / "merges.txt").write_text("zzz yyy\n")
    with pytest.raises(ConversionError, match=r"merges.txt in .* are damaged"):
        convert(folder, tmp_path / "other", progress=False)


def test_vocab_and_merges_as_transformers_reads_them(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )
    folder = write_hf(tmp_path / "hf", CONFIG, llama_tensors(CONFIG))
    write_vocab_and_merges(folder, OPT_TOKENS)
    convert(folder, tmp_path / "out", progress=False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    for text in [*TEXTS, "a<|im_end|>b"]:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text
