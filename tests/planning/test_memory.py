"""A batch that cannot fit is refused before anything is allocated."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

import polarjax
from polarjax.cache import PagedCache
from polarjax.engine import places, prefill, programs
from polarjax.engine.checks import Settings, make_sampling
from polarjax.engine.sampling import Variant
from polarjax.mesh import cut
from polarjax.model import make_decoder, weight_shapes
from polarjax.planning import memory
from polarjax.planning.host_memory import HostMemory, host_memory
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
    monkeypatch.setattr(prefill, "prefill", lambda *a, **k: allocated.append(a))
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
def test_the_estimate_is_above_what_xla_takes(change, as_users_do):
    if jax.default_backend() == "gpu":
        pytest.skip("needs a CPU (JAX_PLATFORMS=cpu): a GPU's libraries take more")
    config = dataclasses.replace(CONFIG, dim=256, vocab_size=4096, **change)
    batch, width = 2, 256
    spec = jax.ShapeDtypeStruct
    numbers = spec((batch,), jnp.int32)
    cache = jax.eval_shape(lambda: PagedCache.empty(config, batch, width, jnp.float32))
    weights = weight_shapes(config, jnp.float32)
    compiled = prefill.prefill.lower(
        weights,
        spec((batch, width), jnp.int32),
        numbers,
        numbers,
        cache,
        spec((batch, config.vocab_size), jnp.float32),
        model=make_decoder(config, weights),
        prefill_tokens=2**14,
    ).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    estimate = memory.prefill_bytes(
        config, batch, width, jnp.float32, platform="cpu", prefill_tokens=2**14
    ) + memory.sampling_bytes(config, batch)
    assert taken < estimate < 4 * taken


@pytest.mark.devices(4)
def test_the_estimate_is_above_what_xla_takes_of_each_device(device):
    if jax.default_backend() == "gpu":
        pytest.skip("needs a CPU (JAX_PLATFORMS=cpu): a GPU's libraries take more")
    config = dataclasses.replace(CONFIG, dim=256, vocab_size=4096)
    batch, width = 2, 256
    params = cut.shard(random_params(config), cut.make_mesh(4))
    model = make_decoder(config, params.weights)
    numbers = jnp.arange(batch, dtype=jnp.int32)
    compiled = prefill.prefill.lower(
        params.weights,
        jnp.zeros((batch, width), jnp.int32),
        numbers,
        numbers,
        places.empty_cache(model, batch, width),
        jnp.zeros((batch, config.vocab_size)),
        model=model,
        prefill_tokens=2**14,
    ).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    estimate = memory.prefill_bytes(
        cut.local_config(config, 4),
        batch,
        width,
        jnp.float32,
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
            CONFIG,
            64,
            1024,
            jnp.bfloat16,
            platform="gpu",
            prefill_tokens=prefill_tokens,
        )

    # Of short prompts half as many are read at once as there is room for.
    assert needed(64 * 1024) == 32 * needed(1024) > 32 * needed(512)
    assert needed(10**9) == needed(128 * 1024) == 64 * needed(1024)


def test_where_memory_is_short_the_cache_is_no_power_of_two(params, device):
    def capacity(limit):
        device(limit=limit)
        return memory.cache_capacity(
            params, 1000, 1030, prefill_tokens=1024, prompt_tokens=30
        )

    row = memory.cache_bytes(CONFIG, 1000, 1, params.dtype)
    assert capacity(3000 * row) == 2048
    assert capacity(1500 * row) == 1088


@pytest.mark.parametrize(("kv_heads", "share"), [(4, 2), (3, 1)])
@pytest.mark.devices(2)
def test_a_cache_that_is_not_cut_counts_whole_on_every_device(kv_heads, share, device):
    config = dataclasses.replace(CONFIG, heads=12, kv_heads=kv_heads)
    params = cut.shard(random_params(config), cut.make_mesh(2))
    row = memory.cache_bytes(config, 1000, 1, params.dtype)
    fits = {"prefill_tokens": 64, "prompt_tokens": 30}
    device(limit=int(1.2 * 1024 * row / share))
    assert memory.cache_capacity(params, 1000, 1024, **fits) == 1024
    device(limit=int(1.0 * 1024 * row / share))
    with pytest.raises(ValueError, match="needs"):
        memory.cache_capacity(params, 1000, 1024, **fits)


@pytest.fixture
def machine(monkeypatch):
    """A CPU of so much memory."""
    if jax.default_backend() != "cpu":
        pytest.skip("needs a CPU (JAX_PLATFORMS=cpu): its memory is the machine's")

    def tell(limit, in_use=0):
        monkeypatch.setattr(memory, "host_memory", lambda: HostMemory(limit, in_use))

    return tell


@pytest.fixture
def nothing_runs(monkeypatch):
    def run(*_, **__):
        raise AssertionError("something was allocated")

    monkeypatch.setattr(prefill, "read_prompts", run)


def refused(params, prompts, **settings):
    with pytest.raises(ValueError) as caught:
        polarjax.generate(params, prompts, **settings)
    message = str(caught.value)
    assert "\n" not in message and "polarjax plan" in message
    return message


def test_what_others_hold_of_a_machine_is_not_left_free_once_more(params, machine):
    machine(limit=512 << 30, in_use=488 << 30)
    dense = polarjax.Dense()
    assert polarjax.generate(params, [[1, 2, 3]], max_new_tokens=2, policy=dense).tokens


def test_a_cpu_refuses_what_its_machine_has_no_room_for(params, machine, nothing_runs):
    machine(limit=8_000_000_000, in_use=6_000_000_000)
    message = refused(params, [[1, 2, 3]] * 100_000, max_new_tokens=1000)
    assert "batch 100000 with 1024 tokens of context needs" in message
    assert "1.90 GB left (memory_fraction 0.95): batch " in message
    smaller = int(re.findall(r"batch (\d+)(?: or .*)? would fit", message)[0])

    def fits(batch):
        try:
            polarjax.generate(params, [[1, 2, 3]] * batch, max_new_tokens=1000)
        except ValueError:
            return False
        except AssertionError:
            return True

    assert fits(smaller) and not fits(smaller + 1)
    message = refused(params, [[1] * 4000] * 1000, max_new_tokens=9)
    assert "batch 1000 with 4032 tokens" in message
    machine(limit=8_000_000_000, in_use=8_000_000_000)
    message = refused(params, [[1]], max_new_tokens=9, memory_fraction=0.7)
    assert "0.00 GB left (memory_fraction 0.7): not even batch 1" in message


def test_this_machine_has_no_room_for_everything(params, nothing_runs):
    found = host_memory()
    if found is None:
        pytest.skip("needs a machine that says what memory it has (Linux)")
    assert 0 < found.in_use < found.limit
    config = dataclasses.replace(CONFIG, context=2**20)
    large = dataclasses.replace(params, config=config)
    message = refused(large, [[1]] * 100_000, max_new_tokens=2**20)
    assert "batch 100000 with 1048576 tokens" in message


@pytest.mark.devices(4)
def test_host_devices_share_the_machine(machine):
    config = dataclasses.replace(CONFIG, heads=12, kv_heads=4)
    params = cut.shard(random_params(config), cut.make_mesh(4))
    fits = {"prefill_tokens": 64, "prompt_tokens": 30}
    needed = memory.cache_bytes(config, 1000, 1024, params.dtype)
    machine(limit=int(1.8 * needed))
    assert memory.cache_capacity(params, 1000, 1024, **fits) == 1024
    machine(limit=int(1.2 * needed))
    with pytest.raises(ValueError, match="needs"):
        memory.cache_capacity(params, 1000, 1024, **fits)


@pytest.mark.parametrize(
    ("dtype", "layers"), [(jnp.float32, 4), (jnp.bfloat16, 4), (jnp.bfloat16, 9)]
)
def test_the_estimate_of_a_cpus_step_is_above_what_xla_takes(
    dtype, layers, as_users_do
):
    if jax.default_backend() == "gpu":
        pytest.skip("needs a CPU (JAX_PLATFORMS=cpu), which it is of")
    config, batch, capacity = dataclasses.replace(CONFIG, layers=layers), 64, 1024
    shapes = weight_shapes(config, dtype)
    weights = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shapes)
    params = polarjax.Params(weights, polarjax.Dense(), config)
    bound = polarjax.Dense().bind(params)[1]
    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    live = jax.ShapeDtypeStruct((batch,), bool)
    cache = jax.eval_shape(lambda: PagedCache.empty(config, batch, capacity, dtype))
    compiled = programs.decode_chunk.lower(
        weights,
        bound,
        programs.State(cache, numbers, live, numbers),
        live,
        programs.SlotData(
            jax.ShapeDtypeStruct((batch,), jnp.float32),
            make_sampling(config, [Settings()] * batch),
            jax.ShapeDtypeStruct((batch, 8), jnp.int32),
            Variant.GREEDY,
        ),
        jax.ShapeDtypeStruct((), jnp.int32),
        model=make_decoder(config.architecture, weights),
        steps=16,
    ).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    estimate = memory.cpu_step_bytes(config, batch, capacity, dtype, held)
    estimate += memory.sampling_bytes(config, batch)
    assert taken < estimate < 4 * taken
    # No copy of the whole cache, such as one in float32.
    assert taken < 0.75 * memory.cache_bytes(config, batch, capacity, dtype)


def test_what_the_machine_says(tmp_path):
    assert host_memory(str(tmp_path)) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    info = "MemTotal:  1000 kB\nMemFree:  1 kB\nMemAvailable:  600 kB\n"
    (tmp_path / "proc/meminfo").write_text(info)
    assert host_memory(str(tmp_path)) == HostMemory(1000 << 10, 400 << 10)
    # Version 2: a group above has the limit.
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    folder = tmp_path / "sys/fs/cgroup/a/b"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("max\n")
    (folder / "memory.current").write_text("5\n")
    (folder.parent / "memory.max").write_text("500000\n")
    (folder.parent / "memory.current").write_text("300000\n")
    (folder.parent / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert host_memory(str(tmp_path)) == HostMemory(500_000, 200_000)
    # Version 1, in a container: the path is the host's.
    (tmp_path / "proc/self/cgroup").write_text("4:cpu:/x\n3:memory:/host/only\n")
    folder = tmp_path / "sys/fs/cgroup/memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("400000\n")
    (folder / "memory.usage_in_bytes").write_text("100000\n")
    assert host_memory(str(tmp_path)) == HostMemory(400_000, 100_000)
    # What the machine itself has left may be less.
    (tmp_path / "proc/meminfo").write_text(info.replace(" 600", " 100"))
    assert host_memory(str(tmp_path)) == HostMemory(400_000, 400_000 - (100 << 10))


def test_pages_are_as_many_as_fit(monkeypatch):
    params = random_params(CONFIG)

    def pages(free, slots=4, context=40, page=16):
        monkeypatch.setattr(memory, "_free", lambda *_: (free, False))
        return memory.pages_that_fit(params, slots, context, page, prefill_tokens=16)

    # Three pages for each of four slots, and the trash page.
    assert pages(float("inf")) == pages(1e12) == 13
    one = memory.cache_bytes(CONFIG, 1, 16, params.dtype)
    with pytest.raises(ValueError, match="a request of 40 tokens needs 4 pages of 16"):
        pages(0)
    least = next(n for n in range(0, 10**9, one // 4) if _fits(pages, n))
    assert pages(least) == 4 and pages(least + 2 * one) == 6
    # 2**31 elements: the kernels count no further.
    assert (
        memory.most_pages(CONFIG, 16) * CONFIG.kv_heads * 16 * CONFIG.head_dim < 2**31
    )


def _fits(pages, free):
    with contextlib.suppress(ValueError):
        return pages(free) > 0
    return False
