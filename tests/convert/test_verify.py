"""`convert --verify`: it sees what it should, and says why where it cannot look."""

import dataclasses
import json
import sys

import jax
import pytest

import polarjax
from convert import ConversionError, convert
from convert.__main__ import main
from convert.verify import read_prompts, verify
from tests.convert.checkpoints import LLAMA, OPT, opt_tensors, write_gguf, write_hf
from tests.models import byte_tokenizer

BYTES = {**LLAMA, "vocab_size": 257, "sliding_window": 20, "model_type": "mistral"}
BYTES["architectures"] = ["MistralForCausalLM"]


@pytest.fixture(scope="module", autouse=True)
def reference():
    torch = pytest.importorskip("torch", reason="the comparison is with torch")
    pytest.importorskip("transformers")
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
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with it")
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
    other = write_hf(tmp_path / "other")
    refused("a vocabulary of 61, .* one of 257", other, checkpoint)
    convert(other, tmp_path / "ids", progress=False)
    refused("has no tokenizer for prompts", other, tmp_path / "ids", ["text"])
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(ConversionError, match="holds no prompts"):
        read_prompts(tmp_path / "prompts.txt")


def test_nothing_of_the_source_is_run(checkpoint, tmp_path):
    """Neither its Python nor a pickle, even where safetensors lie beside them."""
    config = {**BYTES, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    source = write_hf(tmp_path / "hf", config)
    mark = tmp_path / "ran"
    (source / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Model: pass\n")
    assert verify(source, checkpoint).agrees
    assert not mark.exists()
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="is a pickle"):
        verify(source, checkpoint)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_the_reference(missing, source, checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main([str(source), str(checkpoint), "--verify"]) == 1
    assert capsys.readouterr().err == (
        "error: a comparison needs torch and transformers (pip install torch "
        "transformers)\n"
    )


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


def test_a_reference_that_transformers_refuses(checkpoint, tmp_path):
    source = write_hf(tmp_path / "hf", BYTES)
    config = json.loads((source / "config.json").read_text())
    config["model_type"] = "unheard-of"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"transformers cannot load .*/hf: "):
        verify(source, checkpoint)


@pytest.mark.slow
def test_smollm2(smollm2_gguf, smollm2_folder):
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with it")
    found = verify(smollm2_gguf, smollm2_folder)
    assert found.agrees and found.prompts == 6
    assert found.perplexities[0] < 20
