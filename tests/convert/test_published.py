"""The families' published configurations, as their config.json files word them."""

import pytest

from convert import ConversionError
from convert.rules import describe, understand, unread
from polarjax.config import Rope

OURS = {
    "hidden_size": "dim",
    "intermediate_size": "neurons",
    "ffn_dim": "neurons",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "context",
    "vocab_size": "vocab_size",
}
USUAL = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def sizes(m, f, layers, heads, groups, context, vocabulary):
    numbers = (m, f, layers, heads, groups, context, vocabulary)
    names = [name for name in OURS if name != "ffn_dim"]
    return dict(zip(names, numbers, strict=True))


LLAMA = {
    **USUAL,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {**LLAMA, "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0}
LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL = {
    **USUAL,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN2 = {
    **USUAL,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
QWEN3 = {
    **QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "rope_scaling": None,
    "sliding_window": None,
    "max_window_layers": 28,
}
OPT = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 50272,
}
SMOLLM3 = {
    **USUAL,
    **sizes(2048, 11008, 36, 16, 4, 65536, 128256),
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
LONG = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
# What the file says, and what it means where the names of `OURS` do not tell.
PUBLISHED = {
    "LLaMA-2-7B": (
        {**LLAMA, **sizes(4096, 11008, 32, 32, 32, 4096, 32000)},
        {"head_dim": 128, "rope": Rope(1e4), "tied_embeddings": False},
    ),
    "LLaMA-3-8B": (
        {**LLAMA3, **sizes(4096, 14336, 32, 32, 8, 8192, 128256)},
        {"head_dim": 128, "rope": Rope(5e5)},
    ),
    "LLaMA-3.1-8B": (
        {
            **LLAMA3,
            **sizes(4096, 14336, 32, 32, 8, 131072, 128256),
            "rope_scaling": LLAMA31,
        },
        {"rope": LONG, "qkv_bias": False},
    ),
    "LLaMA-3.2-1B": (
        {
            **LLAMA3,
            **sizes(2048, 8192, 16, 32, 8, 131072, 128256),
            "head_dim": 64,
            "rope_scaling": {**LLAMA31, "factor": 32.0},
            "tie_word_embeddings": True,
        },
        {
            "head_dim": 64,
            "rope": Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192),
            "tied_embeddings": True,
        },
    ),
    "LLaMA-3.3-70B": (
        {
            **LLAMA3,
            **sizes(8192, 28672, 80, 64, 8, 131072, 128256),
            "eos_token_id": [128001, 128008, 128009],
            "rope_scaling": LLAMA31,
        },
        {"head_dim": 128, "rope": LONG},
    ),
    "ReluLLaMA-7B": (
        {
            **LLAMA,
            **sizes(4096, 11008, 32, 32, 32, 4096, 32000),
            "hidden_act": "relu",
        },
        {"activation": "relu", "gated_mlp": True},
    ),
    "SmolLM2-135M": (
        {
            **LLAMA,
            **sizes(576, 1536, 30, 9, 3, 8192, 49152),
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        },
        {"head_dim": 64, "rope": Rope(1e5), "tied_embeddings": True},
    ),
    "SmolLM3-3B": (  # whose file does not say that it is tied
        SMOLLM3,
        {
            "rotary": (True, True, True, False) * 9,
            "tied_embeddings": True,
            "windows": (),
            "rope": Rope(5e6),
        },
    ),
    "Mistral-7B-v0.1": (
        {
            **MISTRAL,
            **sizes(4096, 14336, 32, 32, 8, 32768, 32000),
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
        {"windows": (4096,) * 32, "rope": Rope(1e4)},
    ),
    "Mistral-7B-v0.2": (
        {**MISTRAL, **sizes(4096, 14336, 32, 32, 8, 32768, 32000)},
        {"windows": (), "rope": Rope(1e6)},
    ),
    "Mistral-7B-v0.3": (
        {**MISTRAL, **sizes(4096, 14336, 32, 32, 8, 32768, 32768)},
        {"windows": (), "head_dim": 128},
    ),
    "Mistral-Nemo": (
        {**MISTRAL, **sizes(5120, 14336, 40, 32, 8, 131072, 131072), "head_dim": 128},
        {"windows": (), "head_dim": 128},
    ),
    "Qwen2-7B": (
        {
            **QWEN2,
            **sizes(3584, 18944, 28, 28, 4, 131072, 152064),
            "max_window_layers": 28,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
        },
        {"windows": (), "qkv_bias": True, "out_bias": False, "head_dim": 128},
    ),
    "Qwen2.5-0.5B": (
        {
            **QWEN2,
            **sizes(896, 4864, 24, 14, 2, 32768, 151936),
            "max_window_layers": 24,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
        },
        {"windows": (), "head_dim": 64, "tied_embeddings": True, "qkv_bias": True},
    ),
    "Qwen3-0.6B": (
        {
            **QWEN3,
            **sizes(1024, 3072, 28, 16, 8, 40960, 151936),
            "tie_word_embeddings": True,
        },
        {"head_dim": 128, "qk_norm": True, "qkv_bias": False, "tied_embeddings": True},
    ),
    "OPT-350M": (
        {
            **OPT,
            "do_layer_norm_before": False,
            "ffn_dim": 4096,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "word_embed_proj_dim": 512,
        },
        {"norm_after": True, "final_norm": False, "embed_dim": 512, "rope": None},
    ),
    "OPT-66B": (
        {
            **OPT,
            "ffn_dim": 36864,
            "hidden_size": 9216,
            "num_attention_heads": 72,
            "num_hidden_layers": 64,
            "word_embed_proj_dim": 9216,
        },
        {"norm_after": False, "final_norm": True, "head_dim": 128, "kv_heads": 72},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config, expected = PUBLISHED[name]
    model = understand(config)[0]
    expected = expected | {
        ours: config[theirs] for theirs, ours in OURS.items() if theirs in config
    }
    assert {field: getattr(model, field) for field in expected} == expected
    assert unread(config) == []  # nothing to remark on
    back = describe(model)[0]
    assert understand(back)[0] == model and unread(back) == []


def test_what_the_files_of_a_class_may_leave_out():
    """Then transformers goes by its class's own value."""
    config = {**SMOLLM3}
    for field in ("layer_types", "no_rope_layers", "rope_theta"):
        del config[field]
    model = understand(config)[0]
    assert model.rotary == (True, True, True, False) * 9 and model.rope == Rope(2e6)
    config |= {"use_sliding_window": True, "sliding_window": 512}
    assert understand(config)[0].windows == (0, 0, 0, 512) * 9
    mistral = {**PUBLISHED["Mistral-7B-v0.3"][0]}
    del mistral["sliding_window"]
    assert understand(mistral)[0].windows == (4096,) * 32
    qwen = {**PUBLISHED["Qwen2.5-0.5B"][0], "num_hidden_layers": 30}
    del qwen["max_window_layers"]
    qwen["use_sliding_window"] = True
    assert understand(qwen)[0].windows == (0,) * 28 + (32768,) * 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"architectures": ["SparseLlamaForCausalLM"], "model_type": "sparsellama"},
            "SparseLlamaForCausalLM is not supported",
        ),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.01}, "hidden_act 'fatrelu'"),
    ],
)
def test_prosparse_is_refused(changes, match):
    """Its activation has a threshold above zero, which is not computed here."""
    with pytest.raises(ConversionError, match=match):
        understand({**PUBLISHED["ReluLLaMA-7B"][0], **changes})
