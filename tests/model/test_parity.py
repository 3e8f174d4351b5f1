"""The dense model computes what transformers' classes compute, once converted."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from convert import convert
from convert.export import export
from polarjax.model import Decoder, extend, logits, whole
from polarjax.params import read_folder
from tests.models import empty_cache, read_prompts

torch = pytest.importorskip("torch", reason="needs it: pip install torch")
transformers = pytest.importorskip(
    "transformers", reason="needs it: pip install transformers"
)

LLAMA = dict(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So small that the wavelengths of a 16-dimensional head lie on all three parts
    # of the ramp.
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 1.9, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 7.0, 9.0, 12.0, 16.0],
    "original_max_position_embeddings": 128,
}
SMOLLM3 = dict(
    LLAMA,
    **dict(num_hidden_layers=4, num_key_value_heads=2, pad_token_id=None),
    tie_word_embeddings=True,
)
OPT = dict(
    vocab_size=131,
    hidden_size=64,
    ffn_dim=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=96,
    word_embed_proj_dim=64,
    init_std=0.2,
)
MODELS = {
    "llama-mha": dict(LLAMA),
    "llama-gqa-tied": dict(LLAMA, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-mqa": dict(LLAMA, num_key_value_heads=1, rms_norm_eps=1e-3),
    "llama-gqa-llama3-rope": dict(LLAMA, num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama-head-dim": dict(LLAMA, head_dim=24, num_key_value_heads=2),
    "llama-bias": dict(LLAMA, attention_bias=True, num_key_value_heads=2),
    "llama-odd": dict(
        LLAMA,
        **dict(vocab_size=97, hidden_size=60, intermediate_size=37),
        **dict(num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=1),
        rope_parameters={"rope_type": "default", "rope_theta": 123.0},
    ),
    "llama-linear-rope": dict(
        LLAMA,
        rope_parameters={"rope_type": "linear", "rope_theta": 99.0, "factor": 3.0},
    ),
    "llama-yarn-rope": dict(LLAMA, rope_parameters=YARN, num_key_value_heads=2),
    "llama-yarn-factor-null": dict(
        LLAMA, rope_parameters=dict(YARN, factor=None), num_key_value_heads=2
    ),
    # By Qwen's recipe the context of the file is the one before the extension.
    "qwen2-yarn-recipe": dict(
        LLAMA, max_position_embeddings=32, rope_parameters=dict(YARN)
    ),
    "llama-dynamic-rope": dict(
        LLAMA,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 99.0, "factor": 3.0},
    ),
    # No text here is longer than the original context.
    "llama-longrope-short": dict(
        LLAMA, rope_parameters=dict(LONGROPE, attention_factor=1.2)
    ),
    "llama-mlp-bias": dict(LLAMA, mlp_bias=True, num_key_value_heads=2),
    "smollm3-mlp-bias-relu": dict(SMOLLM3, mlp_bias=True, hidden_act="relu"),
    "llama-relu": dict(LLAMA, hidden_act="relu", num_key_value_heads=2),
    "qwen2-mha": dict(LLAMA),
    "qwen2-gqa-tied": dict(LLAMA, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-mqa-yarn": dict(
        LLAMA,
        num_key_value_heads=1,
        rope_parameters=dict(YARN, truncate=False, attention_factor=1.3),
    ),
    "qwen2-window-of-none": dict(
        LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "qwen2-odd": dict(
        LLAMA,
        **dict(vocab_size=97, hidden_size=60, intermediate_size=37),
        **dict(num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=1),
    ),
    "qwen3-mha": dict(LLAMA, head_dim=16),
    "qwen3-gqa-tied-bias": dict(
        LLAMA,
        **dict(head_dim=24, num_key_value_heads=2, tie_word_embeddings=True),
        attention_bias=True,
    ),
    "qwen3-mqa-yarn": dict(
        LLAMA,
        **dict(head_dim=16, num_key_value_heads=1, rms_norm_eps=1e-3),
        rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=1.2),
    ),
    "qwen3-odd": dict(
        LLAMA,
        **dict(vocab_size=97, hidden_size=60, intermediate_size=37, head_dim=14),
        **dict(num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=1),
    ),
    # Shorter than most prompts; all texts cross them.
    "mistral-window": dict(LLAMA, num_key_value_heads=2, sliding_window=7),
    "mistral-no-window": dict(LLAMA, sliding_window=None, head_dim=24),
    "mistral-mqa-tied": dict(
        LLAMA, num_key_value_heads=1, sliding_window=3, tie_word_embeddings=True
    ),
    "mistral-odd": dict(
        LLAMA,
        **dict(vocab_size=97, hidden_size=60, intermediate_size=37, sliding_window=30),
        **dict(num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=1),
        rope_parameters=LLAMA3,
    ),
    "qwen2-window": dict(
        LLAMA,
        **dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
        num_key_value_heads=2,
    ),
    "qwen3-window-types": dict(
        LLAMA,
        **dict(head_dim=16, use_sliding_window=True, sliding_window=9),
        layer_types=["sliding_attention", "full_attention"],
    ),
    "smollm3-gqa-tied": dict(SMOLLM3),
    "smollm3-mha-bias": dict(
        SMOLLM3,
        **dict(num_key_value_heads=4, attention_bias=True, tie_word_embeddings=False),
        no_rope_layers=[0, 1, 0, 1],
    ),
    "smollm3-mqa-yarn": dict(
        SMOLLM3,
        **dict(num_key_value_heads=1, no_rope_layer_interval=2, rope_parameters=YARN),
    ),
    # The layers without positions see a window alone.
    "smollm3-window": dict(
        SMOLLM3,
        **dict(use_sliding_window=True, sliding_window=6, no_rope_layer_interval=2),
    ),
    "smollm3-odd": dict(
        SMOLLM3,
        **dict(vocab_size=97, hidden_size=60, intermediate_size=37, head_dim=14),
        **dict(num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=1),
        **dict(no_rope_layers=[1, 1], rms_norm_eps=1e-3),
    ),
    "opt": dict(OPT),
    "opt-projected": dict(OPT, word_embed_proj_dim=32),
    "opt-untied": dict(OPT, tie_word_embeddings=False),
    "opt-untied-projected": dict(
        OPT, word_embed_proj_dim=96, tie_word_embeddings=False
    ),
    "opt-plain": dict(OPT, enable_bias=False, layer_norm_elementwise_affine=False),
    "opt-gelu": dict(OPT, activation_function="gelu"),
    # As OPT-350M is: norms after, none at the end, a narrower embedding.
    "opt-norm-after-projected": dict(
        OPT, do_layer_norm_before=False, word_embed_proj_dim=32
    ),
    "opt-norm-after-no-bias": dict(
        OPT,
        **dict(do_layer_norm_before=False, layer_norm_elementwise_affine=False),
        **dict(tie_word_embeddings=False, enable_bias=False),
    ),
    "opt-no-final-norm": dict(OPT, _remove_final_layer_norm=True),
    "opt-odd": dict(
        OPT,
        **dict(vocab_size=97, hidden_size=42, ffn_dim=29, word_embed_proj_dim=42),
        **dict(num_attention_heads=3, num_hidden_layers=1),
    ),
}
LENGTHS = (5, 1, 23, 12)
NEW = 48


def make_reference(name: str):
    """A model of transformers whose every parameter is random and matters."""
    family = name.split("-")[0]
    kind, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    }[family]
    reference = model(kind(**MODELS[name])).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in path and path.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.25 * noise)
    return reference


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that torch's threads only cost."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    """The same model in transformers and here."""
    reference = make_reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder / "hf")
    with pytest.MonkeyPatch.context() as patch:  # as large tensors are read
        patch.setattr("convert.source.BLOCK_BYTES", 3000)
        convert(folder / "hf", folder / "ours", dtype="float32", progress=False)
    return reference, read_folder(folder / "ours")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 97, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def outputs(pair, prompts):
    """What the model here makes of the prompts, as one ragged batch."""
    params = pair[1]
    tokens, lengths = padded(prompts, filler=7)
    other, _ = padded(prompts, filler=3)
    return run(Decoder(params.config), params.weights, tokens, other, lengths)


def padded(prompts, filler):
    """Right-padded token ids [b, t] and lengths [b]."""
    width = max(map(len, prompts))
    tokens = np.full((len(prompts), width), filler, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32)


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@partial(jax.jit, static_argnums=0)
def run(model, weights, tokens, other, lengths):
    """All logits; those after the prompts, padded otherwise; the next tokens."""

    def step(carry, _):
        token, cache = carry
        found = extend(model, weights, token, lengths > 0, cache)
        return (found.logits.argmax(-1), found.cache), token

    every = logits(model, weights, whole(model, weights, tokens).x)
    context = other.shape[1] + NEW
    cache = empty_cache(model.config, len(other), context)
    last, cache, *_ = read_prompts(model, weights, other, lengths, cache)
    _, chosen = jax.lax.scan(step, (last.argmax(-1), cache), length=NEW)
    return every, last, chosen.T


def test_logits(pair, prompts, outputs):
    reference, _ = pair
    with torch.no_grad():
        theirs = [reference(torch.tensor([p])).logits[0].numpy() for p in prompts]
    every, last, _ = map(np.asarray, outputs)
    ours = [row[: len(p)] for row, p in zip(every, prompts, strict=True)]
    assert relative(np.concatenate(ours), np.concatenate(theirs)) < 1e-4
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine, other) < 1e-4
    # The other padding must not matter.
    assert relative(last, np.stack([rows[-1] for rows in theirs])) < 1e-4


def test_greedy_tokens(pair, prompts, outputs):
    reference, _ = pair
    theirs = []
    for prompt in prompts:
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        theirs.append(out[0, len(prompt) :].tolist())
    assert np.asarray(outputs[2]).tolist() == theirs
    assert len({t for row in theirs for t in row}) > 10, "a degenerate comparison"


def test_the_way_back_is_exact(pair, tmp_path):
    """What transformers loads from an exported folder is what it had saved."""
    reference, params = pair
    export(polarjax.load(params.config.folder), tmp_path / "hf")
    back, report = type(reference).from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    theirs, ours = reference.state_dict(), back.state_dict()
    assert theirs.keys() <= ours.keys()  # norms that had no parameters have them now
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():  # and so the configuration says the same
        assert torch.equal(reference(tokens).logits, back(tokens).logits)
    again = convert(tmp_path / "hf", tmp_path / "ours", dtype="float32", progress=False)
    kept = {"folder": "", "model_hash": ""}
    assert dataclasses.replace(again, **kept) == dataclasses.replace(
        params.config, **kept
    )


def test_the_models_reach_what_they_are_meant_to(pair):
    reference, params = pair
    config = params.config
    their = reference.config
    assert config.tied_embeddings == their.tie_word_embeddings
    context, rope = their.max_position_embeddings, getattr(their, "rope_parameters", {})
    if rope and rope["rope_type"] == "yarn" and rope["factor"]:
        context = max(
            context, rope["factor"] * rope["original_max_position_embeddings"]
        )
    assert config.context == context
    assert config.family == "opt" or config.mlp_bias == getattr(
        their, "mlp_bias", False
    )
    # Qwen2's and Mistral's are no choice.
    assert config.qkv_bias == getattr(
        their, "attention_bias", getattr(their, "enable_bias", config.family == "qwen2")
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params.weights))
    stored = sum(p.numel() for p in reference.parameters())
    if config.family == "opt" and not their.layer_norm_elementwise_affine:
        stored += config.dim * 2 * (2 * config.layers + config.final_norm)
    assert count == stored


@pytest.mark.parametrize(
    "name",
    [
        *("llama-gqa-llama3-rope", "llama-odd", "llama-yarn-rope", "opt"),
        *("qwen2-window-of-none", "qwen2-mqa-yarn", "qwen3-mqa-yarn"),
        *("qwen2-window", "mistral-window", "mistral-no-window", "smollm3-window"),
        *("llama-longrope-short", "llama-dynamic-rope", "llama-yarn-factor-null"),
    ],
)
def test_configs_of_transformers_4_and_5_agree(name, tmp_path):
    make_reference(name).save_pretrained(tmp_path / "five")
    five = json.loads((tmp_path / "five/config.json").read_text())
    four = dict(five, torch_dtype=five.pop("dtype"), transformers_version="4.44.0")
    variants = [four]
    if rope := four.pop("rope_parameters", None):
        four["rope_theta"] = rope.pop("rope_theta")
        four["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        if four["rope_scaling"]:  # the oldest wrote `type`
            older = {"type" if k == "rope_type" else k: v for k, v in rope.items()}
            variants.append(dict(four, rope_scaling=older))
        if name not in ("qwen3-mqa-yarn", "mistral-no-window"):
            four.pop("head_dim", None)
    for name in ("layer_types", "no_rope_layers"):  # those that others imply
        four.pop(name, None)
    first = convert(tmp_path / "five", tmp_path / "ours", progress=False)
    reference = read_folder(tmp_path / "ours")
    for i, config in enumerate(variants):
        (tmp_path / "five/config.json").write_text(json.dumps(config))
        other = convert(tmp_path / "five", tmp_path / f"v{i}", progress=False)
        assert dataclasses.replace(other, folder="") == dataclasses.replace(
            first, folder=""
        )
        assert other.model_hash == first.model_hash
        jax.tree.map(
            np.testing.assert_array_equal,
            reference.weights,
            read_folder(tmp_path / f"v{i}").weights,
        )
