"""A batch that cannot fit is refused before anything is allocated."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

import polarjax
from polarjax import sharding
from polarjax.cache import KVCache
from polarjax.generation import loop, memory, places
from polarjax.model import weight_shapes
from tests.models import LLAMA, random_params

CONFIG = dataclasses.replace(LLAMA, layers=2, context=4096)


@pytest.fixture
def params():
    return random_params(CONFIG)


@pytest.fixture
def device(monkeypatch):
    """Make the CPU tell how much memory it has."""

    def tell(limit, in_use=0):
        stats = {"bytes_limit": limit, "bytes_in_use": in_use}
        kind = type(jax.devices()[0])
        monkeypatch.setattr(kind, "memory_stats", lambda self: stats)

    return tell


def test_generate_refuses_and_names_what_fits(params, device, monkeypatch):
    allocated = []
    monkeypatch.setattr(loop, "prefill", lambda *a, **k: allocated.append(a))
    device(limit=4_000_000_000, in_use=1_000_000_000)
    prompts = [[1, 2, 3]] * 2000
    with pytest.raises(ValueError) as caught:
        polarjax.generate(params, prompts, max_new_tokens=2000)
    message = str(caught.value)
    assert not allocated
    cache = 2000 * 2048 * 2 * 2 * CONFIG.kv_heads * CONFIG.head_dim * 4
    needed = float(re.findall(r"needs ([\d.]+) GB", message)[0]) * 1e9
    assert cache < needed < 1.1 * cache
    assert "batch 2000 with 2048 tokens" in message and "polarjax plan" in message
    assert "2.80 GB left (memory_fraction 0.95)" in message
    # What it says would fit does, and a little more does not.
    smaller = int(re.findall(r"batch (\d+) or", message)[0])
    shorter = int(re.findall(r"max_new_tokens=(\d+) would", message)[0])
    # Prefill takes the same of both.
    assert smaller == pytest.approx(2000 * 2.8e9 / needed, rel=0.03)
    assert shorter == pytest.approx(2048 * 2.8e9 / needed, rel=0.06)
    assert (shorter + 3) % 64 == 0

    def fits(batch, new):
        try:
            polarjax.generate(params, prompts[:batch], max_new_tokens=new)
        except ValueError:
            return False
        except AttributeError:  # prefill is nothing to compile here
            return True
        raise AssertionError

    assert fits(smaller, 2000) and not fits(smaller + 1, 2000)
    assert fits(2000, shorter) and not fits(2000, shorter + 1)


def test_the_fraction_is_a_setting(params, device):
    device(limit=2_000_000)
    prompts = [[1, 2, 3]]
    polarjax.generate(params, prompts, max_new_tokens=2)
    with pytest.raises(ValueError, match="not even batch 1 would fit"):
        polarjax.generate(params, prompts, max_new_tokens=2, memory_fraction=0.01)
    with pytest.raises(ValueError, match="memory_fraction must be above 0"):
        polarjax.generate(params, prompts, max_new_tokens=2, memory_fraction=0)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"neurons": 2048},
        {"heads": 32, "kv_heads": 32},
        {"gated_mlp": False, "activation": "relu", "neurons": 1024},
    ],
)
def test_the_estimate_is_above_what_xla_takes(change):
    if jax.default_backend() == "gpu":
        pytest.skip("needs a CPU (JAX_PLATFORMS=cpu): a GPU's libraries take more")
    config = dataclasses.replace(CONFIG, dim=256, vocab_size=4096, **change)
    batch, width = 2, 256
    spec = jax.ShapeDtypeStruct
    numbers = spec((batch,), jnp.int32)
    cache = jax.eval_shape(lambda: KVCache.empty(config, batch, width, jnp.float32))
    compiled = loop.prefill.lower(
        weight_shapes(config, jnp.float32),
        spec((batch, width), jnp.int32),
        *(numbers, numbers, cache, spec((batch, config.vocab_size), jnp.float32)),
        config=config,
        most=2**14,
        implementation=None,
    ).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    estimate = memory.prefill_bytes(
        *(config, batch, width, jnp.float32), platform="cpu", prefill_tokens=2**14
    ) + memory.sampling_bytes(config, batch)
    assert taken < estimate < 4 * taken


@pytest.mark.devices(4)
def test_the_estimate_is_above_what_xla_takes_of_each_device(device):
    if jax.default_backend() == "gpu":
        pytest.skip("needs a CPU (JAX_PLATFORMS=cpu): a GPU's libraries take more")
    config = dataclasses.replace(CONFIG, dim=256, vocab_size=4096)
    batch, width, mesh = 2, 256, sharding.make_mesh(4)
    params = sharding.shard(random_params(config), mesh)
    numbers = jnp.arange(batch, dtype=jnp.int32)
    compiled = loop.prefill.lower(
        *(params.weights, jnp.zeros((batch, width), jnp.int32), numbers, numbers),
        places.empty_cache(config, batch, width, jnp.float32, mesh),
        jnp.zeros((batch, config.vocab_size)),
        **{"config": config, "most": 2**14, "implementation": None, "mesh": mesh},
    ).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    estimate = memory.prefill_bytes(
        *(sharding.local_config(config, 4), batch, width, jnp.float32),
        platform="cpu",
        prefill_tokens=2**14,
    ) + memory.sampling_bytes(config, batch)
    assert taken < estimate < 4 * taken
    needs = estimate + memory.cache_bytes(config, batch, width, jnp.float32) // 4
    fits = {"prefill_tokens": 2**14, "prompt_tokens": width, "memory_fraction": 1.0}
    device(limit=needs)
    assert memory.cache_capacity(params, batch, width, **fits) == width
    device(limit=needs - 1)
    with pytest.raises(ValueError, match="needs"):
        memory.cache_capacity(params, batch, width, **fits)


def test_few_tokens_at_once_need_less():
    def needed(prefill_tokens):
        return memory.prefill_bytes(
            *(CONFIG, 64, 1024, jnp.bfloat16),
            platform="gpu",
            prefill_tokens=prefill_tokens,
        )

    assert needed(64 * 1024) == 64 * needed(1024) > 64 * needed(512)
    assert needed(10**9) == needed(64 * 1024)


def test_where_memory_is_short_the_cache_is_no_power_of_two(params, device):
    def capacity(limit):
        device(limit=limit)
        return memory.cache_capacity(
            *(params, 1000, 1030), prefill_tokens=1024, prompt_tokens=30
        )

    row = memory.cache_bytes(CONFIG, 1000, 1, params.dtype)
    assert capacity(3000 * row) == 2048
    assert capacity(1500 * row) == 1088


@pytest.mark.parametrize(("kv_heads", "share"), [(4, 2), (3, 1)])
@pytest.mark.devices(2)
def test_a_cache_that_is_not_cut_counts_whole_on_every_device(kv_heads, share, device):
    config = dataclasses.replace(CONFIG, heads=12, kv_heads=kv_heads)
    params = sharding.shard(random_params(config), sharding.make_mesh(2))
    row = memory.cache_bytes(config, 1000, 1, params.dtype)
    fits = {"prefill_tokens": 64, "prompt_tokens": 30}
    device(limit=int(1.2 * 1024 * row / share))
    assert memory.cache_capacity(params, 1000, 1024, **fits) == 1024
    device(limit=int(1.0 * 1024 * row / share))
    with pytest.raises(ValueError, match="needs"):
        memory.cache_capacity(params, 1000, 1024, **fits)
