"""One compilation per batch size, bucketed length and config; caches are donated."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.cache import PagedCache
from polarjax.engine import clock, prefill, programs
from polarjax.engine.checks import Settings, make_sampling, stop_table, variant_of
from polarjax.model import make_decoder
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
def traced(monkeypatch):
    """How often programs are compiled, and those that sample are traced."""
    counts: collections.Counter = collections.Counter()
    draw = programs.draw

    def counting(*args, **kwargs):
        counts["traces"] += 1
        return draw(*args, **kwargs)

    monkeypatch.setattr(programs, "draw", counting)
    before = dict(compiled)

    def taken() -> tuple[int, int, int]:
        """Traces, and compilations of prefill and of decode, since the last call."""
        nonlocal before
        names = ("jit(prefill)", "jit(decode_chunk)")
        new = (compiled[name] - before.get(name, 0) for name in names)
        result = (counts["traces"], *new)
        counts.clear()
        before = dict(compiled)
        return result

    return taken


def test_one_compilation_per_batch_bucket_and_config(params, traced):
    def generate(prompts, density=DENSITIES, new=18, params=params, **settings):
        polarjax.generate(
            params, prompts, max_new_tokens=new, density=density, **settings
        )

    prompts = random_prompts(CONFIG, LENGTHS)
    generate(prompts)
    # Compiled once each, although compilation is timed apart from the call; the first
    # token is drawn by a program of its own.
    assert traced() == (2, 1, 1)
    generate(prompts)
    assert traced() == (0, 0, 0)
    # Other prompts, lengths and limits within the bucket.
    few = 10 if jax.default_backend() == "gpu" else 7  # there a power of two
    generate(random_prompts(CONFIG, (16, 1, 1, 5), seed=1), new=few)
    generate(random_prompts(CONFIG, (1, 2, 3, 4), seed=2), new=14)
    assert traced() == (0, 0, 0)
    # Other densities with the same largest budget, other stop tokens.
    generate(prompts, [0.25, 1.0, 0.5, 0.01])
    generate(prompts, stop_ids=[7])
    assert traced() == (0, 0, 0)
    # Other numbers of them; then more than a program is made for.
    for number in range(9):
        generate(prompts, stop_ids=list(range(number)))
    assert traced() == (0, 0, 0)
    generate(prompts, stop_ids=list(range(9)))
    assert traced() == (2, 0, 1)
    generate(prompts, stop_ids=list(range(16)))
    assert traced() == (0, 0, 0)
    # Limits below the chunk: no step more than they need, and no other program. A GPU,
    # which takes whole chunks, has one for each power of two.
    for most in (10, 12) if jax.default_backend() == "gpu" else (6, 7, 9, 12):
        generate(prompts, new=most)
    assert traced() == (0, 0, 0)
    # Another checkpoint of the same architecture, in another place.
    other = random_params(CONFIG, 1, routers=True)
    config = dataclasses.replace(
        CONFIG, folder="/nowhere", model_hash="f" * 64, bos_ids=(1,)
    )
    other = dataclasses.replace(other, config=config)
    generate(prompts, params=with_learned(other, budgets=(4, 3)))
    assert traced() == (0, 0, 0)
    # Densities are data, whatever the largest is.
    generate(prompts, 0.5)
    generate(prompts, [0.5, 0.25, 0.25, 0.5])
    assert traced() == (0, 0, 0)
    # Sampling is another program; its settings are not.
    generate(prompts, temperature=0.7)
    assert traced() == (2, 0, 1)
    generate(prompts, temperature=[1.5, 0.0, 0.3, 0.7], seed=[4, 3, 2, 1])
    generate(prompts, temperature=0.1, seed=99)
    assert traced() == (0, 0, 0)
    generate(prompts, temperature=0.7, top_k=5)
    assert traced() == (2, 0, 1)
    generate(prompts, temperature=0.9, top_p=0.5)
    generate(prompts, temperature=[1, 0, 1, 0], top_k=[1, 2, 3, 4], top_p=0.1)
    assert traced() == (0, 0, 0)


def decode_arguments(params, batch=4, capacity=32):
    weights, bound = polarjax.Polar(0.5).bind(params)
    settings = [Settings(stop_ids=())] * batch
    asked = programs.SlotData(
        jnp.zeros(batch),
        make_sampling(CONFIG, settings),
        stop_table(settings),
        variant_of(settings),
    )
    model = make_decoder(CONFIG.architecture, params.weights)
    state, logits = programs.empty_state(model, batch, capacity, params.weights)
    prompts = {row: [1] * 9 for row in range(batch)}
    cache, logits = prefill.read_prompts(
        params.weights, prompts, state.cache, logits, model=model
    )
    state = dataclasses.replace(state, cache=cache)
    every, remaining = jnp.ones(batch, bool), jnp.full(batch, 9)
    state, _ = programs.first_token(state, logits, every, remaining, asked)
    args = (weights, bound, state, every, asked)
    return args, {"steps": 16, "model": model.clone(score_rows=bound.wants.scores)}


def prefill_arguments(params, batch=4, capacity=32):
    """Of a call that reads two prompts of the batch."""
    cache = PagedCache.empty(CONFIG, batch, capacity, jnp.float32)
    logits = jnp.zeros((batch, CONFIG.vocab_size))
    tokens = np.ones((2, 16), np.int32)
    numbers = np.array([9, 3], np.int32), np.array([2, 0], np.int32)
    model = make_decoder(CONFIG.architecture, params.weights)
    args = params.weights, tokens, *numbers, cache, logits
    return args, {"prefill_tokens": 64, "model": model}


def cache_copies(function, args, kwargs) -> tuple[str, int, int]:
    """The compiled program; its caches that are donated, and that are copied."""
    text = function.lower(*args, **kwargs).compile().as_text()
    layout = re.search(r"entry_computation_layout=\{\((.*?)\)->", text)
    aliases = re.search(r"input_output_alias=\{(.*?\) *)\}", text)
    assert layout and aliases
    # Shapes hold commas of their own, and comments number every fifth.
    shapes = re.findall(r"(\w+\[[\d,]*\])", layout[1])
    donated = [int(n) for n in re.findall(r": \((\d+),", aliases[1])]
    cache = f"f32[4,{CONFIG.kv_heads},32,{CONFIG.head_dim}]"
    assert shapes.count(cache) == 2 * CONFIG.layers
    copies = re.findall(rf"= {re.escape(cache)}\S* copy\(", text)
    return text, [shapes[n] for n in donated].count(cache), len(copies)


def test_caches_are_donated(params):
    args, kwargs = decode_arguments(params)
    state = args[2]
    assert cache_copies(programs.decode_chunk, args, kwargs)[1] == 2 * CONFIG.layers
    # And so it happens: the old buffers are gone, the new ones lie where they lay.
    old = [*state.cache.keys, *state.cache.values]
    places = {array.unsafe_buffer_pointer() for array in old}
    new, _ = programs.decode_chunk(*args, **kwargs)
    assert all(array.is_deleted() for array in old)
    now = {a.unsafe_buffer_pointer() for a in (*new.cache.keys, *new.cache.values)}
    assert now == places
    # What the next call needs is still there.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(args[0]))
    assert np.asarray(new.cache.lengths).tolist() == [17] * 4


def test_prefill_writes_into_the_cache_that_is_there(params):
    args, kwargs = prefill_arguments(params)
    _, donated, copies = cache_copies(prefill.prefill, args, kwargs)
    assert (donated, copies) == (2 * CONFIG.layers, 0)
    old = args[4]
    places = {array.unsafe_buffer_pointer() for array in (*old.keys, *old.values)}
    new, _ = prefill.prefill(*args, **kwargs)
    assert {a.unsafe_buffer_pointer() for a in (*new.keys, *new.values)} == places
    assert np.asarray(new.lengths).tolist() == [3, 0, 9, 0]
    # The rows that were not asked for are as they were.
    for part in map(np.asarray, (*new.keys, *new.values)):
        assert not part[[1, 3]].any() and part[[0, 2], :, :3].all()


def test_no_step_copies_a_cache(params, as_users_do):
    # A copy per step would cost what sparsity saves, though results were the same.
    programs.decode_chunk.clear_cache()  # other tests compile it otherwise
    text, _, copies = cache_copies(programs.decode_chunk, *decode_arguments(params))
    cache = rf"f32\[4,{CONFIG.kv_heads},32,{CONFIG.head_dim}\]"
    if jax.default_backend() != "gpu":  # there the attention kernel appends
        assert re.search(rf"= {cache}\S* scatter\(", text)
    assert not copies


def test_prefills_programs_are_bounded_whatever_the_calls():
    if jax.default_backend() == "gpu":
        pytest.skip("needs a CPU (JAX_PLATFORMS=cpu): a GPU reads in place")
    config = dataclasses.replace(CONFIG, context=8192)
    weights = jax.eval_shape(lambda: random_params(config).weights)
    table = {"embed": {"tokens": jnp.zeros((1, 1))}}  # all that is looked at
    weights = {**weights, **table}
    rng, found = np.random.default_rng(0), collections.defaultdict(set)

    def room(slots, capacity):
        return jax.eval_shape(lambda: PagedCache.empty(config, slots, capacity, "f4"))

    def call(function, *args, **kwargs):
        """Note the program, run nothing."""
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(args))
        found[function].add((shapes, tuple(sorted(map(str, kwargs.items())))))
        if function is prefill.prefill:
            return args[4], args[5]
        return args[0]

    for batch in rng.integers(1, 17, size=100).tolist():
        lengths = np.exp(rng.normal(5, 1.2, batch)).clip(1, 4000).astype(int)
        capacity = int(2 ** np.ceil(np.log2(lengths.max() + 16)))
        slots = 1 << (batch - 1).bit_length()
        prefill.read_prompts(
            weights,
            {row: [1] * n for row, n in enumerate(lengths.tolist())},
            room(slots, capacity),
            jax.ShapeDtypeStruct((slots, config.vocab_size), "f4"),
            model=make_decoder(config, weights),
            call=call,
        )
    # Rows and widths alone: of 16 384 tokens, rows of a power of two, for batches up to
    # 16 at most 44 programs. Batch and capacity are those of what puts them in place.
    assert len(found[prefill.prefill]) <= 44


def test_the_programs_kept_are_bounded_whatever_the_calls(params, monkeypatch):
    # On a GPU the batch and its capacity are part of prefill's programs, and they are
    # part of decoding's anywhere.
    monkeypatch.setattr(clock, "MOST_PROGRAMS", 3)
    settings = {"max_new_tokens": 2, "stop_ids": [], "density": 0.5}
    prompts = random_prompts(CONFIG, (3, 5, 2, 7, 1))
    for function in (prefill.prefill, programs.decode_chunk):
        function.clear_cache()
    alone = [polarjax.generate(params, [ids], **settings).tokens[0] for ids in prompts]
    for batch in range(1, 6):
        output = polarjax.generate(params, prompts[:batch], **settings)
        assert output.tokens == alone[:batch]
        kept = [f._cache_size() for f in (prefill.prefill, programs.decode_chunk)]
        assert max(kept) <= 3
    assert kept[1] == 1  # three were dropped for the fourth
    for batch in (1, 2):
        polarjax.generate(params, prompts[:batch], **settings)
    assert programs.decode_chunk._cache_size() == 3
    # None is dropped, while there is no room left, for one that is there.
    polarjax.generate(params, prompts[:2], **settings)
    polarjax.generate(params, prompts, **settings)
    assert programs.decode_chunk._cache_size() == 3
