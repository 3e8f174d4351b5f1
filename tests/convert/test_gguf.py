"""GGUF files: every quantisation, the rotary order, the metadata."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import polarjax
from convert import ConversionError, convert
from convert.readers import gguf as reader
from pallas_kernels import rotate
from polarjax.model.positions import angles
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

pytestmark = pytest.mark.usefixtures("small_blocks")

# K-quants come in rows of 256.
WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
KINDS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
YARN = [
    ("add_rope_scaling_type", gguf.RopeScalingType.YARN),
    ("add_rope_scaling_factor", 4.0),
]
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
            if f".{part}_proj." in theirs and config["model_type"] == "llama":
                array = deinterleave(array, config[heads])
        out[theirs] = array
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_quantisations(family, tmp_path):
    """Every kind in one file, each in another place of each architecture."""
    config = {**WIDE, "model_type": family, "num_hidden_layers": 2}
    shift = ["llama", "qwen2", "qwen3"].index(family)
    kinds = [*KINDS[shift:], *KINDS[:shift]]
    tensors = gguf_tensors(config, llama_tensors(config))
    stored = write_gguf(tmp_path / "model.gguf", config, tensors, kind=kinds)
    assert sum(array.ndim == 2 for array in tensors.values()) >= len(KINDS)
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype="float32", progress=False)
    expected = expected_llama(config, as_hf(config, stored))
    ours = weights(tmp_path / "out")
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
        assert np.ptp(array) > 0
    assert {name for name in ours if "norm" not in name} <= expected.keys()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_equals_what_transformers_loads(family, tmp_path):
    pytest.importorskip("torch", reason="needs it: pip install torch")
    transformers = pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )
    config = {**WIDE, "model_type": family, "num_hidden_layers": 2}
    fields = [("add_rope_dimension_count", 64), ("add_name", "tiny")]
    if family == "qwen3":  # its head_dim, which transformers does not read
        config |= {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
        fields = [("add_key_length", 128), ("add_value_length", 128)]
    path = tmp_path / "model.gguf"
    tensors = gguf_tensors(config, llama_tensors(config))
    write_gguf(path, config, tensors, kind=KINDS, fields=fields)
    made = convert(path, tmp_path / "out", dtype="float32", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype="float32"
    )
    state = {name: array.numpy() for name, array in theirs.state_dict().items()}
    ours, expected = weights(tmp_path / "out"), expected_llama(config, state)
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    params = read_folder(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, made.vocab_size, (2, 9))
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    found = polarjax.logits(params, tokens.tolist(), [9, 9])
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


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
    for wrong in (divisors[:3], -divisors, divisors * np.nan, divisors * 1e-30):
        write_gguf(path, tensors={**tensors, "rope_freqs.weight": wrong})
        with pytest.raises(ConversionError, match=r"rope_freqs.weight (has 3|must be)"):
            convert(path, tmp_path / "other", progress=False)


def rotation(fields: dict, theta: float, context: int) -> np.ndarray:
    """How llama.cpp turns and stretches each pair of a head of 8, at 64 positions.

    After its `rope_yarn`, from the metadata as its loader takes them.
    """
    f = {name.removeprefix("rope."): value for name, value in fields.items()}
    kind = f.get("scaling.type", "linear")
    factor = f.get("scaling.factor", f.get("scale_linear", 0.0)) or 1.0
    stretch = 1 / factor if kind != "none" else 1.0
    plain = np.arange(64)[:, None] * theta ** (-np.arange(0, 8, 2) / 8)
    angle, magnitude = plain * stretch, f.get("scaling.attn_factor", 1.0)
    if kind == "yarn":
        original = f.get("scaling.original_context_length", context)

        def pair(turns):
            return 8 * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(theta))

        low = max(0, np.floor(pair(f.get("scaling.yarn_beta_fast", 32.0))))
        high = min(7, np.ceil(pair(f.get("scaling.yarn_beta_slow", 1.0))))
        ramp = 1 - np.clip((np.arange(4) - low) / max(0.001, high - low), 0, 1)
        angle = angle * (1 - ramp) + plain * ramp
        magnitude = magnitude * (1 + 0.1 * np.log(factor))
    return magnitude * np.exp(1j * angle)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "linear"),
        ({"rope.scaling.factor": 2.5}, "linear"),
        ({"rope.scale_linear": 2.0}, "linear"),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 8.0}, "linear"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, "default"),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "default"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
          "rope.scaling.original_context_length": 4096}, "yarn"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}, "yarn"),
        ({"rope.scaling.type": "yarn"}, "yarn"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
          "rope.scaling.attn_factor": 0.75, "rope.scaling.yarn_ext_factor": 1.0,
          "rope.scaling.yarn_attn_factor": 0.1 * np.log(4.0) + 1,
          "rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.5,
          "rope.scaling.original_context_length": 512}, "yarn"),
    ],
    ids=str,
)  # fmt: skip
def test_rope_scaling(fields, kind, tmp_path):
    path, family = tmp_path / "model.gguf", "qwen2"
    config = {**LLAMA, "model_type": family, "num_hidden_layers": 1}
    methods = {str: "add_string", int: "add_uint32"}
    write_gguf(
        *(path, config),
        fields=[
            (methods.get(type(value), "add_float32"), f"{family}.{key}", value)
            for key, value in fields.items()
        ],
    )
    rope = convert(path, tmp_path / "out", progress=False).rope
    assert rope is not None and rope.kind == kind
    expected = rotation(fields, LLAMA["rope_theta"], LLAMA["max_position_embeddings"])
    # One in the first of each pair shows the cosine there, the sine in the second.
    ones = jnp.concatenate([jnp.ones((64, 4)), jnp.zeros((64, 4))], -1)
    turned = np.asarray(rotate(ones, *angles(jnp.arange(64), rope, 8)))
    found = turned[:, :4] + 1j * turned[:, 4:]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_windows(tmp_path):
    """Mistral's in every layer; Qwen's where the pattern has it."""
    pattern = [False, True]
    qwen = {
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    for family, theirs, also in (("llama", "mistral", {}), ("qwen3", "qwen3", qwen)):
        config = {**LLAMA, "model_type": family, "architectures": None, "head_dim": 8}
        tensors = llama_tensors(config)
        fields = [("add_sliding_window", 16)]
        if also:
            fields.append(("add_sliding_window_pattern", pattern))
        path = tmp_path / f"{family}.gguf"
        write_gguf(path, config, gguf_tensors(config, tensors), fields=fields)
        config |= {"model_type": theirs, "sliding_window": 16, **also}
        hf = write_hf(tmp_path / theirs, config, tensors)
        made = [
            convert(source, tmp_path / f"{family}{i}", dtype="float32", progress=False)
            for i, source in enumerate((path, hf))
        ]
        assert made[0].windows == made[1].windows == ((0, 16) if also else (16, 16))
        eps = made[1].norm_eps
        same = dataclasses.replace(made[0].architecture, norm_eps=eps)
        assert same == made[1].architecture
        first, second = (weights(tmp_path / f"{family}{i}") for i in range(2))
        jax.tree.map(np.testing.assert_array_equal, first, second)
    write_gguf(path, {**config, "model_type": "qwen3"}, fields=fields[:1])
    with pytest.raises(ConversionError, match=r"sliding_window = 16 .*_pattern must"):
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
        ([("add_rope_scaling_type", gguf.RopeScalingType.LONGROPE)],
         "llama.rope.scaling.type = 'longrope' is not .*: none, linear, yarn"),
        ([("add_rope_scaling_factor", -4.0)], "scaling.factor must be pos.*-4.0"),
        ([("add_float32", "llama.rope.scale_linear", -4.0)], "rope.scale_linear must"),
        ([("add_rope_scaling_attn_factors", 0.8)], "llama.rope.scaling.attn_factor ="),
        ([*YARN, ("add_rope_scaling_yarn_attn_factor", 1.0)],
         "yarn_attn_factor = 1.0 is .* this factor multiplies with 1.13863"),
        ([*YARN, ("add_rope_scaling_yarn_ext_factor", 0.5)], "yarn_ext_factor = 0.5"),
        ([*YARN, ("add_rope_scaling_yarn_log_mul", 0.1)], "yarn_log_multiplier = 0.1"),
        ([*YARN, ("add_rope_scaling_yarn_beta_fast", 0.0)], "beta_fast must be posit"),
        ([*YARN, ("add_string", "llama.rope.scaling.attn_factor", "1")], "a number"),
        ([("add_float32", "llama.attention.scale", 1.0)], "attention.scale = 1.0"),
        ([("add_rope_dimension_count", 4)], "llama.rope.dimension_count = 4"),
        ([("add_value_length", 4)], "attention.value_length = 4"),
        ([("add_expert_count", 8)], "llama.expert_count = 8"),
        ([("add_int32", "llama.attention.sliding_window", -1)], "a number of tokens"),
        ([("add_sliding_window", 16), ("add_sliding_window_pattern", 2)],
         "window_pattern = 2 is not .* true or false for each of 2 layers"),
        ([("add_sliding_window", 16), ("add_sliding_window_pattern", [True, False])],
         "a Mistral has its window in every layer"),
        ([("add_uint16", "split.count", 3)], "is one part of 3"),
        ([("add_uint64", "general.alignment", 2**40)], "alignment 10.* up to 65536"),
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
        ("add_rope_scaling_factor", 4.0),  # of no type
        ("add_rope_scaling_finetuned", True),
        ("add_float32", "llama.attention.scale", 8**-0.5),
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
