"""The way back to Hugging Face's format: what has no words, bad input, adapters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import polarjax
from convert.__main__ import main
from convert.export import export, write
from convert.source import ConversionError
from polarjax.config import Rope
from polarjax.policies import save_adapter, with_learned
from polarjax.policies.updates import init_updates, merge_updates
from tests.models import LLAMA, OPT, random_params, write_checkpoint


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    config = dataclasses.replace(LLAMA, family="llama", bos_ids=(1,), eos_ids=(2, 3))
    model = random_params(config, routers=True)
    bare = dataclasses.replace(model, policy=polarjax.Dense())
    written = write_checkpoint(tmp_path_factory.mktemp("export") / "model", bare)
    return with_learned(written, routers=model.routers)


def tensors_of(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def test_tokenizer_and_ids_come_along(params, tmp_path):
    export(polarjax.load(params.config.folder), tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["bos_token_id"] == 1 and config["eos_token_id"] == [2, 3]
    assert (tmp_path / "hf/tokenizer.json").exists()
    names = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    tensors = tensors_of(tmp_path / "hf")
    assert index["weight_map"].keys() == tensors.keys()
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total


def test_what_an_adapter_has_mended_can_leave(params, tmp_path):
    c = params.config
    updates = init_updates(jax.random.key(0), params.weights, c.layers, 2)
    updates = jax.tree.map(lambda x: jnp.ones_like(x) * 0.1, updates)
    routers = {
        name: {**params.routers.get(name, {}), "updates": change}
        for name, change in updates.items()
    }
    budgets = (c.kv_heads, *(1,) * (c.layers - 1))
    mended = with_learned(params, routers=routers, budgets=budgets)
    save_adapter(tmp_path / "a", mended)
    command = ["--to-hf", c.folder, str(tmp_path / "hf")]
    assert main([*command, "--adapter", str(tmp_path / "a")]) == 0
    loaded = polarjax.load(c.folder, adapter=tmp_path / "a")
    found = tensors_of(tmp_path / "hf")["model.layers.1.self_attn.o_proj.weight"]
    right = merge_updates(loaded).weights["layers_1"]["attention"]["out"]
    np.testing.assert_array_equal(found, np.asarray(right).T)
    original = params.weights["layers_1"]["attention"]["out"]
    assert not np.array_equal(found, np.asarray(original).T)
    # Into other weights if it is asked for.
    other = jax.tree.map(lambda x: 1.05 * x, params.weights)
    config = dataclasses.replace(c, model_hash="other")
    other = polarjax.Params(other, polarjax.Dense(), config)
    polarjax.save(other, tmp_path / "other")
    command = ["--to-hf", str(tmp_path / "other"), str(tmp_path / "hf2")]
    command += ["--adapter", str(tmp_path / "a")]
    assert main(command) == 1 and not (tmp_path / "hf2").exists()
    assert main([*command, "--any-model"]) == 0
    changed = tensors_of(tmp_path / "hf2")["model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_allclose(
        changed - found, 0.05 * np.asarray(original).T, atol=1e-5
    )


def test_what_has_no_words_is_refused(params, tmp_path, capsys):
    config = dataclasses.replace(params.config, rope=Rope(divisors=(1.0,) * 8))
    with pytest.raises(ConversionError, match="out of a GGUF file"):
        write(tmp_path / "hf", config, params.weights, dtype="float32")
    config = dataclasses.replace(params.config, family="gemma")
    with pytest.raises(ConversionError, match="family 'gemma' is not one of llama,"):
        write(tmp_path / "hf", config, params.weights, dtype="float32")
    config = dataclasses.replace(OPT, norm_after=True)
    with pytest.raises(
        ConversionError, match="norms after each half-layer and a final"
    ):
        write(tmp_path / "hf", config, params.weights, dtype="float32")
    large = jax.tree.map(lambda x: x * 1e6, params.weights)
    with pytest.raises(ConversionError, match="beyond the range of float16"):
        write(tmp_path / "hf", params.config, large, dtype="float16")
    assert main(["--to-hf", str(tmp_path / "none"), str(tmp_path / "hf")]) == 1
    assert "no checkpoint folder at" in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    capsys.readouterr()
    # Before the checkpoint is looked at, and not with words for another command.
    for source in (params.config.folder, str(tmp_path / "none")):
        assert main(["--to-hf", source, str(tmp_path / "there")]) == 1
        error = capsys.readouterr().err
        assert "there exists: choose another" in error and "overwrite" not in error
    assert (tmp_path / "there/file").read_text() == "mine"
    assert not (tmp_path / "hf").exists()
    for wrong in (
        ["--adapter", "x"],
        ["--to-hf", "--overwrite"],
        ["--to-hf", "--any-model"],
    ):
        with pytest.raises(SystemExit):
            main([params.config.folder, str(tmp_path / "hf"), *wrong])
