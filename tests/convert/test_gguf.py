"""GGUF files: every quantisation, the rotary order, the metadata."""

import dataclasses

import gguf
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from convert import ConversionError, convert
from convert.readers import gguf as reader
from polarjax.params import read_folder
from tests.convert.checkpoints import (
    LLAMA,
    expected_llama,
    gguf_tensors,
    interleave,
    llama_tensors,
    write_gguf,
    write_hf,
)

# K-quants come in rows of 256.
WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
PARTS = {"q": "num_attention_heads", "k": "num_key_value_heads"}


def weights(path) -> dict[str, np.ndarray]:
    tree = flatten_dict(read_folder(path).weights, sep="/")
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`, found by sorting."""
    order = interleave(np.arange(rows.shape[0]), heads)
    return rows[np.argsort(order)]


def as_hf(config, stored) -> dict[str, np.ndarray]:
    """Dequantised GGUF tensors by Hugging Face's names and in its order."""
    names = gguf_tensors(config, llama_tensors(config))
    out = {}
    for theirs, ours in zip(llama_tensors(config), names, strict=True):
        array = stored[ours]
        for part, heads in PARTS.items():
            if f".{part}_proj." in theirs:
                array = deinterleave(array, config[heads])
        out[theirs] = array
    return out


@pytest.mark.parametrize(
    "kind",
    [
        *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    ],
)
def test_quantisations(kind, tmp_path):
    config = WIDE if kind.endswith("_K") else LLAMA
    stored = write_gguf(tmp_path / "model.gguf", config, kind=kind)
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype="float32", progress=False)
    expected = expected_llama(config, as_hf(config, stored))
    ours = weights(tmp_path / "out")
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
        assert np.ptp(array) > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_model_it_was_made_of(kv_heads, family, tmp_path):
    config = {
        **LLAMA,
        "model_type": family,
        "architectures": None,
        "num_key_value_heads": kv_heads,
        "attention_bias": family == "llama",
        "head_dim": 8,
    }
    tensors = llama_tensors(config)
    write_hf(tmp_path / "hf", config, tensors)
    write_gguf(tmp_path / "model.gguf", config, gguf_tensors(config, tensors))
    hf = convert(tmp_path / "hf", tmp_path / "a", dtype="float32", progress=False)
    ours = convert(
        tmp_path / "model.gguf", tmp_path / "b", dtype="float32", progress=False
    )
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    # GGUF stores the epsilon in float32.
    np.testing.assert_allclose(ours.norm_eps, hf.norm_eps, rtol=1e-6)
    same = dataclasses.replace(ours.architecture, norm_eps=hf.norm_eps)
    assert same == hf.architecture


def test_divisors_of_the_rotary_frequencies(tmp_path):
    divisors = np.linspace(1, 8, 4, dtype=np.float32)
    tensors = gguf_tensors(LLAMA, llama_tensors())
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors={**tensors, "rope_freqs.weight": divisors})
    made = convert(path, tmp_path / "out", progress=False)
    assert made.rope.divisors == tuple(divisors.tolist())
    assert read_folder(tmp_path / "out").config == made
    for wrong in (divisors[:3], -divisors, divisors * np.nan):
        write_gguf(path, tensors={**tensors, "rope_freqs.weight": wrong})
        with pytest.raises(ConversionError, match=r"rope_freqs.weight (has 3|must be)"):
            convert(path, tmp_path / "other", progress=False)


def test_head_dim_of_the_metadata(tmp_path):
    config = {**LLAMA, "head_dim": 6}
    fields = [("add_key_length", 6), ("add_value_length", 6)]
    fields += [("add_rope_dimension_count", 6)]
    write_gguf(tmp_path / "model.gguf", config, fields=fields)
    made = convert(tmp_path / "model.gguf", tmp_path / "out", progress=False)
    assert (made.head_dim, made.dim) == (6, 32)


def test_end_tokens(tmp_path):
    tokens = [f"t{i}" for i in range(LLAMA["vocab_size"])]
    types = [1] * len(tokens)
    for i, token in {3: "<|endoftext|>", 4: "<|im_end|>", 5: "</s>"}.items():
        tokens[i] = token
        types[i] = 3 if i < 5 else 1  # only control tokens end a text by their name
    fields = [
        ("add_token_list", tokens),
        ("add_token_types", types),
        ("add_eos_token_id", 7),
        ("add_eot_token_id", 4),
        ("add_eom_token_id", 9),
        ("add_bos_token_id", 1),
    ]
    write_gguf(tmp_path / "model.gguf", fields=fields)
    made = convert(tmp_path / "model.gguf", tmp_path / "out", progress=False)
    assert made.eos_ids == (7, 4, 9, 3)
    assert made.bos_ids == (1,)


def test_the_hash_is_the_file_s(tmp_path):
    made = {}
    for kind in ("F32", "Q8_0"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, kind=kind)
        for dtype in ("float32", "bfloat16"):
            out = tmp_path / f"{kind}-{dtype}"
            made[kind, dtype] = convert(
                path, out, dtype=dtype, progress=False
            ).model_hash
    assert made["F32", "float32"] == made["F32", "bfloat16"]
    assert made["Q8_0", "float32"] == made["Q8_0", "bfloat16"]
    assert len(set(made.values())) == 2


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ([("add_rope_scaling_type", gguf.RopeScalingType.LINEAR)],
         "llama.rope.scaling.type = 'linear' is not supported"),
        ([("add_rope_scaling_type", gguf.RopeScalingType.YARN)], "'yarn'"),
        ([("add_float32", "llama.rope.scaling.factor", 4.0)],
         "llama.rope.scaling.factor = 4.0"),
        ([("add_rope_dimension_count", 4)], "llama.rope.dimension_count = 4"),
        ([("add_value_length", 4)], "attention.value_length = 4"),
        ([("add_expert_count", 8)], "llama.expert_count = 8"),
        ([("add_sliding_window", 16)], "sliding_window = 16"),
        ([("add_uint16", "split.count", 3)], "is one part of 3"),
        ([("add_float32", "tokenizer.ggml.eos_token_id", 2.5)],
         "eos_token_id.* must be token ids"),
    ],
    ids=str,
)  # fmt: skip
def test_variants_that_are_not_built(fields, match, tmp_path):
    write_gguf(tmp_path / "model.gguf", fields=fields)
    with pytest.raises(ConversionError, match=match):
        convert(tmp_path / "model.gguf", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_plain_values_of_the_same_fields_convert(tmp_path):
    fields = [
        ("add_rope_scaling_type", gguf.RopeScalingType.NONE),
        ("add_rope_dimension_count", 8),
        ("add_expert_count", 0),
        ("add_sliding_window", LLAMA["max_position_embeddings"]),
    ]
    write_gguf(tmp_path / "model.gguf", fields=fields)
    convert(tmp_path / "model.gguf", tmp_path / "out", progress=False)


def test_other_architectures(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ConversionError, match=r"'gemma2' is not supported; .*: llama, qwen2, qwen3"
    ):
        convert(path, tmp_path / "out", progress=False)


def test_other_types(tmp_path):
    path = tmp_path / "model.gguf"
    tensors = gguf_tensors(LLAMA, llama_tensors())
    write_gguf(path, tensors=tensors)
    for kind, dtype in (("I8", np.int8), ("F64", np.float64)):
        writer = gguf.GGUFWriter(path, "llama")
        for name, array in tensors.items():
            writer.add_tensor(name, array.astype(dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ConversionError, match=f"has type {kind}, which is not"):
            convert(path, tmp_path / "out", progress=False)


def test_missing_and_unexpected_tensors(tmp_path):
    path = tmp_path / "model.gguf"
    tensors = gguf_tensors(LLAMA, llama_tensors())
    extra = {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}
    for changed, match in (
        ({n: a for n, a in tensors.items() if "0.ffn_up" not in n}, "no tensor .*up"),
        ({**tensors, **extra}, r"has a tensor blk.0.attn_q_norm.weight of shape \[8\]"),
        ({**tensors, "blk.1.attn_k.weight": tensors["blk.1.attn_q.weight"]},
         r"blk.1.attn_k.weight has shape \[32, 32\], .* asks for \[16, 32\]"),
        ({**tensors, "output_norm.weight": np.full(32, np.inf, np.float32)},
         "output_norm.weight holds NaN or infinity"),
    ):  # fmt: skip
        write_gguf(path, tensors=changed)
        with pytest.raises(ConversionError, match=match):
            convert(path, tmp_path / "out", progress=False)


def test_every_supported_type_is_one_the_package_reads():
    """A name in the list that `gguf.quants` could not read would fail late."""
    for kind in reader._KINDS:
        quantization = gguf.GGMLQuantizationType[kind]
        _, nbytes = gguf.GGML_QUANT_SIZES[quantization]
        raw = np.zeros((1, nbytes), np.uint8)
        assert gguf.quants.dequantize(raw, quantization).dtype == np.float32
