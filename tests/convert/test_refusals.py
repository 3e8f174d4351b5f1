"""What is not supported is refused in one sentence that names it, leaving nothing."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import ConversionError, convert
from convert.__main__ import main
from convert.files import LARGEST_CONFIG, LARGEST_TABLE, LARGEST_TEXT
from polarjax.params import read_folder
from tests.convert.checkpoints import (
    LLAMA,
    OPT,
    llama_tensors,
    opt_tensors,
    write_gguf,
    write_hf,
    write_sharded,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def refused(source, folder, match, error=ConversionError, **options):
    """Conversion fails with that message and leaves no trace in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        convert(source, folder / "out", progress=False, **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
         "GemmaForCausalLM is not supported; supported: LlamaForCausalLM, MistralFor"),
        ({"architectures": None, "model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": None, "architectures": []}, "None is not supported"),
        ({"model_type": []}, "not supported"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassif"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"compression_config": {"format": "pack-quantized"}},
         r"compression_config: the checkpoint is quantised"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantization: the chec"),
        ({"mlp_bias": True}, r"no tensor model.layers.0.mlp.gate_proj.bias, .*\[64\]"),
        ({"model_type": "mistral", "architectures": None, "mlp_bias": True},
         "mlp_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' .* supported: silu"),
        ({"rope_scaling": {"type": "linear"}}, "has no factor"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "has no factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2,
          "num_attention_heads": 16}, "dynamic .* need a head_dim of 4 or more"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "'proportional' is not supp"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "'mrope' is not supported; support"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e6}},
         "factor 1e.06 times .* 64 is beyond 16777216 tokens"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -2.0}}, "factor must be pos"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5}},
         "beta_slow 1.0 must be below beta_fast 0.5"),
        # Numbers that are 0 or infinite in float32, or in what is computed of them.
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
         "rope_theta must be between 2 and 1e.30, not 1.0"),
        ({"rope_theta": 1e-300}, "rope_theta must be between 2"),
        ({"rope_theta": 1e308}, "rope_theta must be between 2"),
        ({"rms_norm_eps": 1e308}, "rms_norm_eps must be between 1e-30 and 1, not"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-45}},
         "factor must be between 1e-06 and 1e.06, not 1e-45"),
        *(({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, **change}},
           f"{next(iter(change))} must be between 1e-06")
          for change in ({"beta_slow": 1e-320}, {"beta_fast": 1e308},
                         {"attention_factor": 1e-300},
                         {"mscale": 1e308, "mscale_all_dim": 1.0},
                         {"mscale_all_dim": 1e308, "mscale": 1.0})),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 1e300,
                           "high_freq_factor": 1e308}}, "low_freq_factor must be betw"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1e308}}, "high_freq_factor m"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "do not agree"),
        ({"layer_types": ["full_attention"]}, "must name 2 layers, each full_att"),
        ({"layer_types": ["full_attention", "chunked"]}, "must name 2 layers"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 0},
         "sliding_window must be between 1 and"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 4,
          "layer_types": ["full_attention", "sliding_attention"]}, "do not agree"),
        ({"model_type": "qwen2", "architectures": None, "use_sliding_window": True,
          "max_window_layers": 1}, "has no sliding_window"),
        ({"model_type": "qwen2", "architectures": None, "use_sliding_window": True,
          "max_window_layers": "1"}, "max_window_layers must be an integer"),
        ({"model_type": "qwen3", "architectures": None, "head_dim": 8},
         "no tensor model.layers.0.self_attn.q_norm.weight"),
        ({"model_type": "smollm3", "architectures": None, "no_rope_layers": [1]},
         "no_rope_layers must be 2 numbers, each 1 for"),
        ({"model_type": "smollm3", "architectures": None, "no_rope_layers": [0, 2]},
         "no_rope_layers must be 2 numbers"),
        ({"model_type": "smollm3", "architectures": None, "no_rope_layer_interval": 0},
         "no_rope_layer_interval must be between"),
        ({"rope_parameters": {"rope_type": "longrope"}},
         "short_factor must be 4 numbers, one for each pair .* not None"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4,
                              "long_factor": [2.0] * 3}}, "long_factor must be 4 numb"),
        ({"rope_parameters": {"rope_type": "su", "short_factor": [1.0] * 4,
                              "long_factor": [2.0, 2.0, 0.0, 2.0]}},
         "long_factor must be positive"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "has no factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "1.0 must be below"),
        ({"rope_scaling": [1]}, "are no record"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
          "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling differ"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
         "of their own for 'full_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
         "original_max_position_embeddings is 16, but 8192"),
        ({"rope_theta": -1.0}, "rope_theta must be positive"),
        ({"rope_theta": 10**400}, "rope_theta must be positive and finite"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be positive"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size must be an integer, not 32.0"),
        ({"hidden_size": 10**12}, "hidden_size must be between 1 and"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers must be between 1 and 4096"),
        ({"num_hidden_layers": 4096}, "4096 layers, but .* only 21 tensors"),
        ({"vocab_size": 2**24, "hidden_size": 2**24}, "but the configuration asks for"),
        ({"hidden_size": 2**24, "head_dim": 2**24, "intermediate_size": 2**24,
          "num_attention_heads": 2**24, "num_key_value_heads": 2**24},
         "but the configuration asks for"),
        ({"num_hidden_layers": True}, "must be an integer, not True"),
        ({"num_key_value_heads": 3}, "must be a multiple of kv_heads"),
        ({"head_dim": 7}, "even head_dim"),
        ({"tie_word_embeddings": "no"}, "must be true or false"),
        ({"eos_token_id": "2"}, "eos_token_id must be token ids"),
        # Sizes that the tensors do not have.
        ({"vocab_size": 60}, r"(lm_head|embed_tokens).weight has shape \[61, 32\], "
         r"but the configuration asks for \[60, 32\]"),
        ({"num_key_value_heads": 4},
         r"k_proj.weight has shape \[16, 32\], .* asks for \[32, 32\]"),
        ({"num_hidden_layers": 3}, r"no tensor model.layers.2.*shape \[32\]"),
        ({"num_hidden_layers": 1}, "has a tensor model.layers.1.* does not have"),
        ({"attention_bias": True}, "no tensor model.layers.0.self_attn.q_proj.bias"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_llama_configurations(changes, match, tmp_path):
    write_hf(tmp_path / "hf", {**LLAMA, **changes}, llama_tensors())
    refused(tmp_path / "hf", tmp_path, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"do_layer_norm_before": False},
            r"has a tensor model.decoder.final_layer_norm",
        ),
        ({"_remove_final_layer_norm": True}, r"tensor model.decoder.final_layer_norm"),
        ({"_remove_final_layer_norm": 1}, "must be true or false, not 1"),
        ({"activation_function": "tanh"}, "'tanh' .* supported: relu, gelu"),
        ({"num_attention_heads": 5}, "32 is not a multiple of num_attention_heads 5"),
        ({"word_embed_proj_dim": 32}, "embed_tokens.weight has shape"),
        ({"enable_bias": False}, "has a tensor model.decoder.*bias"),
        ({"max_position_embeddings": 22}, r"shape \[22, 32\], .* for \[24, 32\]"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_opt_configurations(changes, match, tmp_path):
    write_hf(tmp_path / "hf", {**OPT, **changes}, opt_tensors())
    refused(tmp_path / "hf", tmp_path, match)


def test_names_without_the_prefix(tmp_path):
    """As some OPT checkpoints are stored."""
    tensors = {n.removeprefix("model."): a for n, a in opt_tensors().items()}
    write_hf(tmp_path / "bare", OPT, tensors)
    convert(tmp_path / "bare", tmp_path / "out", dtype="float32", progress=False)
    whole = write_hf(tmp_path / "hf", OPT, opt_tensors())
    convert(whole, tmp_path / "whole", dtype="float32", progress=False)
    found, right = (read_folder(tmp_path / x).weights for x in ("out", "whole"))
    jax.tree.map(np.testing.assert_array_equal, found, right)
    tensors["model.decoder.embed_tokens.weight"] = tensors[
        "decoder.embed_tokens.weight"
    ]
    write_hf(tmp_path / "both", OPT, tensors)
    with pytest.raises(ConversionError, match=r"has a tensor decoder.embed"):
        convert(tmp_path / "both", tmp_path / "other", progress=False)


def test_missing_and_unexpected_tensors(tmp_path):
    tensors = llama_tensors()
    norm = tensors.pop("model.norm.weight")
    write_hf(tmp_path / "hf", LLAMA, tensors)
    refused(tmp_path / "hf", tmp_path, r"no tensor model.norm.weight.*\[32\]")
    tensors |= {"model.norm.weight": norm, "model.extra": norm}
    write_hf(tmp_path / "hf", LLAMA, tensors)
    refused(tmp_path / "hf", tmp_path, r"has a tensor model.extra of shape \[32\]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value, tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    write_hf(tmp_path / "hf", LLAMA, tensors)
    refused(tmp_path / "hf", tmp_path, "layers.1.mlp.down_proj.weight holds NaN or inf")


def test_weights_beyond_float16(tmp_path):
    tensors = llama_tensors()
    tensors["model.norm.weight"][0] = 1e5
    write_hf(tmp_path / "hf", LLAMA, tensors)
    match = "model.norm.weight has values beyond the range of float16"
    refused(tmp_path / "hf", tmp_path, match, dtype="float16")
    convert(tmp_path / "hf", tmp_path / "out", progress=False)


def test_weights_that_are_integers(tmp_path):
    tensors = llama_tensors()
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    write_hf(tmp_path / "hf", LLAMA, tensors)
    refused(tmp_path / "hf", tmp_path, "model.norm.weight in .* is I8, not a float")


def test_files_that_are_missing(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "no such file or folder: .*nowhere")
    folder = tmp_path / "hf"
    folder.mkdir()
    refused(folder, tmp_path, "has no config.json")
    (folder / "model.gguf").touch()
    refused(folder, tmp_path, "has no config.json; convert .*model.gguf itself")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    refused(folder, tmp_path, "neither model.safetensors nor model.safetensors.index")
    save_file({}, folder / "weights.safetensors")
    refused(folder, tmp_path, "it has weights.safetensors")
    refused(folder / "weights.safetensors", tmp_path, "give its folder")
    refused(folder / "config.json", tmp_path, "is not a GGUF file: it begins with")
    refused(folder / "model.gguf", tmp_path, "is not a GGUF file: it begins with b''")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles(name, tmp_path):
    write_hf(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    (tmp_path / f"hf/{name}").write_bytes(b"\x80\x04never read")
    for source in (tmp_path / "hf", tmp_path / "hf" / name):
        refused(source, tmp_path, "is a pickle, and reading a pickle runs whatever")


def test_a_pickle_beside_safetensors_is_no_matter(tmp_path):
    write_hf(tmp_path / "hf")
    (tmp_path / "hf/pytorch_model.bin").write_bytes(b"\x80\x04never read")
    convert(tmp_path / "hf", tmp_path / "out", progress=False)


def test_shards(tmp_path):
    folder = write_sharded(tmp_path / "hf", LLAMA, llama_tensors())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]

    def with_index(changed):
        path.write_text(json.dumps({"weight_map": changed}))

    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    name = next(name for name, shard in index.items() if shard == first)
    with_index({**index, "model.extra": first})
    refused(folder, tmp_path, f"places model.extra in {first}: it is not there")
    away = folder.rename(tmp_path / "elsewhere") / first
    folder.mkdir()
    for entry in sorted(away.parent.iterdir()):
        entry.rename(folder / entry.name)
    shutil.copy(folder / first, away)
    for shard in ("../elsewhere/" + first, str(away), "..", ".", "", f"./{first}"):
        with_index({**index, name: shard})
        refused(folder, tmp_path, f"places {name} in {shard!r}, not a file name")
    for shard in (None, 3, True, [first], {first: first}):
        with_index({**index, name: shard})
        refused(folder, tmp_path, rf"places {name} in .*, not a file name")
    for shard in ("x" * 300, "a\0b"):
        with_index({n: shard for n, old in index.items() if old == first})
        refused(folder, tmp_path, r"the shard .* is missing")
    with_index({})
    refused(folder, tmp_path, "no weight_map")
    with_index(index)
    (folder / second).unlink()
    refused(folder, tmp_path, f"the shard .*{second} is missing")


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000, "null"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_none(name, text, tmp_path):
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / name).write_bytes(text.encode("latin-1"))
    refused(tmp_path / "hf", tmp_path, f"{name} (is not|must hold)")


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("config.json", LARGEST_CONFIG),
        ("generation_config.json", LARGEST_CONFIG),
        ("tokenizer_config.json", LARGEST_CONFIG),
        ("model.safetensors.index.json", LARGEST_TABLE),
        ("tokenizer.json", LARGEST_TEXT),
    ],
)
def test_texts_that_would_fill_the_memory(name, largest, tmp_path):
    folder = write_sharded(tmp_path / "hf", LLAMA, llama_tensors())
    path = folder / name
    text = path.read_text() if path.exists() else "{}"
    if name != "tokenizer.json":
        path.write_text(text.ljust(largest))
        convert(folder, tmp_path / "right", progress=False)
    path.write_text(text.ljust(largest + 1))
    refused(folder, tmp_path, f"{name} has {largest + 1} bytes; it may have {largest}")


def test_destinations(tmp_path):
    source = write_hf(tmp_path / "deep/hf")
    out = tmp_path / "out"
    # One that would delete the source.
    for path in (source, source.parent):
        with pytest.raises(ConversionError, match="would delete"):
            convert(source, path, overwrite=True, progress=False)
    partial = source.rename(tmp_path / "out.partial")
    with pytest.raises(ConversionError, match="would delete"):
        convert(partial, out, progress=False)
    source = partial.rename(source)
    with pytest.raises(ConversionError, match="lies inside"):
        convert(source, source / "out", progress=False)
    # One that exists.
    convert(source, out, dtype="float32", progress=False)
    refused(source, tmp_path, "out exists", FileExistsError)
    convert(source, out, dtype="float16", overwrite=True, progress=False)
    assert read_folder(out).dtype == "float16"
    # One that is something else.
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("years of work")
    (tmp_path / "note").write_text("a file")
    for name in ("thesis", "note"):
        with pytest.raises(FileExistsError, match="no polarjax checkpoint"):
            convert(source, tmp_path / name, overwrite=True, progress=False)
    assert (tmp_path / "thesis/chapter").read_text() == "years of work"
    for path in (tmp_path / "deep/..", Path("/"), Path(".")):
        with pytest.raises((FileExistsError, ConversionError)):
            convert(source, path, overwrite=True, progress=False)
    # A checkpoint already.
    refused_again = tmp_path / "again"
    with pytest.raises(ConversionError, match="is a polarjax checkpoint already"):
        convert(out, refused_again, progress=False)
    assert source.is_dir() and not refused_again.exists()


def test_the_source_survives_a_failed_overwrite(tmp_path):
    convert(write_hf(tmp_path / "hf"), tmp_path / "out", progress=False)
    before = read_folder(tmp_path / "out").config.model_hash
    (tmp_path / "hf/model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConversionError):
        convert(tmp_path / "hf", tmp_path / "out", overwrite=True, progress=False)
    assert read_folder(tmp_path / "out").config.model_hash == before


def test_command_line(tmp_path, capsys):
    write_gguf(tmp_path / "model.gguf")
    arguments = [str(tmp_path / "model.gguf"), str(tmp_path / "out")]
    assert main([*arguments, "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    assert "llama, 2 layers, 4 heads in 2 KV groups" in captured.out
    assert captured.err == (
        "note: no tokenizer in the file: the checkpoint will serve token ids, "
        "not text\n"
    )
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "--overwrite" in captured.err
    assert main([*arguments, "--overwrite"]) == 0
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    for wrong in ([], [*arguments, "--dtype", "int4"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "examples:" in capsys.readouterr().out
