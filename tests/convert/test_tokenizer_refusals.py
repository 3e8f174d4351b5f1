"""Tokenizers that cannot be had exactly are named, and damaged ones are refused."""

import base64
import re

import pytest
from tokenizers import Tokenizer

from convert import ConversionError, convert
from convert.tokenizer import from_folder, from_gguf
from convert.tokenizing.byte_level import characters
from convert.tokenizing.sentence_piece import CONTROL, NORMAL, UNKNOWN, message_class
from tests.convert.checkpoints import LLAMA, byte_level_fields, write_gguf
from tests.convert.tokenizers import (
    GPT2,
    LLAMA3,
    byte_level,
    mixed_texts,
    pair,
    token,
    write,
)

PAIR = {"vocab.json": {"a": 0, "b": 1, "ab": 2}, "merges.txt": "#version: 0.2\na b\n"}
PIECES = [(b"<unk>", UNKNOWN), (b"<s>", CONTROL), (b"a", NORMAL), (b"b", NORMAL)]


def settings(**record) -> dict:
    return {"tokenizer_config.json": record}


def model_file(pieces=PIECES, **trainer) -> dict:
    message = message_class()()
    for i, (text, kind) in enumerate(pieces):
        message.pieces.add(piece=text, score=-float(i), type=kind)
    for name, value in {"model_type": 2, "byte_fallback": True, **trainer}.items():
        setattr(message.trainer_spec, name, value)
    return {"tokenizer.model": message.SerializeToString()}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"^no tokenizer.json in "),
        ({"tekken.json": "{}"}, r"tekken.json in .* is not read"),
        (PAIR, "do not say how text is split, and neither .* class ''"),
        (
            PAIR | settings(tokenizer_class="LlamaTokenizer"),
            "neither does the tokenizer class 'LlamaTokenizer'",
        ),
        (
            {"tokenizer.json": byte_level(GPT2).to_str()}
            | settings(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["m.M", 0]}),
            "class 'Mine' of .* comes with code of its own, which is not run",
        ),
        (
            model_file() | settings(tokenizer_class="GemmaTokenizer"),
            "what the tokenizer class 'GemmaTokenizer' makes of .* is not known",
        ),
        (
            PAIR
            | settings(
                tokenizer_class="GPT2Tokenizer",
                unk_token=None,
                added_tokens_decoder={"9": token("<x>")},
            ),
            "'<x>' is said to have the id 9, but the vocabulary gives it 3",
        ),
        (
            model_file([*PIECES, (b"\xff", NORMAL)]),
            r"tokenizer.model: its piece 4, b'\\xff', is not UTF-8",
        ),
        (
            model_file(model_type=1) | settings(tokenizer_class="LlamaTokenizer"),
            "LlamaTokenizer reads BPE whose unknown characters become bytes",
        ),
        (
            {"tokenizer.model": "YQ== 0\n"}
            | settings(added_tokens_decoder={"99999999999": token("<x>")}),
            "tokenizer.model: added token 99999999999 is far behind the 1 tokens",
        ),
        (model_file(model_type=3), "splits text into words or characters"),
        (model_file(treat_whitespace_as_suffix=True), "spaces at the start of words"),
    ],
)
def test_a_folder_serves_ids(files, words, tmp_path):
    write(tmp_path, files, model_type="llama")
    made, notes = from_folder(tmp_path)
    assert not made and len(notes) == 1
    assert re.search(words, notes[0]), notes
    assert notes[0].endswith("the checkpoint will serve token ids, not text")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.model": b"\xff\xff"}, "not a SentencePiece model"),
        ({"tokenizer.model": b""}, "without pieces"),
        (model_file([*PIECES, PIECES[-1]]), "holds a piece twice"),
        (model_file(unk_id=9), "the unknown piece is 9, but there are 4 pieces"),
        (PAIR | {"vocab.json": {"a": "x"}}, "vocab.json and merges.txt .* are damaged"),
        (PAIR | {"merges.txt": "ab"}, "merge 'ab' is no pair"),
        (PAIR | {"added_tokens.json": {"<x>": "3"}}, "gives '<x>' the id '3'"),
        (
            PAIR | {"special_tokens_map.json": {"bos_token": 5}},
            "bos_token in .* must be a text with flags, not 5",
        ),
        *(
            (PAIR | settings(tokenizer_class="GPT2Tokenizer", **record), words)
            for record, words in (
                ({"added_tokens_decoder": []}, "must give a token for each id"),
                ({"added_tokens_decoder": {"x": {}}}, "must give a token for each id"),
                ({"added_tokens_decoder": {"9" * 5000: token("a")}}, "for each id"),
                ({"added_tokens_decoder": {"3": "a"}}, "must give a token for each id"),
                ({"added_tokens_decoder": {"3": {"content": 1}}}, "token 3 in .* must"),
                ({"bos_token": {"content": "a", "lstrip": 1}}, "bos_token in .* must"),
                ({"additional_special_tokens": "<x>"}, "must be a list of tokens"),
                ({"additional_special_tokens": [1]}, "a special token in .* must be"),
                ({"extra_special_tokens": {"x": 1}}, "x in .* must be a text"),
            )
        ),
        (PAIR | settings(tokenizer_class=5), "tokenizer_class must be a name, not 5"),
    ],
)
def test_damage_in_a_folder(files, words, tmp_path):
    model = "llama" if "tokenizer.model" in files else "opt"
    write(tmp_path, files, model_type=model)
    with pytest.raises(ConversionError, match=words) as caught:
        from_folder(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_tiktoken(tmp_path):
    """LLaMA-3's own file, called tokenizer.model too."""
    original = byte_level(LLAMA3, whole=True)
    byte = {character: i for i, character in enumerate(characters())}
    lines = [
        f"{base64.b64encode(bytes(byte[c] for c in text)).decode()} {i}\n"
        for text, i in original.get_vocab().items()
    ]
    size = len(lines)
    # Between the added tokens are ids of which nothing is said.
    listed = {str(size): token("<s>"), str(size + 4): token("</s>")}
    record = settings(bos_token="<s>", add_bos_token=True, added_tokens_decoder=listed)
    write(tmp_path, {"tokenizer.model": "".join(lines), **record}, model_type="llama")
    made, notes = from_folder(tmp_path)
    assert not notes
    tokenizer = Tokenizer.from_str(made["tokenizer.json"])
    for text in mixed_texts(200, []):
        assert tokenizer.encode(text).ids == [size, *original.encode(text).ids], text
    assert tokenizer.encode("a</s>").ids[-1] == size + 4


def test_what_a_folder_leaves_open_is_said(tmp_path):
    record = settings(split_special_tokens=True)
    write(tmp_path, model_file() | record, model_type="llama")
    _, notes = from_folder(tmp_path)
    assert len(notes) == 2
    assert notes[0].startswith("split_special_tokens of tokenizer_config.json is not")
    assert "starts a text with a token (add_bos_token of" in notes[1]


def gguf(**changes) -> dict:
    """Metadata; None leaves an entry out."""
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab"],
        "token_type": [1, 1, 1],
        "merges": ["a b"],
    }
    fields |= changes
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items() if v is not None}


SPM = {"model": "llama", "scores": [0.0, -1.0, -2.0], "pre": None, "merges": None}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (gguf(merges=None), r"no merges \(tokenizer.ggml.merges\) .* such as 'ab'"),
        (gguf(merges=[]), r"no merges \(tokenizer.ggml.merges\) .* such as 'ab'"),
        (gguf(pre="viking"), "the file's pre-tokenizer 'viking' is not supported"),
        (gguf(model="rwkv"), "the file's tokenizer model 'rwkv' is not supported"),
        (gguf(model=None), "no tokenizer in the file"),
        (
            gguf(tokens=["a", "b", "\udcff\udcfe"]),
            r"the file's token 2, b'\\xff\\xfe', is not UTF-8",
        ),
        (gguf(**SPM | {"scores": None}), "no scores"),
        (
            gguf(**SPM, remove_extra_whitespaces=True),
            "tokenizer.ggml.remove_extra_whitespaces is not supported",
        ),
        (
            gguf(**SPM, precompiled_charsmap=[1]),
            "tokenizer.ggml.precompiled_charsmap is not supported",
        ),
    ],
    ids=str,
)
def test_a_gguf_serves_ids(fields, words):
    made, notes = from_gguf(fields)
    assert not made and len(notes) == 1
    assert re.search(words, notes[0]), notes
    assert notes[0].endswith("the checkpoint will serve token ids, not text")


def test_a_gguf_without_merges_that_needs_none():
    made, notes = from_gguf(gguf(tokens=["a", "b", "c"], merges=None))
    assert not notes
    tokenizer = Tokenizer.from_str(made["tokenizer.json"])
    assert tokenizer.encode("cab").ids == [2, 0, 1]


def test_a_gguf_that_holds_a_tokenizer_json(tmp_path):
    whole = byte_level(LLAMA3, whole=True).to_str()
    ids = Tokenizer.from_str(whole).get_vocab()
    fields = gguf(
        tokens=sorted(ids, key=lambda text: ids[text]),
        token_type=[1] * len(ids),
        pre="viking",
        merges=None,
    )
    made, notes = from_gguf({**fields, "tokenizer.huggingface.json": whole})
    assert made["tokenizer.json"] == whole and not notes
    for wrong, words in (("{}", "is not a tokenizer"), (whole, "has no token 'zz'")):
        fields["tokenizer.ggml.tokens"][5] = "zz"
        with pytest.raises(ConversionError, match=f"huggingface.json {words}"):
            from_gguf({**fields, "tokenizer.huggingface.json": wrong})


def test_bytes_of_a_gguf_that_are_not_utf8(tmp_path, capsys):
    """A token may be any bytes; the file is not damaged."""
    name, tokens = byte_level_fields()[2]
    fields = [f for f in byte_level_fields() if f[0] != name]
    raw = [token.encode() for token in tokens]
    raw[60] = b"\xff\xfe"
    write_gguf(tmp_path / "model.gguf", fields=[(name, raw), *fields])
    convert(tmp_path / "model.gguf", tmp_path / "out", progress=False)
    err = capsys.readouterr().err
    assert "the file's token 60, b'\\xff\\xfe', is not UTF-8" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out/tokenizer.json").exists()
    made, notes = from_gguf({**gguf(), "tokenizer.chat_template": "\udcff"})
    assert set(made) == {"tokenizer.json", "tokenizer_config.json"}
    assert notes == ["the file's chat template is not UTF-8: it is left out"]


def test_a_gguf_without_merges_is_converted(tmp_path, capsys):
    fields = [f for f in byte_level_fields() if f[0] != "add_token_merges"]
    write_gguf(tmp_path / "model.gguf", LLAMA, fields=fields)
    convert(tmp_path / "model.gguf", tmp_path / "out", progress=False)
    assert "no merges (tokenizer.ggml.merges)" in capsys.readouterr().err
    assert not (tmp_path / "out/tokenizer.json").exists()
    write_gguf(tmp_path / "model.gguf", LLAMA, fields=byte_level_fields())
    convert(tmp_path / "model.gguf", tmp_path / "whole", progress=False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "whole/tokenizer.json"))
    assert tokenizer.encode("tuv").ids == [8, 2]


def test_line_ends_of_another_system(tmp_path):
    files = pair(byte_level(GPT2))
    texts = mixed_texts(50, [])
    found = []
    for name, ends in (("unix", "\n"), ("other", "\r\n")):
        merges = files["merges.txt"].replace("\n", ends)
        write(tmp_path / name, {**files, "merges.txt": merges}, model_type="opt")
        made, _ = from_folder(tmp_path / name)
        tokenizer = Tokenizer.from_str(made["tokenizer.json"])
        found.append([tokenizer.encode(text).ids for text in texts])
    assert found[0] == found[1]
