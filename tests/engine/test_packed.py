"""What goes to the devices in one copy arrives there as it was."""

import dataclasses

import jax
import numpy as np
import pytest

import polarjax
from polarjax.engine import batch as batches
from polarjax.engine import edits
from polarjax.engine.checks import plain_sampling_of, stop_table
from polarjax.engine.edits import Edits, row_words
from polarjax.engine.packed import pack, take_apart, unpack
from polarjax.engine.rules import make_rules
from polarjax.engine.sampling import Variant
from polarjax.engine.settings import MOST_STOPS
from polarjax.engine.slots import (
    Row,
    Ruled,
    edit,
    empty_slots,
    no_rows,
    no_rules,
    set_rules,
)
from polarjax.mesh.cut import make_mesh, shard
from polarjax.model import make_decoder
from tests.models import GREEDY, LLAMA, random_params

CONFIG = dataclasses.replace(LLAMA, layers=1, heads=4, kv_heads=2)
CONTEXT = 16


def tree(rows):
    """Of each dtype, with numbers whose bits are easily lost."""
    rng = np.random.default_rng(0)
    odd = np.array([-0.0, np.inf, np.nan, 1e-45, -1e-40, 3.5], np.float32)
    return {
        "flags": rng.random(rows * 3) > 0.5,
        "numbers": rng.integers(-(2**31), 2**31, (rows, 2, 5)).astype(np.int32),
        "words": rng.integers(0, 2**32, (rows * 2, 3), np.uint32),
        "odd": np.tile(odd, rows),
        "none": np.zeros((rows, 0), np.int32),
        "across": np.arange(rows * 16, dtype=np.uint32).reshape(8, -1).T[::2],
    }


def assert_bits(found, given):
    assert jax.tree.structure(found) == jax.tree.structure(given)
    for one, other in zip(*map(jax.tree.leaves, (found, given)), strict=True):
        one = np.asarray(one)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.tobytes() == np.ascontiguousarray(other).tobytes()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_tree_comes_out_bit_for_bit(rows):
    given = tree(rows)
    packed = pack(given, rows)
    assert packed.words.dtype == np.int32 and len(packed.words) == rows
    assert_bits(jax.jit(unpack)(packed), given)


def test_layouts_of_equal_trees_are_equal():
    given = tree(2)
    one = pack(given, 2).layout
    other = pack({**given, "numbers": given["numbers"] + 1}, 2).layout
    assert one == other and hash(one) == hash(other)
    assert one != pack(given, 1).layout


def test_what_has_no_words_is_refused():
    with pytest.raises(TypeError, match="float64 cannot be packed: make it bool"):
        pack({"a": np.zeros(2, np.int32), "b": np.zeros(2)}, 1)


@pytest.mark.devices(4)
def test_each_part_of_a_mesh_gets_its_share():
    params = shard(random_params(CONFIG), make_mesh(2, 2))
    with polarjax.Engine(params, slots=4, context=CONTEXT, **GREEDY) as engine:
        batch = engine._runner.batch
        given = tree(2)
        packed = batch._placed(pack(given, batch.parts))
        found = take_apart(packed, model=batch._dense)
        assert_bits(found, given)
        for one in jax.tree.leaves(found):
            if one.size:  # XLA leaves arrays of nothing whole
                starts = {x.index[0].start or 0 for x in one.addressable_shards}
                assert starts == {0, len(one) // 2}


def random_row(i):
    """What a slot begins with, and its rules."""
    settings = [
        polarjax.Settings(
            temperature=0.5 + i,
            top_k=3 + i,
            seed=2**32 - 1 - i,
            logit_bias={i: -0.5},
            allowed_token_ids=(1, 31, 32, 40 + i),
            stop_ids=(i, 7),
            presence_penalty=0.1 * i,
        )
    ]
    stops = stop_table(settings, MOST_STOPS)
    number = np.array([i], np.int32)
    row = Row(
        length=4 + number,
        token=number,
        live=np.array([i % 2 == 0]),
        remaining=9 + number,
        density=np.array([0.25], np.float32),
        sampling=plain_sampling_of(CONFIG, settings),
        stop_ids=stops,
        prompt=3 + number,
    )
    rules = make_rules(CONFIG, settings, stops)
    return row, Ruled(0 * number, rules, np.full((1, CONTEXT), i, np.int32))


def test_slots_get_what_they_begin_with(monkeypatch):
    # In several programs, each with its share of rows and of entries.
    monkeypatch.setattr(edits, "_ROWS", 2)
    monkeypatch.setattr(edits, "_ENTRIES", 3)
    params = random_params(CONFIG)
    model = make_decoder(CONFIG.architecture, params.weights)
    slots = empty_slots(model, 5, CONTEXT, 9, 8, params.weights)
    changes = Edits(CONFIG, 1, 5, CONTEXT, jax.device_put)
    rows, rules = {}, {}
    for slot in (0, 2, 3):
        rows[slot], rules[slot] = random_row(slot)
    given = [(slot, row_words(row)) for slot, row in rows.items()]
    tables = [(slot, j, 1 + slot + j) for slot in (0, 2, 3) for j in range(2)]
    # Who has left a slot that another begins with has done so before that.
    all_edits = list(changes.of((0, 2, 3), given, tables))
    assert len(all_edits) == 2
    for one in all_edits:
        slots = edit(slots, one, model=model)
    for slot, ruled in rules.items():
        slots = set_rules(slots, changes.rules_of(slot, ruled), model=model)
    slots = set_rules(slots, changes.rules_of(0, None), model=model)  # nobody's

    def there(slots, i):
        cache = slots.cache
        row = Row(
            cache.lengths,
            slots.token,
            slots.live,
            slots.remaining,
            slots.density,
            dataclasses.replace(slots.sampling, rules=None),
            slots.stop_ids,
            slots.history.prompt,
        )
        found = row, slots.sampling.rules, slots.history.tokens
        return jax.tree.map(lambda x: np.asarray(x[i : i + 1]), found)

    for slot in range(5):
        row, own, tokens = there(slots, slot)
        assert_bits(row, rows.get(slot, no_rows(CONFIG, 1)))
        ruled = rules.get(slot)
        assert_bits(own, ruled.rules if ruled else no_rules(CONFIG, 1))
        assert np.asarray(tokens).tolist() == [[slot if ruled else 0] * CONTEXT]
    expected = np.zeros((5, 2), np.int32)
    for slot, index, page in tables:
        expected[slot, index] = page
    np.testing.assert_array_equal(slots.cache.table, expected)

    (freed,) = changes.of((2,), (), ())
    slots = edit(slots, freed, model=model)
    assert np.asarray(slots.live).tolist() == [True, False, False, False, False]
    assert np.asarray(slots.cache.lengths).tolist() == [4, 0, 0, 7, 0]
    assert np.asarray(slots.token).tolist() == [0, 0, 2, 3, 0]
    # Who begins without rules has none, whatever the slot had.
    (begun,) = changes.of((), [(3, given[1][1])], ())
    slots = edit(slots, begun, model=model)
    row, own, _ = there(slots, 3)
    assert_bits((row, own), (rows[2], no_rules(CONFIG, 1)))


def test_a_plan_takes_three_copies_at_most(monkeypatch):
    params = random_params(CONFIG)
    sizes = {"slots": 4, "context": 32, "page": 8, "prefill_tokens": 16}
    taken, place = [], batches.place_own

    def counted(tree, where):
        leaves = jax.tree.leaves(tree)
        taken.append(sum(isinstance(x, np.ndarray) for x in leaves))
        return place(tree, where)

    monkeypatch.setattr(batches, "place_own", counted)
    drawing = {**GREEDY, "variants": [Variant.FULL]}
    with polarjax.Engine(params, **sizes, **drawing) as engine:
        taken.clear()
        requests = []
        seen = set()
        while not engine.idle or len(requests) < 12:
            if len(requests) < 12:
                rules = {"repetition_penalty": 1.2} if len(requests) == 5 else {}
                asked = polarjax.Settings(max_new_tokens=12, stop_ids=(), **rules)
                requests.append(engine.add([1 + len(requests)] * 9, asked))
            # Copies of what is not packed are made nowhere else.
            with jax.transfer_guard_host_to_device("disallow"):
                engine.step()
            seen.add(tuple(taken))
            taken.clear()
    assert all(len(one.tokens) == 12 for one in requests)
    # An edit, and a read; and the rules of one that begins, which most have not.
    assert seen == {(), (1,), (1, 1), (1, 1, 1)}
