"""`Scheduler`: what is read, found, admitted and refused."""

import pytest

from polarjax.engine.plans import Piece
from polarjax.engine.scheduler import Scheduler
from tests.engine.paged_device import PAGE, run


def test_a_prompt_is_read_in_pieces_and_then_decodes():
    one = run(prefill_tokens=10)
    one.add("a", range(23), 3)
    plans = [one.step() for _ in range(6)]
    assert [plan.number for plan in plans] == list(range(6))
    assert [plan.reads for plan in plans] == [
        (Piece(0, 0, 10, False),),
        (Piece(0, 10, 10, False),),
        (Piece(0, 20, 3, True),),
        (),
        (),
        (),
    ]
    # Three tokens: one after the prompt, two of steps.
    assert [plan.decodes for plan in plans] == [(), (), (0,), (0,), (), ()]
    assert [plan.frees for plan in plans] == [(), (), (), (), (0,), ()]
    edits = [len(plan.tables) for plan in plans]
    assert edits == [6, 0, 0, 1, 0, 0]  # 23 and the next; the 25th position
    assert one.device.finished == {"a": 3}


def test_one_new_token_needs_no_step_and_no_page_for_it():
    one = run(pages=3)
    one.add("a", range(8), 1)
    plan = one.step()
    assert plan.reads == (Piece(0, 0, 8, True),) and not plan.decodes
    assert len(plan.tables) == 2
    one.finish()


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_slot_is_free_when_all_its_tokens_are_asked_for(tokens):
    one = run(slots=1, late=3)
    for id in "ab":
        one.add(id, range(3), tokens)
    plans = [one.step() for _ in range(4)]
    decodes = [(0,), (0,), (), ()] if tokens == 2 else [()] * 4
    assert [plan.decodes for plan in plans] == decodes
    assert [plan.frees for plan in plans] == [(), (0,), (0,), ()]
    one.finish()  # and hears of both ends later
    assert one.device.finished == {"a": tokens, "b": tokens}


def test_it_rests_longer_while_more_wait_than_there_are_slots():
    one = run(slots=2, prefill_tokens=10, rest=1)
    for id in range(4):
        one.add(id, [id] * 3, 3 + 30 * (id == 0))
    reads = [[piece.slot for piece in one.step().reads] for _ in range(24)]
    # Slot 1 is free from plan 3 on, and two wait for it: a rest of 8 plans.
    wanted = [[] for _ in range(24)]
    wanted[0], wanted[9] = [0, 1], [1]
    # Once the last has a slot nobody waits for one: a rest of one plan.
    wanted[11] = [1]
    assert reads == wanted
    one.finish()


def test_pieces_of_several_prompts_share_a_program():
    one = run(prefill_tokens=20, pieces=3)
    for id, length in zip("abcd", (8, 7, 9, 1), strict=True):
        one.add(id, [ord(id)] * length, 5)
    first, second = one.step(), one.step()
    assert first.reads == (
        Piece(0, 0, 8, True),
        Piece(1, 0, 7, True),
        Piece(2, 0, 5, False),
    )
    assert first.decodes == (0, 1)
    assert second.reads == (Piece(2, 5, 4, True), Piece(3, 0, 1, True))
    assert second.decodes == (0, 1, 2, 3)
    one.finish()


def test_no_more_pieces_than_a_program_has():
    one = run(slots=8, pieces=2, prefill_tokens=100)
    for i in range(8):
        one.add(i, [i], 9)
    assert [len(one.step().reads) for _ in range(5)] == [2, 2, 2, 2, 0]


def test_a_prefill_program_that_would_not_be_full_rests():
    one = run(slots=8, prefill_tokens=10, rest=2)
    one.add("a", range(4), 20)
    reads = [one.step().reads]
    one.add("b", range(20, 25), 20)  # "a" decodes meanwhile
    reads += [one.step().reads for _ in range(2)]
    one.add("c", range(30, 33), 20)  # and goes with "b", in the third plan from then
    reads += [one.step().reads]
    one.add("d", range(40, 52), 20)  # more than a whole program, at once
    reads += [one.step().reads for _ in range(5)]
    pieces = [[(piece.slot, piece.count) for piece in each] for each in reads]
    assert pieces == [
        [(0, 4)], [], [], [(1, 5), (2, 3)], [(3, 10)], [], [], [(3, 2)], []
    ]  # fmt: skip
    one.finish()


def test_it_rests_for_nobody_where_nobody_decodes_and_not_for_those_without_a_slot():
    one = run(slots=2, prefill_tokens=10, rest=3)
    one.add("a", range(23), 1)
    assert [len(one.step().reads) for _ in range(3)] == [1, 1, 1]
    for id in range(4):  # two have slots: 8 tokens of 10
        one.add(id, [id] * 4, 9)
    assert [len(one.step().reads) for _ in range(4)] == [2, 0, 0, 0]
    one.finish()


def test_equal_prompts_in_one_plan_share_pages():
    one = run(slots=4, prefill_tokens=100)
    for id in range(3):  # as for three samples of one prompt
        one.add(id, range(14), 4)
    plan = one.step()
    assert [begin.cached for begin in plan.begins] == [0, 12, 12]
    assert [piece.count for piece in plan.reads] == [14, 2, 2]
    tables = [[p for s, _, p in plan.tables if s == slot] for slot in range(3)]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3]
    assert len({table[3] for table in tables}) == 3
    [pool] = one.scheduler.pools
    assert (pool.queries, pool.hits) == (42, 24)
    one.finish()


def test_a_prompt_is_never_found_whole():
    one = run(prefill_tokens=100)
    for id in range(2):
        one.add(id, range(12), 4)
        one.finish()
    assert [b.cached for plan in one.plans for b in plan.begins] == [0, 8]


@pytest.mark.parametrize(
    ("more", "cached"), [({}, 8), ({"salt": b"x"}, 0), ({"prefix": False}, 0)]
)
def test_what_is_found_depends_on_salt_and_wish(more, cached):
    one = run()
    one.add("a", range(10), 2)
    one.finish()
    one.add("b", range(10), 2, **more)
    assert one.step().begins[0].cached == cached
    one.finish()


def test_decoded_positions_are_never_found():
    one = run()
    one.add("a", range(6), 20)
    one.finish()
    one.add("b", range(24), 2)  # whatever was drawn
    assert one.step().begins[0].cached == 4
    one.finish()


def test_only_what_fits_whole_comes_in_and_nobody_overtakes():
    one = run(slots=4, pages=21, prefill_tokens=200)
    one.add("first", range(40), 8)  # 11 pages, later 12
    one.add("large", range(100, 140), 8)
    one.add("small", [7], 2)
    plan = one.step()
    assert [begin.sequence for begin in plan.begins] == ["first"]
    for _ in range(6):
        assert not one.step().begins
    one.finish()
    assert one.begun() == ["first", "large", "small"]


def test_room_to_grow_is_kept_for_those_who_run():
    one = run(slots=8, pages=13, prefill_tokens=200)
    for id in range(8):
        one.add(id, [id], 16)
    # The n-th needs a page, and leaves one for each of n: 12 - n >= n.
    assert len(one.step().begins) == 6
    one.finish()
    many = run(slots=8, pages=1000, prefill_tokens=10_000)
    many.add(0, range(3600), 80)
    many.add(1, range(9000, 9000 + 4 * 89), 1)  # 901 and 89, of 999: 9 are left
    assert len(many.step().begins) == 1
    many.finish()


@pytest.mark.parametrize("pages_each", [1, 3])
def test_a_pool_that_all_slots_can_fill_stops_nobody(pages_each):
    one = run(slots=4, pages=4 * pages_each + 1)
    for id in range(4):
        one.add(id, [id] * PAGE, PAGE * (pages_each - 1) + 1)
    assert len(one.step().begins) == 4
    one.finish()


def test_alone_it_may_have_every_page():
    one = run(slots=2, pages=11, prefill_tokens=8)
    one.add("a", range(30), 11)
    one.add("b", range(30), 11)
    one.finish()
    assert one.begun() == ["a", "b"]
    assert one.scheduler.preemptions == 0


def test_what_could_never_run_is_refused():
    scheduler = Scheduler(4, 11, page=PAGE)
    scheduler.add("fits", range(30), 11)
    message = (
        r"sequence 'x' of 30 prompt tokens and up to 12 new ones needs 11 pages of 4 "
        r"positions, and there are 10: ask for fewer tokens"
    )
    with pytest.raises(ValueError, match=message):
        scheduler.add("x", range(30), 12)
    assert len(scheduler) == scheduler.waiting == 1 and "x" not in scheduler


def test_cancels_do_no_harm_wherever_it_is():
    one = run(slots=2, pages=14, prefill_tokens=4)
    for id in range(4):
        one.add(id, range(10 * id, 10 * id + 4), 30)
    assert "0" not in one.scheduler and not one.scheduler.cancel("nobody")
    one.step()
    one.step()
    while not one.scheduler.preemptions:
        one.step()
    swapped = one.plans[-1].swaps_out[0].sequence
    for id in (swapped, 3, 0):  # swapped, waiting, running
        assert one.scheduler.cancel(id)
        assert not one.scheduler.cancel(id) and not one.scheduler.ended(id)
        one.device.forget(id)
        one.scheduler.check()
    one.finish()
    reading = run(prefill_tokens=4)
    reading.add("a", range(30), 3)
    reading.step()
    assert reading.scheduler.cancel("a")
    assert reading.step().frees == (0,)
    reading.finish()
    reading.add("a", range(30), 3)  # the id is free again
    assert reading.step().begins[0].cached == 4  # what was read of it
    reading.finish()


def test_a_slot_may_be_freed_and_taken_in_one_plan():
    one = run(slots=1)
    one.add("a", range(4), 30)
    one.add("b", range(50, 54), 3)
    one.step()
    one.cancel("a")
    plan = one.step()
    assert plan.frees == (0,) and plan.begins[0].slot == 0
    one.finish()


def test_parts_have_slots_and_pages_of_their_own():
    one = run(slots=4, pages=20, parts=2, prefill_tokens=8)
    for id in range(4):
        one.add(id, range(20 * id, 20 * id + 8), 9)
    plan = one.step()
    # Each part reads as much as one would; who has most pages gets the next.
    assert plan.reads == (Piece(0, 0, 8, True), Piece(2, 0, 8, True))
    assert [begin.slot for begin in plan.begins] == [0, 2]
    assert [page for _, _, page in plan.tables] == [1, 2, 3, 1, 2, 3]
    assert [begin.slot for begin in one.step().begins] == [1, 3]
    one.finish()
    with pytest.raises(ValueError, match="5 slots cannot be cut into 2 equal parts"):
        Scheduler(5, 20, parts=2)


def test_the_roomiest_part_is_taken():
    one = run(slots=6, pages=30, parts=2, prefill_tokens=100)
    one.add("large", range(60), 9)
    for id in range(4):
        one.add(id, [id], 9)
    plan = one.step()
    assert [begin.slot for begin in plan.begins] == [0, 3, 4, 5, 1]
    one.finish()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"id": "here"}, ValueError, "sequence 'here' is here already"),
        ({"prompt": []}, ValueError, "a prompt must be one or more token ids"),
        ({"prompt": [-1]}, ValueError, "got -1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive"),
        ({"priority": 0.5}, TypeError, "priority must be an integer, got 0.5"),
        ({"salt": "x"}, TypeError, "salt must be bytes, got 'x'"),
        ({"deadline": float("nan")}, ValueError, "deadline must be a number or None"),
        ({"client": []}, TypeError, "unhashable"),
    ],
)
def test_errors_name_the_offender_and_change_nothing(more, error, message):
    scheduler = Scheduler(4, 20, page=PAGE)
    scheduler.add("here", [1], 2)
    given = {"id": "x", "prompt": [1, 2], "max_new_tokens": 3, **more}
    with pytest.raises(error, match=message):
        scheduler.add(**given)
    assert len(scheduler) == scheduler.waiting == 1
    scheduler.plan()
    scheduler.check()


@pytest.mark.parametrize(
    "name", ["slots", "prefill_tokens", "pieces", "parts", "page", "pages"]
)
def test_settings_are_checked(name):
    settings = {"slots": 4, "pages": 20, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a"):
        Scheduler(**settings)


def test_who_found_no_room_is_not_looked_up_until_pages_come_back(monkeypatch):
    one, looked = run(slots=4, pages=20), []
    [pool] = one.scheduler.pools
    match = pool.match
    monkeypatch.setattr(pool, "match", lambda *a: looked.append(a) or match(*a))
    one.add("a", range(20), 24)
    one.add("b", range(40, 100), 9)
    for _ in range(15):
        one.step()
    assert len(looked) == 2
    one.finish()
    assert len(looked) == 3
