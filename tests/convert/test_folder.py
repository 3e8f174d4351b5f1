"""Hugging Face folders: the right numbers in the right places, in every form."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from convert import ConversionError, convert
from polarjax.config import ModelConfig, Rope
from polarjax.params import read_folder
from tests.convert.checkpoints import (
    LLAMA,
    OPT,
    as_dtype,
    expected_llama,
    llama_shapes,
    llama_tensors,
    opt_tensors,
    write_hf,
    write_sharded,
)

pytestmark = pytest.mark.usefixtures("small_blocks")


def weights(path) -> dict[str, np.ndarray]:
    tree = flatten_dict(read_folder(path).weights, sep="/")
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "num_key_value_heads": 1},
        {"head_dim": 6, "num_key_value_heads": 4},
    ],
    ids=str,
)
def test_llama_weights_are_where_they_belong(changes, tmp_path):
    config = {**LLAMA, **changes}
    tensors = llama_tensors(config)
    write_hf(tmp_path / "hf", config, tensors)
    made = convert(tmp_path / "hf", tmp_path / "out", dtype="float32", progress=False)
    assert_same(weights(tmp_path / "out"), expected_llama(config, tensors))
    assert made.architecture == ModelConfig(
        family="llama",
        vocab_size=61,
        dim=32,
        layers=2,
        heads=4,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim", 8),
        neurons=64,
        context=64,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rope=Rope(500.0),
        qkv_bias="attention_bias" in config,
        out_bias="attention_bias" in config,
        mlp_bias=False,
        tied_embeddings=config["tie_word_embeddings"],
        embed_dim=32,
    )
    assert (made.bos_ids, made.eos_ids) == ((1,), (2,))
    stored = read_folder(tmp_path / "out").config
    assert dataclasses.astuple(stored) == dataclasses.astuple(made)


def test_opt_weights_are_where_they_belong(tmp_path):
    tensors = opt_tensors()
    write_hf(tmp_path / "hf", OPT, tensors)
    made = convert(tmp_path / "hf", tmp_path / "out", dtype="float32", progress=False)
    t = {name.removeprefix("model.decoder."): a for name, a in tensors.items()}
    expected = {
        "embed/tokens": t["embed_tokens.weight"],
        "embed/positions": t["embed_positions.weight"],
        "embed/project_in": t["project_in.weight"],
        "embed/project_out": t["project_out.weight"],
        "final_norm/scale": t["final_layer_norm.weight"],
        "final_norm/bias": t["final_layer_norm.bias"],
    }
    for i in range(2):
        at = f"layers.{i}."
        expected |= {
            f"layers_{i}/attention_norm/scale": t[f"{at}self_attn_layer_norm.weight"],
            f"layers_{i}/attention_norm/bias": t[f"{at}self_attn_layer_norm.bias"],
            f"layers_{i}/mlp_norm/scale": t[f"{at}final_layer_norm.weight"],
            f"layers_{i}/mlp_norm/bias": t[f"{at}final_layer_norm.bias"],
            f"layers_{i}/attention/out": t[f"{at}self_attn.out_proj.weight"].T,
            f"layers_{i}/attention/out_bias": t[f"{at}self_attn.out_proj.bias"],
            f"layers_{i}/mlp/up": t[f"{at}fc1.weight"],
            f"layers_{i}/mlp/up_bias": t[f"{at}fc1.bias"],
            f"layers_{i}/mlp/down": t[f"{at}fc2.weight"].T,
            f"layers_{i}/mlp/down_bias": t[f"{at}fc2.bias"],
        }
        for ours, theirs in (("qkv", "weight"), ("qkv_bias", "bias")):
            expected[f"layers_{i}/attention/{ours}"] = np.concatenate(
                [t[f"{at}self_attn.{n}_proj.{theirs}"] for n in "qkv"]
            )
    assert_same(weights(tmp_path / "out"), expected)
    assert (made.family, made.embed_dim, made.rope) == ("opt", 16, None)
    assert made.tied_embeddings and made.mlp_bias and made.norm_eps == 1e-5


@pytest.mark.parametrize(
    "source", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"]
)
@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
def test_dtypes(source, target, tmp_path):
    tensors = {n: as_dtype(a, source) for n, a in llama_tensors().items()}
    write_hf(tmp_path / "hf", LLAMA, tensors)
    convert(tmp_path / "hf", tmp_path / "out", dtype=target, progress=False)
    ours = weights(tmp_path / "out")
    for name, array in expected_llama(LLAMA, tensors).items():
        assert ours[name].dtype == target
        np.testing.assert_array_equal(ours[name], as_dtype(array, target))


def test_bfloat16_is_the_default(tmp_path):
    convert(write_hf(tmp_path / "hf"), tmp_path / "out", progress=False)
    assert read_folder(tmp_path / "out").dtype == "bfloat16"


def test_shards_equal_one_file(tmp_path):
    tensors = llama_tensors()
    write_hf(tmp_path / "one", LLAMA, tensors)
    write_sharded(tmp_path / "many", LLAMA, tensors)
    one = convert(tmp_path / "one", tmp_path / "a", progress=False)
    many = convert(tmp_path / "many", tmp_path / "b", progress=False)
    assert_same(weights(tmp_path / "b"), weights(tmp_path / "a"))
    assert one.architecture == many.architecture and one.model_hash == many.model_hash


def test_the_hash_is_the_source_s(tmp_path):
    """Not the dtype's; any change of a tensor shows."""
    tensors = llama_tensors()
    write_hf(tmp_path / "hf", LLAMA, tensors)
    hashes = {
        convert(
            tmp_path / "hf", tmp_path / dtype, dtype=dtype, progress=False
        ).model_hash
        for dtype in ("bfloat16", "float16", "float32")
    }
    assert len(hashes) == 1 and len(hashes.pop()) == 64
    before = convert(
        tmp_path / "hf", tmp_path / "out", overwrite=True, progress=False
    ).model_hash
    swapped = dict(tensors)
    a, b = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    swapped[a], swapped[b] = tensors[b], tensors[a]
    nudged = dict(tensors, **{a: np.nextafter(tensors[a], np.float32(9))})
    for i, other in enumerate((swapped, nudged)):
        write_hf(tmp_path / f"hf{i}", LLAMA, other)
        made = convert(tmp_path / f"hf{i}", tmp_path / f"out{i}", progress=False)
        assert made.model_hash != before


def test_a_tied_model_may_hold_a_copy_of_its_head(tmp_path):
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = llama_tensors(config)
    embedding = tensors["model.embed_tokens.weight"]
    write_hf(tmp_path / "hf", config, {**tensors, "lm_head.weight": embedding.copy()})
    made = convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert made.tied_embeddings
    write_hf(tmp_path / "hf", config, {**tensors, "lm_head.weight": embedding + 1})
    with pytest.raises(ConversionError, match=r"lm_head.weight differs from model.emb"):
        convert(tmp_path / "hf", tmp_path / "other", progress=False)


def test_rotary_buffers_are_left_out(tmp_path):
    tensors = llama_tensors()
    buffer = np.ones(4, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = buffer
    write_hf(tmp_path / "hf", LLAMA, tensors)
    convert(tmp_path / "hf", tmp_path / "out", dtype="float32", progress=False)
    assert_same(weights(tmp_path / "out"), expected_llama(LLAMA, tensors))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 2, (2,)),
        (None, [7, 2], (7, 2)),
        ({"eos_token_id": [9, 2]}, 2, (9, 2)),
        ({"eos_token_id": 9}, [2, 3], (9, 2, 3)),
        ({"eos_token_id": None}, None, ()),
    ],
)
def test_end_tokens_of_both_files(generation, config, expected, tmp_path):
    write_hf(tmp_path / "hf", {**LLAMA, "eos_token_id": config}, llama_tensors())
    if generation:
        path = tmp_path / "hf/generation_config.json"
        path.write_text(json.dumps(generation))
    made = convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert made.eos_ids == expected


def test_end_tokens_beyond_the_vocabulary_are_named(tmp_path, capsys):
    write_hf(tmp_path / "hf", {**LLAMA, "eos_token_id": [2, 61, -1]})
    made = convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert made.eos_ids == (2,)
    assert "eos_ids [61, -1] left out" in capsys.readouterr().err


def test_memory(tmp_path, monkeypatch):
    """Two groups and the tensor at hand, not the model."""
    config = {**LLAMA, "hidden_size": 128, "intermediate_size": 512}
    config |= {"num_hidden_layers": 8, "vocab_size": 512}
    tensors = llama_tensors(config)
    write_hf(tmp_path / "hf", config, tensors)
    target = sum(array.size for array in tensors.values()) * 2
    largest = max(array.nbytes for array in tensors.values())
    del tensors
    group, peaks = 200_000, {}
    monkeypatch.setattr("convert.source.BLOCK_BYTES", 50_000)  # tiny ones take long
    for name, limit in {"warm": 10**9, "whole": 10**9, "streamed": group}.items():
        monkeypatch.setattr("polarjax.params.GROUP_BYTES", limit)
        tracemalloc.start()
        try:
            convert(tmp_path / "hf", tmp_path / name, progress=False)
            peaks[name] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    saved = peaks["whole"] - peaks["streamed"]
    assert target - 2 * group - 3 * largest < saved, (target, largest, peaks)
    one, many = (read_folder(tmp_path / name) for name in ("whole", "streamed"))
    jax.tree.map(np.testing.assert_array_equal, one.weights, many.weights)
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 10


PEAK = """
import sys
from convert import convert

convert(sys.argv[1], sys.argv[2], progress=False)
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_of_20_gb(tmp_path):
    """A model of holes: as large as a real one, and nearly no disk."""
    config = {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    config |= {"num_hidden_layers": 21, "vocab_size": 65536}
    if shutil.disk_usage(tmp_path).free < 15e9:
        pytest.skip("needs 15 GB of disk")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in llama_shapes(config).items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "hf/model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end > 20e9
    largest = 2 * 65536 * 4096
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "hf", tmp_path / "out"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"peak {int(done.stdout) / 1e9:.2f} GB")
    assert int(done.stdout) < 1.2e9 + largest
    assert sum(f.stat().st_size for f in (tmp_path / "out").iterdir()) > end / 2
