"""A batch that cannot fit is refused before anything is allocated."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

import polarjax
from polarjax.engine import steps
from polarjax.engine.chunk import empty_chunk
from polarjax.engine.room import room_for, sizes_of
from polarjax.engine.slots import empty_slots
from polarjax.mesh import cut
from polarjax.model import make_decoder, weight_shapes
from polarjax.planning import memory
from polarjax.planning.host_memory import HostMemory, host_memory
from polarjax.planning.memory import PAGE
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


def test_what_does_not_fit_at_once_waits(params, device):
    device(limit=40_000_000)
    slots, context = room_for(params, [1000] * 64, prefill_tokens=64)
    assert 1 < slots < 64 and context == 1024
    # The pages that there are hold all that go on at once: none gives way.
    pages = memory.pages_that_fit(params, slots, context, PAGE, prefill_tokens=64)
    assert pages > slots * 16
    device(limit=10**12)
    assert room_for(params, [1000] * 64, prefill_tokens=64) == (64, 1024)
    assert room_for(params, [1000] * 33, prefill_tokens=64) == (64, 1024)
    assert room_for(params, [9] * 10_000, prefill_tokens=64) == (512, 16)
    # Short ones count as what they are, beside one that is long.
    device(limit=40_000_000)
    many, _ = room_for(params, [1000, *[60] * 63], prefill_tokens=64)
    assert many == 64


def test_what_can_never_fit_is_refused_and_what_would_is_named(params, device):
    device(limit=10_000_000, in_use=8_000_000)
    with pytest.raises(ValueError) as caught:
        polarjax.generate(params, [[1, 2, 3]] * 9, max_new_tokens=2000)
    message = str(caught.value)
    assert "a request of 2048 tokens needs 33 pages of 64" in message
    assert "polarjax plan" in message and "(memory_fraction 0.95)" in message
    fits = int(re.findall(r": a context of (\d+) would fit", message)[0])
    # What it says would fit does, and a little more does not.
    options = {"slots": 1, "page": PAGE, "pages": None, "memory_fraction": 0.95}
    options["prefill_tokens"] = 32
    assert sizes_of(params, context=fits, **options).pages > 1
    with pytest.raises(ValueError, match="needs"):
        sizes_of(params, context=fits + 1, **options)


def test_the_fraction_is_a_setting(params, device):
    device(limit=4_000_000)
    prompts = [[1, 2, 3]]
    polarjax.generate(params, prompts, max_new_tokens=2)
    with pytest.raises(ValueError, match="not one page would fit"):
        polarjax.generate(params, prompts, max_new_tokens=2, memory_fraction=0.01)
    with pytest.raises(ValueError, match="memory_fraction must be above 0"):
        polarjax.generate(params, prompts, max_new_tokens=2, memory_fraction=0)


def reading(params, tokens, slots=2, context=256):
    """Bytes that XLA takes to read so many tokens, and what is expected of it."""
    model = make_decoder(params.config, params.weights)
    batch = empty_slots(model, slots, context, 9, PAGE, params.weights)
    chunk = empty_chunk(model, tokens, slots, params.weights)
    program = steps.read_pieces.lower(params.weights, chunk, batch, model=model)
    found = program.compile().memory_analysis()
    own = cut.local_config(params.config, model.share.tp)
    expected = memory.prefill_bytes(own, tokens, jnp.float32)
    assert found.output_size_in_bytes - found.alias_size_in_bytes < 4096
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(chunk))
    return (
        found.temp_size_in_bytes + held,
        expected + memory.sampling_bytes(params.config, slots),
    )


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
    taken, expected = reading(random_params(config), 256)
    assert taken < expected < 4 * taken


@pytest.mark.devices(4)
def test_the_estimate_is_above_what_xla_takes_of_each_device(device):
    if jax.default_backend() == "gpu":
        pytest.skip("needs a CPU (JAX_PLATFORMS=cpu): a GPU's libraries take more")
    config = dataclasses.replace(CONFIG, dim=256, vocab_size=4096)
    params = cut.shard(random_params(config), cut.make_mesh(4))
    taken, expected = reading(params, 256)
    assert taken < expected < 4 * taken


@pytest.mark.parametrize(("kv_heads", "share"), [(4, 2), (3, 1)])
@pytest.mark.devices(2)
def test_a_cache_that_is_not_cut_counts_whole_on_every_device(kv_heads, share, device):
    config = dataclasses.replace(CONFIG, heads=12, kv_heads=kv_heads)
    params = cut.shard(random_params(config), cut.make_mesh(2))
    whole = memory.cache_bytes(config, 1000, 1024, params.dtype)
    device(limit=int(1.2 * whole / share))
    assert pages(params) == 1000 * 16 + 1
    device(limit=int(0.9 * whole / share))
    assert pages(params) < 1000 * 16


def pages(params):
    return memory.pages_that_fit(params, 1000, 1024, PAGE, prefill_tokens=64)


@pytest.fixture
def machine(monkeypatch):
    """A CPU of so much memory."""
    if jax.default_backend() != "cpu":
        pytest.skip("needs a CPU (JAX_PLATFORMS=cpu): its memory is the machine's")

    def tell(limit, in_use=0):
        monkeypatch.setattr(memory, "host_memory", lambda: HostMemory(limit, in_use))

    return tell


def test_what_others_hold_of_a_machine_is_not_left_free_once_more(params, machine):
    machine(limit=512 << 30, in_use=488 << 30)
    dense = polarjax.Dense()
    assert polarjax.generate(params, [[1, 2, 3]], max_new_tokens=2, policy=dense).tokens


def refused(params, prompts, **settings):
    with pytest.raises(ValueError) as caught:
        polarjax.generate(params, prompts, **settings)
    message = str(caught.value)
    assert "\n" not in message and "polarjax plan" in message
    return message


def test_a_cpu_refuses_what_its_machine_has_no_room_for(params, machine):
    machine(limit=8_000_000, in_use=6_000_000)
    message = refused(params, [[1] * 4000] * 9, max_new_tokens=9)
    assert "a request of 4032 tokens needs" in message
    assert "0 GB left (memory_fraction 0.95): a context of " in message
    machine(limit=8_000_000_000, in_use=8_000_000_000)
    message = refused(params, [[1]], max_new_tokens=9, memory_fraction=0.7)
    assert "0 GB left (memory_fraction 0.7): not one page" in message


def test_this_machine_has_no_room_for_everything(params):
    found = host_memory()
    if found is None:
        pytest.skip("needs a machine that says what memory it has (Linux)")
    assert 0 < found.in_use < found.limit
    config = dataclasses.replace(CONFIG, context=2**24)
    large = dataclasses.replace(params, config=config)
    message = refused(large, [[1]], max_new_tokens=2**24, memory_fraction=1e-3)
    assert "a request of 16777216 tokens needs" in message


@pytest.mark.devices(4)
def test_host_devices_share_the_machine(machine):
    config = dataclasses.replace(CONFIG, heads=12, kv_heads=4)
    params = cut.shard(random_params(config), cut.make_mesh(4))
    needed = memory.cache_bytes(config, 1000, 1024, params.dtype)
    machine(limit=int(2.4 * needed))
    assert pages(params) == 1000 * 16 + 1
    machine(limit=int(0.9 * needed))
    assert pages(params) < 1000 * 16


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
    bound, model = polarjax.Dense().bind(params)[1], make_decoder(config, weights)
    slots = empty_slots(model, batch, capacity, batch * 16 + 1, PAGE, weights)
    compiled = steps.decode.lower(weights, bound, slots, model=model).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    estimate = memory.cpu_step_bytes(config, batch, capacity, dtype, held)
    estimate += memory.sampling_bytes(config, batch)
    assert taken < estimate < 4 * taken
    # No copy of the whole cache, such as one in float32.
    assert taken < 0.9 * memory.cache_bytes(config, batch, capacity, dtype)


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
