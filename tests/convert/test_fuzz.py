"""Damaged files by the hundred: refused with the place named, or the same model.

Each file goes through the whole of `convert`. Numbers and Python's objects are counted
against the limit by tracemalloc, for each file; what libraries allocate besides shows
in the process's peak, for all of them.
"""

import dataclasses
import functools
import json
import os
import random
import re
import resource
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from convert import ConversionError, convert, places
from convert.readers import open_source
from polarjax.config import ModelConfig
from polarjax.model.positions import frequencies
from polarjax.params import read_folder
from tests.convert.checkpoints import (
    LLAMA,
    byte_level_fields,
    gguf_tensors,
    llama_tensors,
    write_gguf,
    write_hf,
    write_sharded,
)
from tests.convert.damage import (
    MEMORY,
    Damage,
    GgufDamage,
    SafetensorsDamage,
    json_values,
    limits,
)

pytestmark = pytest.mark.usefixtures("small_blocks")

# Fields of the configuration in a GGUF file without a check: nothing tells that they
# were damaged, for every value makes a valid file.
FREE = ("rope", "norm_eps", "context", "bos_ids", "eos_ids", "windows")
# A refusal names a byte, a tensor, a key, a field or the header.
NAMED = re.compile(
    r"byte|header|char|version|tensor|key |tokenizer|token id|configuration|_config|"
    r"architecture|shard|"
    r"(blk|model|llama|qwen3|general|output|token_embd|lm_head|split)[.\w]+"
)
Weights = dict[str, np.ndarray]


def weights_of(folder: Path) -> Weights:
    tree = flatten_dict(read_folder(folder).weights, sep="/")
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


def attempt(source: Path, out: Path) -> tuple[ModelConfig, Weights] | None:
    """What `convert` makes of it within the limits; None if it refuses as it should."""
    try:
        with limits():
            config = convert(source, out, dtype="float32", progress=False)
    except ConversionError as error:
        text = str(error)
        assert str(source) in text and "\n" not in text and len(text) < 1000
        assert NAMED.search(text.replace(str(source), "")), text
        assert not out.exists() and not out.with_name("out.partial").exists()
        return None
    weights = weights_of(out)
    shutil.rmtree(out)
    return config, weights


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture
def measured(monkeypatch):
    # Tracing is most of a tiny conversion: once for each configuration is enough.
    monkeypatch.setattr(places, "weight_shapes", functools.cache(places.weight_shapes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < MEMORY


def sweep(path: Path, cases, free=()) -> dict[str, int]:
    """Damage the file; how often each way was refused."""
    whole, out = path.read_bytes(), path.parent.with_name("out")
    source = path if path.suffix == ".gguf" else path.parent
    reference = attempt(source, out)
    assert reference
    refused: dict[str, int] = {}
    for i, (way, content) in enumerate(cases):
        path.write_bytes(content)
        try:
            found = attempt(source, out)
            if not found:
                refused[way] = refused.get(way, 0) + 1
                continue
            kept = {name: getattr(reference[0], name) for name in free}
            assert dataclasses.replace(found[0], **kept) == reference[0]
            assert_equal(found[1], reference[1])
            if path.suffix != ".gguf":  # nothing passes that the reference
                with safe_open(path, framework="numpy"):  # implementation refuses
                    pass
        except BaseException as error:
            error.add_note(f"{way}, number {i}")
            raise
    path.write_bytes(whole)
    again = attempt(source, out)
    assert again and again[0] == reference[0]
    return refused


COUNTS = [200, pytest.param(2000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_safetensors(count, tmp_path, measured):
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    damage = SafetensorsDamage(path.read_bytes())
    refused = sweep(path, damage.cases(count))
    assert refused.keys() == {way.__name__ for way in damage.ways}
    assert sum(refused.values()) > 0.8 * count


def gguf_file(folder: Path, family: str) -> Path:
    """With a tokenizer; qwen3's with scaled positions, windows and quantised."""
    config, kinds = {**LLAMA, "model_type": family, "head_dim": 8}, ["F32"]
    fields = byte_level_fields()
    fields += [("add_key_length", 8), ("add_value_length", 8)]
    if family == "qwen3":
        kinds = ["Q8_0", "F32", "Q5_0"]
        fields += [
            ("add_rope_scaling_type", gguf.RopeScalingType.YARN),
            ("add_rope_scaling_factor", 4.0),
            ("add_sliding_window", 16),
            ("add_sliding_window_pattern", [False, True]),
        ]
    (folder / "gguf").mkdir()
    path = folder / "gguf/model.gguf"
    tensors = gguf_tensors(config, llama_tensors(config))
    write_gguf(path, config, tensors, kinds, fields)
    return path


@pytest.mark.parametrize("count", COUNTS)
def test_gguf(count, tmp_path, measured):
    for family in ("llama", "qwen3"):
        (tmp_path / family).mkdir()
        path = gguf_file(tmp_path / family, family)
        damage = GgufDamage(path.read_bytes(), path)
        refused = sweep(path, damage.cases(count // 2), FREE)
        assert refused.keys() == {way.__name__ for way in damage.ways}
        assert sum(refused.values()) > 0.5 * count / 2


@pytest.mark.slow
def test_every_byte_of_a_header(tmp_path, measured):
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    damage = SafetensorsDamage(path.read_bytes())
    assert sweep(path, damage.every_byte())["flip"] > 1000
    path = gguf_file(tmp_path, "qwen3")
    damage = GgufDamage(path.read_bytes(), path)
    assert sweep(path, damage.every_byte(), FREE)["flip"] > 1000


@pytest.mark.parametrize("count", COUNTS)
def test_json(count, tmp_path, measured):
    """Fields of the configuration and of the index; or bytes of their files."""
    folder = write_sharded(tmp_path / "hf", LLAMA, llama_tensors())
    scaling = {"factor": 2.0, "original_max_position_embeddings": 64}
    kinds = [
        {"rope_type": "yarn", "beta_fast": 32.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        {"rope_type": "yarn", "beta_slow": 2.0, "attention_factor": 1.5},
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "linear"},
    ]
    also = {"layer_types": ["full_attention"] * 2, "quantization_config": None}
    also |= {"head_dim": 8, "attention_bias": False}
    configs = [
        json.dumps({**LLAMA, "rope_scaling": scaling | x, **also}) for x in kinds
    ]
    names = ("config.json", "model.safetensors.index.json", "generation_config.json")
    index, ends = (folder / names[1]).read_text(), '{"eos_token_id": [1, 2]}'
    texts = dict(zip(names, (configs[0], index, ends), strict=True))
    for name, text in texts.items():
        (folder / name).write_text(text)
    reference = attempt(folder, tmp_path / "out")
    assert reference
    rng, refused = random.Random(0), 0
    for i in range(count):
        name = rng.choice(names)
        text = (rng.choice(configs) if name == names[0] else texts[name]).encode()
        if rng.random() < 0.5:
            record = json.loads(text)
            records = [v for v in record.values() if isinstance(v, dict)]
            inner = rng.choice([record, *records])
            inner[rng.choice([*inner, "extra"])] = json_values(rng)
            changed = json.dumps(record).encode()
        else:
            damage = Damage(text, len(text), [0])
            changed = rng.choice(damage.ways)(rng, text)
        (folder / name).write_bytes(changed)
        try:
            found = attempt(folder, tmp_path / "out")
            refused += not found
            if found:  # whatever the configuration says now, it can be computed
                config, weights = found
                assert_equal(weights, reference[1])
                assert config.rope
                turns = frequencies(config.rope, config.head_dim)
                assert np.isfinite(turns).all() and np.float32(config.rope.scale) > 0
        except BaseException as error:
            error.add_note(f"number {i}: {changed[:300]}")
            raise
        (folder / name).write_bytes(text)
    assert refused > 0.3 * count


def test_sizes_that_nobody_has(tmp_path, measured):
    """Refused before anything of the size is allocated or looped over."""
    huge = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 2**24)
    deep = {"num_hidden_layers": 2**24, "model_type": "mistral", "sliding_window": 8}
    for i, changes in enumerate((huge, {**deep, "architectures": None})):
        folder = write_hf(tmp_path / str(i), {**LLAMA, **changes}, llama_tensors())
        with limits(), pytest.raises(ConversionError, match=r"asks for|between 1 and"):
            convert(folder, tmp_path / "out", progress=False)


def test_files_that_are_mostly_holes(tmp_path, measured):
    """Gigabytes of zeros would make as many empty texts."""
    folder = write_hf(tmp_path / "hf")
    texts = struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**28)
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + texts
    header = struct.pack("<Q", 2**32 - 8) + b"{"
    for path, content, match in (
        (tmp_path / "model.gguf", start, "bytes at byte .* are too many"),
        (folder / "model.safetensors", header, "its header 4294967288"),
        (folder / "config.json", b"{", "has 4294967296 bytes"),
    ):
        path.write_bytes(content)
        os.truncate(path, 2**32)
        source = path if path.suffix == ".gguf" else folder
        with limits(), pytest.raises(ConversionError, match=match):
            open_source(source)
