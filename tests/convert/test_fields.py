"""Fields of config.json that no family reads: refused by name, listed, or harmless."""

import pytest

from convert import ConversionError, convert
from convert.rules import understand, unread
from tests.convert.checkpoints import LLAMA, OPT, write_gguf, write_hf


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("final_logit_softcapping", 30.0, None),
        ("attn_logit_softcapping", 50.0, None),
        ("query_pre_attn_scalar", 256, None),
        ("clip_qkv", 8.0, None),
        ("num_local_experts", 8, 0),
        ("num_experts", 64, 0),
        ("n_routed_experts", 160, None),
        ("num_experts_per_tok", 2, None),
        ("attention_multiplier", 0.0078125, None),
        ("embedding_multiplier", 12.0, 1.0),
        ("residual_multiplier", 0.22, 1.0),
        ("logits_scaling", 8.0, 1),
        ("logit_scale", 0.0625, 1.0),
        ("scale_emb", 12, 1),
        ("scale_depth", 1.4, None),
        ("use_qk_norm", True, False),
        ("use_parallel_residual", True, False),
        ("alibi", True, False),
        ("hidden_activation", "gelu_pytorch_tanh", None),
        ("rotary_pct", 0.25, 1.0),
        ("no_rope_layers", [1, 0], []),
        ("per_layer_config", {"1": {"hidden_act": "relu"}}, {}),
        ("is_encoder_decoder", True, False),
        ("use_sliding_window", True, False),
    ],
)
@pytest.mark.parametrize("base", [LLAMA, OPT], ids=["llama", "opt"])
def test_what_changes_the_computation_is_refused(base, name, value, plain):
    with pytest.raises(ConversionError, match=f"{name} .* not supported: it changes"):
        understand({**base, name: value})
    expected = understand(base)
    for harmless in (plain, None):
        config = {**base, name: harmless}
        assert understand(config) == expected and unread(config) == []


def test_a_family_s_own_fields_are_no_other_s():
    sliding = {"sliding_window": 4, "max_window_layers": 0}
    qwen = {**LLAMA, "model_type": "qwen2", "architectures": None, **sliding}
    assert understand({**qwen, "use_sliding_window": True})[0].windows == (4, 4)
    assert unread(qwen) == []
    llama = {**LLAMA, **sliding}
    assert understand(llama)[0].windows == ()
    (line,) = unread(llama)
    assert line.endswith("not read: sliding_window, max_window_layers")
    with pytest.raises(ConversionError, match="use_sliding_window True is not"):
        understand({**llama, "use_sliding_window": True})


def test_a_rope_record_s_fields():
    record = {"rope_type": "linear", "factor": 2.0, "finetuned": True}
    (line,) = unread({**LLAMA, "rope_scaling": record})
    assert line.endswith(": rope_scaling.finetuned")
    record["mrope_section"] = [16, 24, 24]
    with pytest.raises(ConversionError, match=r"mrope_section \[16, 24, 24\] is not"):
        understand({**LLAMA, "rope_scaling": record})


def test_the_rest_is_listed_once(tmp_path, capsys):
    config = {**LLAMA, "auto_map": {"AutoModel": "mine.Model"}, "flavour": "mint"}
    config |= {"initializer_range": 0.02, "empty": None}
    convert(write_hf(tmp_path / "hf", config), tmp_path / "out", progress=False)
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if "configuration" in line]
    assert said == ["note: configuration fields that were not read: auto_map, flavour"]
    (line,) = unread({**LLAMA, **{f"field\n{i}": i for i in range(1000)}})
    assert len(line) < 600 and "\n" not in line and line.endswith(" ...")


def test_a_plain_file_has_nothing_to_say(tmp_path, capsys):
    convert(write_hf(tmp_path / "hf"), tmp_path / "a", progress=False)
    write_gguf(tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "b", progress=False)
    assert "not read" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "OPT"]
)
def test_every_field_of_transformers_own_classes_is_known(name):
    transformers = pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )
    config = getattr(transformers, f"{name}Config")().to_dict()
    assert unread(config) == []
