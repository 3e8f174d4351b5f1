"""One compilation per bucketed size and config; caches are donated."""

import collections
import dataclasses
import re

import jax
import pytest

import polarjax
from polarjax.engine import compiled as programs
from polarjax.engine import steps
from polarjax.mesh.cut import make_mesh, shard
from polarjax.policies import with_learned
from tests.models import LLAMA, random_params
from tests.policies.reference import random_prompts

# A shape of its own, so that no other test has compiled its programs before.
CONFIG = dataclasses.replace(LLAMA, layers=2, neurons=72)
LENGTHS = (3, 11, 1, 7)
DENSITIES = [1.0, 0.5, 0.25, 0.75]

compiled: collections.Counter = collections.Counter()


def _count(event, _seconds, fun_name="", **_):
    if event.endswith("backend_compile_duration"):
        compiled[fun_name] += 1


@pytest.fixture(scope="module", autouse=True)
def _listen():
    jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, routers=True)


@pytest.fixture
def new():
    """Programs that read, decode and draw which were compiled since the last call."""
    names = ("read_pieces", "decode", "draw_tokens")
    before = dict(compiled)

    def taken() -> tuple[int, ...]:
        nonlocal before
        found = [compiled[f"jit({x})"] - before.get(f"jit({x})", 0) for x in names]
        before = dict(compiled)
        return tuple(found)

    return taken


def test_one_compilation_per_bucket_and_config(params, new):
    def generate(prompts, density=DENSITIES, most=18, params=params, **settings):
        polarjax.generate(
            params, prompts, max_new_tokens=most, density=density, **settings
        )

    nothing, drawing = (0, 0, 0), (0, 0, 1)
    prompts = random_prompts(CONFIG, LENGTHS)
    generate(prompts)
    assert new() == (1, 1, 1)
    everything = sum(compiled.values())
    generate(prompts)
    # Other prompts, lengths and limits within the buckets.
    generate(random_prompts(CONFIG, (16, 1, 1, 5), seed=1), most=7)
    generate(random_prompts(CONFIG, (1, 2, 3, 14), seed=2), most=14)
    for most in (6, 7, 9, 12):
        generate(random_prompts(CONFIG, (14, 1, 1, 5), seed=1), most=most)
    # Other densities, other stop tokens, and as many as there may be.
    generate(prompts, [0.25, 1.0, 0.5, 0.01])
    generate(prompts, 0.5)
    for number in (1, 9, 64):
        generate(prompts, stop_ids=list(range(number)))
    assert sum(compiled.values()) == everything and new() == nothing
    # Another checkpoint of the same architecture, in another place.
    other = random_params(CONFIG, 1, routers=True)
    config = dataclasses.replace(
        CONFIG, folder="/nowhere", model_hash="f" * 64, bos_ids=(1,)
    )
    other = dataclasses.replace(other, config=config)
    generate(prompts, params=with_learned(other, budgets=(4, 3)))
    assert new() == nothing
    # Ways of drawing are programs; their settings are not.
    generate(prompts, temperature=0.7)
    assert new() == drawing
    generate(prompts, temperature=[1.5, 0.0, 0.3, 0.7], seed=[4, 3, 2, 1])
    generate(prompts, temperature=0.1, seed=99)
    assert new() == nothing
    generate(prompts, temperature=0.7, top_k=5)
    assert new() == drawing
    generate(prompts, temperature=0.9, top_p=0.5)
    generate(prompts, temperature=[1, 0, 1, 0], top_k=[1, 2, 3, 4], top_p=0.1)
    assert new() == nothing


def test_an_engine_compiles_nothing_after_another_of_its_sizes(params):
    sizes = {"slots": 2, "context": 32, "page": 8, "pages": 6, "prefill_tokens": 16}
    for policy in (polarjax.Polar(0.5), polarjax.Polar(0.25)):
        begun = compiled.copy()
        with polarjax.Engine(params, policy=policy, **sizes) as engine:
            made = compiled.copy()
            asked = polarjax.Settings(max_new_tokens=20, logprobs=3, stop_ids=())
            requests = [engine.add([1] * 5, asked) for _ in range(3)]
            while not engine.idle:
                engine.step()
            assert [one.finish_reason for one in requests] == ["length"] * 3
            assert engine._runner.scheduler.preemptions
        assert compiled == made
    assert made == begun


def arguments(params):
    """Of the programs of an engine: what reads pieces, and what decodes."""
    options = {"slots": 4, "context": 32, "page": 8, "prefill_tokens": 16}
    batch = polarjax.Engine(params, policy=polarjax.Polar(0.5), **options)._runner.batch
    read = params.weights, batch.chunk, batch.slots
    decoded = batch._weights, batch._policy, batch.slots
    return (read, {"model": batch._dense}), (decoded, batch._decoding)


def cache_copies(function, args, static) -> tuple[int, int]:
    """Arrays of the cache that a program takes over, and that it copies."""
    text = function.lower(*args, **static).compile().as_text()
    layout = re.search(r"entry_computation_layout=\{\((.*?)\)->", text)
    aliases = re.search(r"input_output_alias=\{(.*?\) *)\}", text)
    assert layout and aliases
    # Shapes hold commas of their own, and comments number every fifth.
    shapes = re.findall(r"(\w+\[[\d,]*\])", layout[1])
    donated = [int(n) for n in re.findall(r": \((\d+),", aliases[1])]
    cache = f"f32[17,{CONFIG.kv_heads},8,{CONFIG.head_dim}]"  # with the trash page
    assert shapes.count(cache) == 2 * CONFIG.layers
    copies = re.findall(rf"= {re.escape(cache)}\S* copy\(", text)
    return [shapes[n] for n in donated].count(cache), len(copies)


def test_a_step_writes_into_the_cache_that_is_there(params):
    reading, (args, static) = arguments(params)
    assert cache_copies(steps.read_pieces, *reading)[0] == 2 * CONFIG.layers
    assert cache_copies(steps.decode, args, static)[0] == 2 * CONFIG.layers
    # And so it happens: the old buffers are gone, the new ones lie where they lay.
    slots = args[2]
    old = [*slots.cache.keys, *slots.cache.values]
    places = {array.unsafe_buffer_pointer() for array in old}
    now = steps.decode(*args, **static)
    assert all(array.is_deleted() for array in old)
    new = (*now.cache.keys, *now.cache.values)
    assert {array.unsafe_buffer_pointer() for array in new} == places
    # What the next call needs is still there.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(args[0]))


@pytest.mark.parametrize("mesh", [None, (2, 2)], ids=["one device", "mesh"])
@pytest.mark.devices(4)
def test_what_large_programs_are_given_never_moves(params, mesh):
    """Where one array has moved a GPU's graph of hundreds of kernels is edited."""
    options = {"slots": 4, "context": 32, "page": 8, "prefill_tokens": 16}
    policy = polarjax.Polar(0.5)
    model = params if mesh is None else shard(params, make_mesh(*mesh))
    with polarjax.Engine(model, policy=policy, **options) as engine:
        batch = engine._runner.batch

        def places():
            return [
                [
                    shard.data.unsafe_buffer_pointer()
                    for shard in leaf.addressable_shards
                ]
                for leaf in jax.tree.leaves((batch.chunk, batch.slots))
            ]

        # On a CPU the first arrays may be the host's own.
        engine.generate([[1, 2]], max_new_tokens=2, stop_ids=())
        before = places()
        for i in range(5):
            asked = polarjax.Settings(
                max_new_tokens=3 + i, logprobs=2, prompt_logprobs=1, stop_ids=()
            )
            engine.add([1 + i] * (4 + 3 * i), asked)
        while not engine.idle:
            engine.step()
            assert places() == before


def test_no_step_copies_a_cache(params, as_users_do):
    # A copy per step would cost what sparsity saves, though results were the same.
    functions = steps.read_pieces, steps.decode
    for function in functions:
        function.clear_cache()  # other tests compile them otherwise
    for function, given in zip(functions, arguments(params), strict=True):
        assert cache_copies(function, *given)[1] == 0


def test_the_programs_kept_are_bounded_whatever_the_calls(params, monkeypatch):
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 3)
    settings = {"max_new_tokens": 2, "stop_ids": [], "density": 0.5}
    prompts = random_prompts(CONFIG, (3, 5, 2, 7, 1))
    functions = steps.read_pieces, steps.decode, steps.draw_tokens
    alone = [polarjax.generate(params, [ids], **settings).tokens[0] for ids in prompts]
    for batch in range(1, 6):
        output = polarjax.generate(params, prompts[:batch], **settings)
        assert output.tokens == alone[:batch]
        assert max(function._cache_size() for function in functions) <= 3
    # None is dropped for one that is there.
    before = sum(compiled.values())
    polarjax.generate(params, prompts, **settings)
    assert sum(compiled.values()) == before
