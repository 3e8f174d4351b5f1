"""`convert --verify`: it sees what it should, and says why where it cannot look."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import pytest

import polarjax
from convert import ConversionError, convert
from convert.__main__ import main
from convert.same_tokens import same_tokens
from convert.tokenizing import byte_level as splittings
from convert.verify import read_prompts, verify
from tests.convert import tokenizer_folders
from tests.convert.checkpoints import LLAMA, OPT, opt_tensors, write_gguf, write_hf
from tests.convert.tokenizers import (
    QWEN2,
    SMOLLM,
    SPECIAL,
    byte_level,
    pair,
    write,
)
from tests.models import byte_tokenizer
from tests.seal import seal

BYTES = {**LLAMA, "vocab_size": 257, "sliding_window": 20, "model_type": "mistral"}
BYTES["architectures"] = ["MistralForCausalLM"]


@pytest.fixture(scope="module", autouse=True)
def reference():
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    pytest.importorskip("transformers", reason="needs it: pip install transformers")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for such small models more only cost
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a tokenizer of bytes and a sliding window."""
    folder = write_hf(tmp_path_factory.mktemp("verify") / "hf", BYTES)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder


@pytest.fixture(scope="module")
def checkpoint(source):
    folder = source.parent / "out"
    convert(source, folder, dtype="bfloat16", progress=False)
    return folder


def test_converts_then_compares_then_compares_alone(source, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n\nragged ones\nthat cross the sliding window\n")
    out = tmp_path / "out"
    command = [str(source), str(out), "--verify", "--prompts", str(prompts)]
    assert main([*command, "--dtype", "float32"]) == 0
    first = capsys.readouterr().out
    for words in (f"{out}: mistral", "3 prompts, 41 tokens, float32", "41 of 41"):
        assert words in first
    made = (out / "config.json").stat().st_mtime_ns
    assert main(command) == 0
    assert "mistral" not in capsys.readouterr().out
    assert (out / "config.json").stat().st_mtime_ns == made


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_no_difference(dtype, tmp_path):
    """Without a tokenizer, too, and for the other family."""
    source = write_hf(tmp_path / "hf", OPT, opt_tensors())
    convert(source, tmp_path / "out", dtype=dtype, progress=False)
    found = verify(source, tmp_path / "out")
    assert found.agrees and 0 < found.relative_error < 1e-5
    assert (found.dtype, found.prompts) == (dtype, 4)
    # Random ids, cut to the context of 20.
    assert found.tokens == 1 + 7 + 20 + 20
    assert found.perplexities[0] == pytest.approx(found.perplexities[1], rel=1e-5)


def test_gguf(tmp_path):
    pytest.importorskip("accelerate", reason="needs it: pip install accelerate")
    write_gguf(tmp_path / "model.gguf", kind="Q4_0")
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype="float32", progress=False)
    found = verify(tmp_path / "model.gguf", tmp_path / "out")
    assert found.agrees and found.uncrossed == 0


@pytest.mark.parametrize("change", ["scaled", "one number", "NaN"])
def test_other_weights_are_seen(change, source, checkpoint, tmp_path, capsys):
    params = polarjax.load(checkpoint)

    def spoil(path, leaf):
        if jax.tree_util.keystr(path) != "['layers_1']['mlp']['up']":
            return leaf
        if change == "scaled":
            return leaf * 1.01
        return leaf.at[3, 5].set(float("nan") if change == "NaN" else 9.0)

    weights = jax.tree_util.tree_map_with_path(spoil, params.weights)
    polarjax.save(dataclasses.replace(params, weights=weights), tmp_path / "out")
    assert main([str(source), str(tmp_path / "out"), "--verify"]) == 1
    assert "NOT the same model" in capsys.readouterr().out


def test_says_which_window_was_not_crossed(source, checkpoint, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("short\n")
    command = [str(source), str(checkpoint), "--verify", "--prompts", str(prompts)]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no prompt is longer than the sliding window of 20 tokens" in shown
    assert verify(source, checkpoint).uncrossed == 0


def test_what_cannot_be_compared(source, checkpoint, tmp_path, monkeypatch):
    def refused(words, *arguments):
        with pytest.raises(ConversionError, match=words):
            verify(*arguments)

    refused("no such file or folder", tmp_path / "no", checkpoint)
    refused(
        "prompt 2 has 65 tokens; it may have 1 to 64",
        *(source, checkpoint),
        ["a", "b" * 65],
    )
    refused("prompt 1 has 0 tokens", source, checkpoint, [""])
    # Of one token the attention is its value, whatever queries and keys are.
    refused("no prompt has two tokens", source, checkpoint, ["a", "b"])
    refused("no prompt has two tokens", source, checkpoint, [])
    other = write_hf(tmp_path / "other")
    convert(other, tmp_path / "ids", progress=False)
    refused("has no tokenizer for prompts", other, tmp_path / "ids", ["text"])
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(ConversionError, match="holds no prompts"):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"windows": []}, r"windows is \(\), not \(20, 20\)"),
        ({"windows": [19, 20]}, r"windows is \(19, 20\), not"),
        ({"context": 128}, "context is 128, not 64"),
        ({"bos_ids": []}, r"bos_ids is \(\), not \(1,\)"),
        ({"eos_ids": [2, 5]}, r"eos_ids is \(2, 5\), not \(2,\)"),
        ({"rope": {"theta": 9.0}}, "rope.theta is 9.0, not 500.0"),
        ({"rope": None, "family": "llama"}, "family is 'llama', not 'mistral'"),
        # Sizes that the weights do not have, too.
        ({"kv_heads": 4}, "kv_heads|config.json"),
        ({"dim": 64}, "dim|config.json"),
    ],
    ids=str,
)
def test_another_configuration(changes, match, source, checkpoint, tmp_path):
    """Short prompts would show few of them."""
    folder = shutil.copytree(checkpoint, tmp_path / "out")
    fields = json.loads((folder / "config.json").read_text())
    if changes.get("rope"):
        changes = {"rope": {**fields["rope"], **changes["rope"]}}
    (folder / "config.json").write_text(json.dumps(fields | changes))
    seal(folder)
    with pytest.raises(ValueError, match=match) as caught:
        verify(source, folder, ["short"])
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_shorter_model_of_the_same_vocabulary(checkpoint, tmp_path):
    config = {**OPT, "vocab_size": 257}
    source = write_hf(tmp_path / "hf", config, opt_tensors(config))
    with pytest.raises(ConversionError, match="family is 'mistral', not 'opt'"):
        verify(source, checkpoint)


def test_ids_beyond_the_vocabulary_are_in_neither(source, tmp_path):
    other = shutil.copytree(source, tmp_path / "hf")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 257]}))
    convert(other, tmp_path / "out", progress=False)
    assert verify(other, tmp_path / "out", ["short"]).agrees


def test_another_tokenizer(source, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "out")
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record, indent=1))  # as another version may write it
    assert verify(source, folder, ["short"]).agrees
    ids = record["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    for text in (json.dumps(record), "{}"):
        path.write_text(text)
        with pytest.raises(ConversionError, match=r"its tokenizer.json is another"):
            verify(source, folder, ["short"])
    path.unlink()
    with pytest.raises(ConversionError, match=r"its tokenizer.json is another"):
        verify(source, folder)


SMALL = {**LLAMA, "vocab_size": 900, "max_position_embeddings": 512}


def qwen2_source(folder):
    """A Qwen2 without tokenizer.json, so that its class says how text is split."""
    config = {**SMALL, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    write_hf(folder, config)
    return write(folder, pair(byte_level(QWEN2, composed=True)), **config)


def test_wrong_tokens_are_seen(tmp_path, monkeypatch):
    """Our own reading on both sides would agree with itself."""
    source = qwen2_source(tmp_path / "hf")
    convert(source, tmp_path / "right", progress=False)
    found = verify(source, tmp_path / "right")
    assert found.agrees and not found.notes
    monkeypatch.setattr("convert.tokenizing.folder.QWEN2", splittings.GPT2)
    convert(source, tmp_path / "wrong", progress=False)
    with pytest.raises(ConversionError) as caught:
        verify(source, tmp_path / "wrong", ["no digits"])
    words = r"wrong is not the same model as .*/hf: token \d+ of '.*' is \d+ '.*', not "
    assert re.search(words, str(caught.value)), caught.value
    assert "Qwen2Tokenizer of transformers" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "12345",
        "e\u0301",
        "It's",
        "  12",
        "🙂.'s",
        "<s>a</s>",
        " a <|im_end|> b<|im_end|>",
    ],
    ids=ascii,
)
def test_each_probe_is_read(text, monkeypatch):
    """One text that the tokenizers read in two ways is enough."""
    theirs = byte_level(QWEN2, composed=True)

    class Theirs:
        all_special_tokens = ()

        @classmethod
        def from_pretrained(cls, *_, **__):
            return cls()

        def __call__(self, other, verbose):
            ids = theirs.encode(other).ids
            return {"input_ids": [*ids, 7] if text in other else ids}

        def get_added_vocab(self):
            return {"<|im_end|>": 1}

    class Package:
        AutoTokenizer, __version__ = Theirs, "5"

    with pytest.raises(ConversionError, match="is none, not 7"):
        same_tokens(Package, Path("/nowhere"), "here", theirs, [])


def test_prompts_are_read_by_the_reference(source, checkpoint, monkeypatch):
    asked = []

    def encode(self, text):
        asked.append(text)
        return [1, 2, 3]

    monkeypatch.setattr("convert.same_tokens.Reference.encode", encode)
    assert verify(source, checkpoint, ["any", "texts"]).tokens == 6
    assert asked == ["any", "texts"]


def smollm_json():
    record = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>"}
    record |= {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return {
        "tokenizer.json": byte_level(SMOLLM, SPECIAL).to_str(),
        "tokenizer_config.json": record,
    }


def llama2_json():
    pytest.importorskip("sentencepiece", reason="needs it: pip install sentencepiece")
    record = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    text = tokenizer_folders.llama2_json()
    return {"tokenizer.json": text, "tokenizer_config.json": record}


@pytest.mark.parametrize(
    ("files", "kind"),
    [(smollm_json, "GPT2Tokenizer"), (llama2_json, "LlamaTokenizer")],
)
def test_a_class_that_does_not_read_its_file(files, kind, tmp_path, capsys):
    """Transformers 5 builds these anew from their vocabulary: the file is right."""
    pytest.importorskip(
        "transformers", minversion="5", reason="needs 5: pip install 'transformers>=5'"
    )
    source = write_hf(tmp_path / "hf", SMALL)
    write(source, files(), **SMALL)
    assert main([str(source), str(tmp_path / "out"), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert f"note: {kind} of transformers" in shown
    assert "does not read tokenizer.json as it stands" in shown


def test_a_tokenizer_that_transformers_refuses(source, checkpoint, tmp_path):
    source = shutil.copytree(source, tmp_path / "hf")
    # Which the conversion does not read.
    (source / "tokenizer_config.json").write_text('{"padding_side": "up"}')
    with pytest.raises(ConversionError, match=r"cannot load the tokenizer of .*/hf: "):
        verify(source, checkpoint)


def test_says_that_no_text_was_compared(tmp_path, capsys):
    source = write_hf(tmp_path / "hf")
    assert main([str(source), str(tmp_path / "out"), "--verify"]) == 0
    assert "note: the checkpoint has no tokenizer: " in capsys.readouterr().out


def test_nothing_of_the_source_is_run(source, checkpoint, tmp_path):
    """Neither its Python nor a pickle, even where safetensors lie beside them."""
    source = shutil.copytree(source, tmp_path / "hf")
    config = {**BYTES, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (source / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (source / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Model: pass\n")
    assert verify(source, checkpoint).agrees
    assert not mark.exists()
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="is a pickle"):
        verify(source, checkpoint)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_the_reference(
    missing, source, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, missing, None)
    for folder in (checkpoint, tmp_path / "out"):
        assert main([str(source), str(folder), "--verify"]) == 1
        assert capsys.readouterr().err == (
            "error: a comparison needs torch and transformers (pip install torch "
            "transformers)\n"
        )
    assert not (tmp_path / "out").exists(), "converted before it was told"


def test_prompts_are_read_before_the_conversion(source, tmp_path, capsys):
    (tmp_path / "empty").touch()
    for name, words in (("none", "No such file"), ("empty", "holds no prompts")):
        options = ["--verify", "--prompts", str(tmp_path / name)]
        assert main([str(source), str(tmp_path / "out"), *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--prompts x", "goes with --verify"),
        ("--verify --to-hf", "exchanged"),
        ("--verify --dtype float32", "DST is there"),
    ],
)
def test_usage_errors(options, words, source, checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(source), str(checkpoint), *options.split()])
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_reference_that_transformers_refuses(source, checkpoint, tmp_path):
    source = shutil.copytree(source, tmp_path / "hf")
    # Which the conversion does not read.
    (source / "config.json").write_text(json.dumps({**BYTES, "pad_token_id": 999}))
    with pytest.raises(ConversionError, match=r"transformers cannot load .*/hf: "):
        verify(source, checkpoint)


@pytest.mark.slow
def test_smollm2(smollm2_gguf, smollm2_folder):
    pytest.importorskip("accelerate", reason="needs it: pip install accelerate")
    found = verify(smollm2_gguf, smollm2_folder)
    assert found.agrees and found.prompts == 6
    assert found.perplexities[0] < 20
