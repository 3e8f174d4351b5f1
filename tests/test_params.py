"""The folder that a model is kept in, whole and damaged."""

import dataclasses
import json
import os
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import polarjax
from polarjax import loading
from polarjax import params as params_module
from polarjax.params import check_finite, write_folder
from polarjax.storage.folder import MARK_FILE, new_folder
from tests.convert.damage import limits
from tests.models import LLAMA, OPT, random_params, write_checkpoint
from tests.seal import seal
from tests.storage.test_files import KINDS, replace

CONFIG = dataclasses.replace(
    LLAMA, layers=2, eos_ids=(256,), bos_ids=(1,), model_hash="abc"
)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, routers=True, budgets=(4, 2))


@pytest.fixture(scope="module")
def written(params, tmp_path_factory):
    """A folder with everything; leave it as it is."""
    folder = tmp_path_factory.mktemp("params") / "model"
    write_checkpoint(folder, params)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "model")


def edit_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    seal(folder)


def assert_equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def files_below(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


# The folder.


def test_round_trip(params, written, tmp_path):
    loaded = polarjax.load(written)
    assert_equal_trees(loaded.weights, params.weights)
    assert_equal_trees(loaded.routers, params.routers)
    assert loaded.policy.learned.budgets == (4, 2)
    assert loaded.config == dataclasses.replace(CONFIG, folder=str(written))
    # Once more through `save`, which carries the tokenizer and template along.
    polarjax.save(loaded, tmp_path / "again")
    again = polarjax.load(tmp_path / "again")
    assert_equal_trees(again.weights, params.weights)
    assert again.policy.learned.budgets == (4, 2)
    assert again.config == dataclasses.replace(CONFIG, folder=str(tmp_path / "again"))
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_round_trip_of_bfloat16_and_neuron_routers_without_a_tokenizer(tmp_path):
    config = dataclasses.replace(OPT, layers=2)
    params = random_params(config, 0, routers=True, neuron_rank=8, budgets=(6, 3))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.weights)
    params = dataclasses.replace(params, weights=half)
    polarjax.save(params, tmp_path / "model")
    loaded = polarjax.load(tmp_path / "model")
    assert loaded.dtype == jnp.bfloat16
    assert_equal_trees(loaded.weights, params.weights)
    assert_equal_trees(loaded.routers, params.routers)
    with pytest.raises(ValueError, match="prompt 0 is a str, but this checkpoint has"):
        polarjax.generate(loaded, ["text"])


def test_dtype_is_of_the_weights_alone(written, params):
    loaded = polarjax.load(written, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.weights)} == {
        jnp.dtype("bfloat16")
    }
    assert loaded.dtype == jnp.bfloat16
    assert_equal_trees(loaded.routers, params.routers)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.weights)
    assert_equal_trees(loaded.weights, rounded)


def test_a_folder_may_move(written, tmp_path):
    shutil.copytree(written, tmp_path / "elsewhere")
    loaded = polarjax.load(str(tmp_path / "elsewhere"))
    assert loaded.config.folder == str(tmp_path / "elsewhere")


def test_writing_over_a_folder_must_be_asked_for(params, folder):
    before = [p.read_bytes() for p in files_below(folder)]
    with pytest.raises(FileExistsError, match="overwrite"):
        polarjax.save(params, folder)
    assert [p.read_bytes() for p in files_below(folder)] == before
    # In place: the tokenizer is read from the folder that is replaced.
    loaded = polarjax.load(folder)
    changed = jax.tree.map(lambda x: x + 1, loaded)
    polarjax.save(changed, folder, overwrite=True)
    assert_equal_trees(polarjax.load(folder).weights, changed.weights)
    assert (folder / "tokenizer.json").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("when", ["weights", "config"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_save_leaves_nothing(params, tmp_path, monkeypatch, when, error):
    def interrupt(*_, **__):
        raise error

    target, name = {
        "weights": (params_module, "write_tensors"),
        "config": (polarjax.ModelConfig, "to_json"),
    }[when]
    monkeypatch.setattr(target, name, interrupt)
    with pytest.raises((error, OSError)):
        polarjax.save(params, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_overwrite_leaves_what_was_there(params, folder, monkeypatch):
    before = [p.read_bytes() for p in files_below(folder)]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(polarjax.ModelConfig, "to_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        polarjax.save(params, folder, overwrite=True)
    assert [p.read_bytes() for p in files_below(folder)] == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_leftovers_of_a_killed_process_do_not_load_and_do_not_matter(params, tmp_path):
    partial = tmp_path / "model.partial"
    (partial / "folder").mkdir(parents=True)
    (partial / "folder" / "half").write_text("half")
    with pytest.raises(FileNotFoundError, match=r"no config\.json: not a polarjax"):
        polarjax.load(partial)
    with pytest.raises(FileExistsError, match="holds folder, which this polarjax did"):
        polarjax.save(params, tmp_path / "model")
    assert (partial / "folder" / "half").read_text() == "half"
    (partial / MARK_FILE).touch()
    polarjax.save(params, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_equal_trees(polarjax.load(tmp_path / "model").weights, params.weights)


def test_a_disk_too_small_is_one_error(params, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        params_module.shutil, "disk_usage", lambda _: usage._replace(free=1000)
    )
    with pytest.raises(OSError, match=r"no space for .* 0\.0 MB are free"):
        polarjax.save(params, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_one_of_two_writers_is_told(params, tmp_path):
    with new_folder(tmp_path / "model") as partial:
        (partial / "inside").write_text("ours")
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="another process is writing"):
                polarjax.save(params, tmp_path / "model", overwrite=overwrite)
    assert (tmp_path / "model" / "inside").read_text() == "ours"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_whoever_sees_the_folder_may_read_it(params, tmp_path):
    before = os.umask(0o022)
    try:
        polarjax.save(params, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in files_below(tmp_path / "model")}
    assert modes == {0o644}


def test_a_link_is_not_followed(params, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").write_text("a photo")
    (tmp_path / "model.partial").symlink_to(tmp_path / "photos")
    with pytest.raises(OSError):
        polarjax.save(params, tmp_path / "model")
    assert (tmp_path / "photos" / "one").exists()


# Damage.


def test_every_damaged_array_file_is_noticed(params, tmp_path, monkeypatch):
    monkeypatch.setattr(params_module, "GROUP_BYTES", 20_000)
    polarjax.save(params, tmp_path / "model")
    assert_equal_trees(polarjax.load(tmp_path / "model").weights, params.weights)
    names = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(names) > 5
    rng = np.random.default_rng(0)
    damaged = 0
    for name in names:
        data = (tmp_path / "model" / name).read_bytes()
        bad = bytearray(data)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        for content in (bytes(bad), data[: len(data) // 2], b"", None):
            folder = shutil.copytree(tmp_path / "model", tmp_path / str(damaged))
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"is damaged: .* is (missing|not wh)"):
                polarjax.load(folder)
            damaged += 1


@pytest.mark.parametrize("content", [None, b"", b"{", b"3", b"\xff", b'{"a": 1}'])
def test_damaged_checksums_are_refused(folder, content):
    (folder / "checksums.json").unlink()
    if content is not None:
        (folder / "checksums.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"checksums\.json is missing or|is damaged"):
        polarjax.load(folder)


def with_file(folder, tensors):
    """Add a file of tensors, with a right checksum."""
    sums = json.loads((folder / "checksums.json").read_text())
    file = folder / f"tensors-{len(sums):05}.safetensors"
    save_file(tensors, file)
    sums[file.name] = f"{zlib.crc32(file.read_bytes()):08x}"
    (folder / "checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weights/final_norm/scale", (48,), "it holds 'weights/final_norm/scale'"),
        ("elsewhere/final_norm/scale", (48,), "it holds 'elsewhere/final_norm/scale'"),
        ("weights/final_norm/scale/more", (48,), "its tensors make no tree"),
        ("weights/final_norm/more", (48,), "its weights are not those of its config"),
        ("weights/final_norm/none", (0,), "is damaged|are not those of its config"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(folder, name, shape, message):
    with_file(folder, {name: np.ones(shape, np.float32)})
    with pytest.raises(ValueError, match=message):
        polarjax.load(folder)


@pytest.mark.parametrize("name", ["config.json", "../x", "x" * 300, "tensors-00002"])
def test_checksums_of_other_files_are_refused(folder, name):
    (folder / "checksums.json").write_text(json.dumps({name: "00000000"}))
    with pytest.raises(ValueError, match=r"checksums\.json names"):
        polarjax.load(folder)


def test_files_that_are_no_safetensors_are_refused(folder):
    (folder / "tensors-00001.safetensors").write_bytes(b"junk")
    sums = {"tensors-00001.safetensors": f"{zlib.crc32(b'junk'):08x}"}
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match=r"tensors-00001\.safetensors is damaged"):
        polarjax.load(folder)


def test_a_description_is_what_was_written(folder):
    """A flipped bit that leaves a valid one is found too."""
    whole = (folder / "config.json").read_bytes()
    found = 0
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 4
        (folder / "config.json").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"config\.json|this polarjax") as caught:
            loading.read_config(folder)
        found += "config.json is not what was written" in str(caught.value)
    assert found > 20
    fields = json.loads(whole)
    (folder / "config.json").write_text(json.dumps({**fields, "eos_ids": [7]}))
    match = r"is not what was written; if you changed it on purpose, take its line out"
    for load in (polarjax.load, loading.read_config):
        with pytest.raises(ValueError, match=match):
            load(folder)
    # As checkpoints of before are, or where someone did as told.
    sums = json.loads((folder / "checksums.json").read_text())
    del sums["config.json"]
    (folder / "checksums.json").write_text(json.dumps(sums))
    assert polarjax.load(folder).config.eos_ids == (7,)


@pytest.mark.parametrize("size", [4_096, 16_000_000, 60_000_000, 10**12, 10**400])
def test_sizes_are_compared_before_anything_is_allocated(folder, size, monkeypatch):
    def refuse(*_):
        raise AssertionError("an array is read")

    monkeypatch.setattr(params_module, "_read", refuse)
    for name in ("vocab_size", "dim", "layers", "heads", "head_dim", "neurons"):
        edit_config(folder, **{name: size})
        with limits(), pytest.raises(ValueError, match=r"config\.json") as caught:
            polarjax.load(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        edit_config(folder, **{name: getattr(CONFIG, name)})
    edit_config(folder, heads=size, kv_heads=size)
    with limits(), pytest.raises(ValueError, match=r"config\.json"):
        polarjax.load(folder)


def test_a_context_that_nobody_has(folder):
    edit_config(folder, context=2**24)
    assert polarjax.load(folder).config.context == 2**24
    edit_config(folder, context=2**24 + 1)
    with pytest.raises(ValueError, match="context must be between 1 and 16,777,216"):
        polarjax.load(folder)
    # Learned positions are a tensor.
    learned = random_params(dataclasses.replace(OPT, layers=2))
    polarjax.save(learned, folder, overwrite=True)
    edit_config(folder, context=2**24)
    with limits(), pytest.raises(ValueError, match=r"positions.*\[130, 48\].* needs"):
        polarjax.load(folder)


@pytest.mark.slow
def test_a_context_that_nobody_has_takes_no_memory(folder):
    edit_config(folder, context=2**24)
    with limits(60):
        params = polarjax.load(folder)
        out = polarjax.generate(params, [[1, 2, 3]], max_new_tokens=2)
    assert len(out.tokens[0]) == 2


def test_budgets_in_a_checkpoint_are_checked(folder):
    for changes, message in (
        ({"budgets": [4, 5]}, "budgets .* must be 2 numbers from 1 to 4"),
        ({"budgets": [4, 2.5]}, "what is no whole number"),
        ({"budgets": [4, 2], "adaptive": True}, "need thresholds"),
        ({"neuron_budgets": [[1, [80, 40]]]}, "need a ReLU MLP"),
    ):
        edit_config(folder, budgets=[4, 2], adaptive=False, neuron_budgets=[])
        edit_config(folder, **changes)
        with pytest.raises(ValueError, match=message):
            polarjax.load(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["config.json", "checksums.json", "tensors-00001.safetensors"]
)
def test_what_is_no_file_is_refused(folder, name, kind):
    replace(folder / name, kind)
    with limits(), pytest.raises(ValueError, match=name.replace(".", r"\.")):
        polarjax.load(folder)
    if name == "config.json":
        with limits(), pytest.raises(ValueError, match=r"config\.json"):
            loading.read_config(folder)
        with limits(), pytest.raises(FileExistsError, match="no polarjax checkpoint"):
            polarjax.save(random_params(CONFIG), folder, overwrite=True)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, np.bool_])
def test_weights_are_floats_of_at_most_32_bits(folder, params, dtype):
    weights = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params.weights)
    write_folder(folder, CONFIG, weights, overwrite=True)
    with pytest.raises(ValueError, match=f" is {np.dtype(dtype)}, but must be one of"):
        polarjax.load(folder)


@pytest.mark.parametrize("name", ["config.json", "checksums.json"])
def test_json_without_end_is_refused(folder, name):
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json|checksums\.json"):
        polarjax.load(folder)


def test_layers_are_counted_before_they_are_made(folder):
    edit_config(folder, layers=4096)
    with pytest.raises(ValueError, match="its weights are not those of its config"):
        polarjax.load(folder)
    edit_config(folder, layers=10**9)
    with pytest.raises(ValueError, match="layers must be between 1 and 4,096"):
        polarjax.load(folder)


def test_weights_of_two_dtypes_are_refused(params, tmp_path):
    mixed = jax.tree.map(lambda x: x, params.weights)
    mixed["final_norm"]["scale"] = mixed["final_norm"]["scale"].astype(jnp.float16)
    write_folder(tmp_path / "model", CONFIG, mixed)
    with pytest.raises(ValueError, match=r"is float\d\d, but others are float\d\d"):
        polarjax.load(tmp_path / "model")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "{}", '{"format_version": 2}', "\0\0"]
)
def test_a_garbled_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"not a polarjax config\.json"):
        polarjax.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "checkpoint format 1, .* reads 2: convert .* again"),
        ({"format_version": None}, "checkpoint format None"),
        ({"unheard_of": 1}, "not a polarjax config.*unheard_of"),
        ({"rope": 5}, "not a polarjax config"),
        ({"rope": {"theta": 1e4}}, "not a polarjax config"),
        ({"eos_ids": 5}, "not a polarjax config"),
        ({"dim": "48"}, "dim must be a positive integer, got '48'"),
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"heads": True}, "heads must be a positive integer, got True"),
        ({"kv_heads": 3}, r"heads \(8\) must be a multiple of kv_heads \(3\)"),
        ({"norm": "batch"}, "norm must be one of .*got 'batch'"),
        ({"activation": "tanh"}, "activation must be one of .*got 'tanh'"),
        # Right by itself, but not of these weights.
        ({"layers": 3}, "its weights are not those of its config"),
        ({"tied_embeddings": False}, "its weights are not those of its config"),
        ({"vocab_size": 330}, r"tokens.*\[331, 48\].*needs \[330, 48\]"),
        ({"head_dim": 8}, r"is float32\[.*needs \["),
        ({"kv_heads": 2}, r"needs \["),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        polarjax.load(folder)


def test_an_unknown_kind_of_rope_is_refused(folder):
    rope = {**dataclasses.asdict(polarjax.Rope(1e4)), "kind": "spiral"}
    edit_config(folder, rope=rope)
    with pytest.raises(
        ValueError, match=r"rope: kind must be one of 'default'.* got 'spiral'"
    ):
        polarjax.load(folder)


def test_a_gguf_file_is_to_be_converted(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        FileNotFoundError, match=r"`polarjax convert .*model\.gguf DST`"
    ):
        polarjax.load(tmp_path / "model.gguf")


def test_places_without_a_checkpoint_say_so(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder at .*nowhere"):
        polarjax.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder at"):
        polarjax.load(folder / "config.json")
    # A Hugging Face folder has a config.json too.
    (folder / "checksums.json").unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match="convert it first: `polarjax convert"):
        polarjax.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        polarjax.load(folder)


def test_routers_of_another_shape_are_refused(params, tmp_path):
    other = random_params(dataclasses.replace(CONFIG, kv_heads=2), 0, routers=True)
    write_folder(tmp_path / "model", CONFIG, params.weights, other.policy.learned)
    with pytest.raises(ValueError, match="router layers_1 has shapes"):
        polarjax.load(tmp_path / "model")


def test_integer_weights_are_refused(params, tmp_path):
    weights = jax.tree.map(lambda x: x.astype(jnp.int32), params.weights)
    write_folder(tmp_path / "model", CONFIG, weights)
    with pytest.raises(ValueError, match="is int32"):
        polarjax.load(tmp_path / "model")


@pytest.mark.parametrize("make", [np.array, jnp.array])
def test_check_finite(make):
    check_finite("x", make([1.0, 2.0]))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="x holds NaN or infinity"):
            check_finite("x", make([1.0, bad]))
