"""What `load` opens, damaged: refused in one line, or the same model.

A checkpoint and an adapter, each file of them: bytes of it, fields of its JSON, its
header, and things in its place that are no files. Half of the damage stands under right
checksums, as if someone had written it so.
"""

import dataclasses
import json
import random
import resource
import shutil

import jax
import numpy as np
import pytest

import polarjax
from polarjax.engine import Tokenizer
from polarjax.model.positions import frequencies
from polarjax.policies import read_card, save_adapter
from tests.convert.damage import (
    Damage,
    SafetensorsDamage,
    json_values,
    limits,
)
from tests.models import LLAMA, random_params, write_checkpoint
from tests.seal import seal
from tests.storage.test_files import KINDS, replace

CONFIG = dataclasses.replace(
    LLAMA,
    layers=2,
    qk_norm=True,  # a weight of few entries
    windows=(0, 16),
    eos_ids=(256,),
    bos_ids=(1,),
    model_hash="ab" * 32,
)
BUDGETS = (4, 2.5)
JSON = ("config.json", "checksums.json", "tokenizer.json", "card.json")
TENSORS = ("tensors-00001.safetensors", "routers.safetensors")
TEXTS = ("tokenizer.json", "chat_template.jinja")  # that have no checksum


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with routers of its own, and an adapter of other weights' file."""
    folder = tmp_path_factory.mktemp("whole")
    params = random_params(
        CONFIG,
        routers=True,
        head_rank=3,
        budgets=BUDGETS,
        adaptive=True,
        thresholds=(0.0, 0.5),
    )
    params = write_checkpoint(folder / "model", params)
    other = dataclasses.replace(params.config, model_hash="cd" * 32)
    card = {"tokens": 9, "contract": {"verdict": "kept"}, "texts": [{"name": "a"}]}
    save_adapter(folder / "adapter", dataclasses.replace(params, config=other), card)
    return folder


def mutate(rng: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith(".safetensors"):
        return rng.choice(SafetensorsDamage(content).ways)(rng, content)
    if name in JSON and rng.random() < 0.6:
        record = json.loads(content)
        records = [record, *(v for v in record.values() if isinstance(v, dict))]
        inner = rng.choice(records)
        key = rng.choice([*inner, "extra"])
        match rng.randrange(4):
            case 0:
                inner.pop(key, None)
            case 1:
                inner[key[:-1] + "_"] = inner.pop(key, 0)
            case 2 if isinstance(inner.get(key), list) and inner[key]:
                inner[key][rng.randrange(len(inner[key]))] = json_values(rng)
            case _:
                inner[key] = json_values(rng)
        return json.dumps(record).encode()
    return rng.choice(Damage(content, len(content), [0]).ways)(rng, content)


def attempt(folder) -> polarjax.Params | None:
    """What `load` makes of it within the limits; None if it refuses as it should."""
    try:
        with limits(30):  # some of it compiles
            params = polarjax.load(folder / "model", adapter=folder / "adapter")
            polarjax.load(folder / "model")
            read_card(folder / "adapter")
            tokenizer = Tokenizer.load(params.config)
            if tokenizer:
                tokenizer.decode(tokenizer.encode("some words"))
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1200, text
        assert str(folder) in text, text
        return None
    return params


def leaves(params):
    return jax.tree.leaves((params.weights, params.routers))


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_what_load_opens(count, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "both")
    reference = attempt(folder)
    assert reference and reference.policy.learned.budgets == BUDGETS
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == 9
    names = sorted(folder.rglob("*"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng, refused, generated = random.Random(0), 0, {reference.config.architecture}
    for i in range(count):
        path = files[i % len(files)]
        content = path.read_bytes()
        sums = path.with_name("checksums.json")
        sealed, right = path != sums and rng.random() < 0.5, sums.read_bytes()
        changed = content
        try:
            if rng.random() < 0.15:
                replace(path, rng.choice(KINDS))
                sealed = False
            else:
                changed = mutate(rng, path.name, content)
                path.write_bytes(changed)
            if sealed:
                seal(path.parent)
            found = attempt(folder)
            refused += not found
            if found and not sealed and path.name not in TEXTS:
                assert changed == content or path == sums
            if found:
                assert [x.shape for x in leaves(found)] == [
                    x.shape for x in leaves(reference)
                ]
                works(found, generated, count)
            if found and not sealed:
                for a, b in zip(leaves(found), leaves(reference), strict=True):
                    np.testing.assert_array_equal(a, b)
        except BaseException as error:
            error.add_note(f"number {i}, {path.name}, sealed {sealed}: {changed[:300]}")
            raise
        finally:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            sums.write_bytes(right)
        assert sorted(folder.rglob("*")) == names
    assert refused > 0.6 * count and attempt(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 1 << 30


def works(params, generated, count):
    """Whatever the configuration says now, it can be computed."""
    config = params.config
    assert config.rope
    turns = frequencies(config.rope, config.head_dim, config.context)
    assert np.isfinite(turns).all()
    new = config.architecture not in generated and config.context > 8
    if new and len(generated) < count // 100:
        generated.add(config.architecture)
        out = polarjax.generate(params, [[1, 2, 3]], max_new_tokens=2)
        assert len(out.tokens[0]) <= 2
