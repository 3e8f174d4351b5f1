"""`Scheduler`: who waits gets its turn, and who must give way loses nothing."""

import collections

import numpy as np
import pytest

from polarjax.engine.plans import Piece
from tests.engine.paged_device import PAGE, run


def test_who_matters_least_and_has_computed_least_gives_way():
    one = run(slots=4, pages=16, prefill_tokens=100)
    one.add("old", range(4), 40, priority=1)
    one.step()
    one.add("young", range(50, 54), 40, priority=1)
    one.add("last", range(70, 74), 40, priority=1)
    one.add("urgent", range(90, 94), 40, priority=0)
    while not one.scheduler.preemptions:
        plan = one.step()
    [out] = plan.swaps_out
    assert out.sequence == "last" and out.slot in plan.frees
    assert not plan.begins and not plan.swaps_in
    assert len(out.pages) == -(-out.positions // PAGE)
    one.finish()
    assert len(one.device.finished) == 4
    back = [each.sequence for plan in one.plans for each in plan.swaps_in]
    assert back and "urgent" not in back


def test_who_gave_way_goes_on_before_new_ones_of_its_priority():
    one = run(slots=3, pages=14, prefill_tokens=100)
    for id in range(3):
        one.add(id, [id] * 4, 30)
    one.step()
    one.add("new", [9], 2)
    one.add("less", [9], 2, priority=5)
    while not one.scheduler.preemptions:
        one.step()
    one.add("more", [9], 2, priority=-1)
    one.finish()
    order = [
        each.sequence for plan in one.plans for each in (*plan.swaps_in, *plan.begins)
    ]
    assert order[:3] == [0, 1, 2] and order[3] == "more" and 2 in order[4:]
    assert order.index("new") > max(i for i, id in enumerate(order) if id in (0, 1, 2))
    assert order[-1] == "less"


def test_who_can_only_go_on_in_one_part_does_not_block_the_others():
    one = run(slots=6, pages=12, parts=2, prefill_tokens=100)
    for id in range(4):
        one.add(id, [id] * 4, 30)
    while not one.scheduler.preemptions:
        one.step()
    swapped = [plan.swaps_out[0] for plan in one.plans if plan.swaps_out]
    kept = swapped[0].slot // 3
    for id in [x for x in range(4) if x not in [out.sequence for out in swapped]]:
        slots = one.device.slots.items()
        if any(slot // 3 != kept and at.sequence == id for slot, at in slots):
            one.cancel(id)
    one.add("new", [9], 2)
    plan = one.step()
    assert [begin.slot // 3 for begin in plan.begins] == [1 - kept]
    assert not any(back.slot // 3 == kept for back in plan.swaps_in)
    one.finish()


def test_a_prompt_that_gave_way_while_it_was_read_is_read_again():
    one = run(slots=2, pages=26, prefill_tokens=3)
    one.add("a", range(8), 60)
    for _ in range(3):
        one.step()
    one.add("b", range(100, 172), 2, priority=1)
    one.finish()
    assert one.begun() == ["a", "b", "b"]
    assert not any(plan.swaps_out for plan in one.plans)
    [first, again] = [p.begins[0] for p in one.plans if p.begins][1:]
    assert first.cached == 0 and again.cached > 0  # of its own pages some were left
    assert one.device.finished == {"a": 60, "b": 2}


def test_pages_in_the_cache_need_no_copy_back():
    one = run(slots=2, pages=20, prefill_tokens=100, late=0)
    one.add("a", range(24), 30)
    one.step()
    one.add("b", range(24), 30)
    while not one.scheduler.preemptions:
        one.step()
    one.finish()
    [back] = [each for plan in one.plans for each in plan.swaps_in]
    assert back.sequence == "b" and back.copies[0][0] > 0


def test_a_prompt_that_comes_back_from_the_host_is_known_again():
    one = run(slots=3, pages=20, prefill_tokens=100)
    one.add("a", range(12), 60)
    one.add("b", range(100, 112), 40)
    while not any(plan.swaps_in for plan in one.plans):
        one.step()
    assert one.plans[-1].swaps_in[0].copies[0][0] == 1  # its head alone was still known
    one.add("c", range(100, 112), 2)
    one.finish()
    assert one.step().empty and not one.plans[0].empty
    assert [b.cached for p in one.plans for b in p.begins] == [0, 0, 8]


def test_nobody_gives_way_while_another_only_waits_to_be_told():
    one = run(slots=2, pages=18, late=30)
    one.add("done", range(32), 2)
    one.add("grows", range(100, 116), 20)
    for _ in range(25):
        one.step()
    assert one.scheduler.preemptions == 0
    one.finish()
    assert one.device.finished == {"done": 2, "grows": 20}


def test_priorities_go_strictly_and_first_come_first_served_within():
    one = run(slots=1)
    for i in range(12):
        one.add(i, [i], 2, priority=(2, 0, 1)[i % 3])
    one.finish()
    assert one.begun() == [1, 4, 7, 10, 2, 5, 8, 11, 0, 3, 6, 9]


def test_an_urgent_prompt_is_read_before_the_rest_of_a_long_one():
    one = run(pages=60, prefill_tokens=10)
    one.add("long", range(100), 2, priority=1)
    one.step()
    one.add("equal", range(200, 205), 2, priority=1)
    one.add("urgent", range(300, 305), 2, priority=0)
    plan = one.step()
    assert plan.reads == (Piece(1, 0, 5, True), Piece(0, 10, 5, False))
    assert [begin.sequence for begin in plan.begins] == ["urgent"]
    one.finish()


def test_a_client_with_few_prompts_does_not_wait_for_one_with_many():
    one = run(slots=2, prefill_tokens=100)
    for i in range(200):
        one.add(("many", i), [1, i], 4, client="many")
    for _ in range(5):
        one.step()
    for i in range(5):
        one.add(("few", i), [2, i], 4, client="few")
    start = len(one.begun())
    for _ in range(30):
        one.step()
    order = [who for who, _ in one.begun()[start : start + 10]]
    assert order.count("few") >= 4
    one.finish()


def test_clients_get_equal_tokens_whatever_their_sizes():
    one = run(slots=3, pages=200, prefill_tokens=50)
    sizes = {"a": (2, 3), "b": (20, 30), "c": (7, 1)}
    rng = np.random.default_rng(0)
    for i in range(1500):
        client = "abc"[i % 3]
        prompt, new = sizes[client]
        tokens = rng.integers(0, 99, prompt).tolist()
        # Half of what was asked for is not used.
        one.add((client, i), tokens, 2 * new, stops_after=new, client=client)
    for _ in range(400):
        one.step()
    served = collections.Counter()
    for client, _ in one.device.finished:
        served[client] += sum(sizes[client])
    assert min(served.values()) > 0.8 * max(served.values()) > 300


def test_who_was_away_has_saved_nothing_up():
    one = run(slots=1, prefill_tokens=100)
    for i in range(100):
        one.add(("a", i), [i], 2, client="a")
    for _ in range(60):
        one.step()
    for i in range(20):
        one.add(("b", i), [i], 2, client="b")
    start = len(one.begun())
    for _ in range(40):
        one.step()
    order = "".join(who for who, _ in one.begun()[start : start + 12])
    assert "ababab" in order
    one.finish()


@pytest.mark.parametrize("parts", [1, 2])
def test_nobody_starves(parts):
    """A prompt that needs most pages, among many small ones that always fit."""
    one = run(slots=6 * parts, pages=30, parts=parts, prefill_tokens=16)
    for i in range(20):
        one.add(i, [i], 9)
    one.add("large", range(100, 200), 8)
    for i in range(20, 400):
        one.add(i, [i], 9)
        one.step()
        if "large" in one.device.finished:
            break
    assert i < 150
    one.finish()


def test_a_deadline_ends_whoever_has_not_been_asked_for_all():
    one = run(slots=1, late=2)
    one.add("runs", range(4), 30, deadline=5.0)
    one.add("waits", range(4), 30, deadline=3.5)
    one.add("drawn", range(4), 1, deadline=6.5)
    expired = [one.step(now).expired for now in range(9)]
    assert expired == [(), (), (), (), ("waits",), ("runs",), (), (), ()]
    assert one.plans[5].frees == (0,) and one.plans[5].begins[0].sequence == "drawn"
    assert one.device.finished == {"drawn": 1}
    one.finish()
