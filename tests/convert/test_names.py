"""Tensors under other names, or elsewhere, than an index and the model's class say."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import ConversionError, convert
from convert.__main__ import main
from convert.describe import read_config
from convert.verify import verify
from polarjax.params import read_folder
from tests.convert.checkpoints import LLAMA, llama_tensors, write_hf, write_sharded

NAME = "model.layers.0.mlp.up_proj.weight"


def weights(source, folder):
    made = convert(source, folder, dtype="float32", progress=False)
    return jax.tree.map(np.asarray, read_folder(made.folder).weights)


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda n: f"_orig_mod.{n}", "_orig_mod. (torch.compile)"),
        (lambda n: f"module.{n}", "module. (DataParallel)"),
        (lambda n: f"base_model.model.{n}", "base_model.model. (PEFT)"),
        (
            lambda n: f"module._orig_mod.{n}",
            "_orig_mod. (torch.compile), module. (DataParallel)",
        ),
        (
            lambda n: n.replace("model.layers.0.", "model.layers.0._orig_mod."),
            "_orig_mod. (torch.compile)",
        ),
        (
            lambda n: n.replace("mlp.", "_fsdp_wrapped_module._orig_mod.mlp."),
            "_orig_mod. (torch.compile), _fsdp_wrapped_module. (FSDP)",
        ),
        (lambda n: f"module.{n}".replace(".model.", "."), "module. (DataParallel)"),
    ],
    ids=["compile", "data-parallel", "peft", "both", "a-layer", "fsdp", "bare"],
)
def test_what_training_wraps_a_model_in(rename, words, tmp_path, capsys):
    right = weights(write_hf(tmp_path / "plain"), tmp_path / "a")
    capsys.readouterr()
    tensors = {rename(name): array for name, array in llama_tensors().items()}
    wrapped = write_hf(tmp_path / "wrapped", LLAMA, tensors)
    assert_equal(weights(wrapped, tmp_path / "b"), right)
    note = f"note: left out of the tensors' names: {words}\n"
    assert note in capsys.readouterr().err


def test_transformers_does_not_load_them(tmp_path):
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    transformers = pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )
    tensors = {f"_orig_mod.{name}": array for name, array in llama_tensors().items()}
    wrapped = write_hf(tmp_path / "wrapped", LLAMA, tensors)
    _, report = transformers.AutoModelForCausalLM.from_pretrained(
        wrapped, output_loading_info=True, dtype=torch.float32
    )
    assert report["missing_keys"]
    convert(wrapped, tmp_path / "out", progress=False)
    with pytest.raises(
        ConversionError, match=r"transformers does not load .*_orig_mod"
    ):
        verify(wrapped, tmp_path / "out")


def test_wrapped_twice(tmp_path):
    tensors = llama_tensors()
    tensors[f"_orig_mod.{NAME}"] = tensors[NAME]
    write_hf(tmp_path / "hf", LLAMA, tensors)
    with pytest.raises(ConversionError, match=f"are both {NAME} of the model"):
        convert(tmp_path / "hf", tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.lora_B.weight",
    ],
)
def test_an_unmerged_model(name, tmp_path):
    tensors = {f"base_model.model.{n}": a for n, a in llama_tensors().items()}
    tensors[name] = np.ones((4, 32), np.float32)
    write_hf(tmp_path / "hf", LLAMA, tensors)
    with pytest.raises(ConversionError, match=r"unmerged PEFT model: .*merge_and_unl"):
        convert(tmp_path / "hf", tmp_path / "out", progress=False)


def test_an_adapter(tmp_path, capsys):
    folder = tmp_path / "lora"
    folder.mkdir()
    record = {"peft_type": "LORA", "base_model_name_or_path": "me/llama"}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    save_file({"x": np.ones(2, np.float32)}, folder / "adapter_model.safetensors")
    words = f"{folder} is a LoRA adapter of me/llama, not a model: merge it with peft"
    assert main([str(folder), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}") and "merge_and_unload()" in said
    with pytest.raises(ConversionError, match="is a LoRA adapter of me/llama"):
        read_config(folder)
    # Trainers leave the base model's configuration beside it.
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert main([str(folder), str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err
    record = {"peft_type": "IA3"}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    with pytest.raises(ConversionError, match=r"adapter of PEFT's \(IA3\) of BASE"):
        convert(folder, tmp_path / "out", progress=False)
    # Beside a whole model it is not read, and that is said.
    write_hf(folder)
    assert main([str(folder), str(tmp_path / "out")]) == 0
    assert "has an adapter too, which is not merged" in capsys.readouterr().err


def write_overlay(folder):
    """Shards of which the last overrides, and holds what the index does not know."""
    base, other = llama_tensors(), llama_tensors(seed=1)
    norm = base.pop("model.norm.weight")
    write_sharded(folder, LLAMA, base)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = "model-overlay.safetensors"  # behind the others' names
    first = "model-00001-of-00003.safetensors"
    save_file(
        {"model.norm.weight": norm, **{n: other[n] for n in list(base)[:5]}},
        folder / last,
        metadata={"format": "pt"},
    )
    names = list(base)
    index["weight_map"][names[0]] = last  # the others stay in their places
    index["weight_map"][names[6]] = first  # wherever that is
    path.write_text(json.dumps(index))
    save_file({"x": norm}, folder / "unlisted.safetensors")
    return {**base, "model.norm.weight": norm, **{n: other[n] for n in list(base)[:5]}}


def test_overlays_are_read_as_transformers_reads_them(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    transformers = pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )
    expected = write_overlay(tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    )
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name)
    capsys.readouterr()
    ours = weights(tmp_path / "hf", tmp_path / "out")
    said = capsys.readouterr().err
    assert "tensors are read from where model.safetensors.index.json does not" in said
    write_hf(tmp_path / "one", LLAMA, expected)
    assert_equal(ours, weights(tmp_path / "one", tmp_path / "same"))
    assert verify(tmp_path / "hf", tmp_path / "out").agrees


def test_an_index_that_is_right_has_nothing_to_say(tmp_path, capsys):
    write_sharded(tmp_path / "hf", LLAMA, llama_tensors())
    convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert capsys.readouterr().err.count("\n") == 1  # there is no tokenizer
