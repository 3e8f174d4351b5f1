"""`PagePool`: no page is lost, given twice, or found for what it does not hold."""

import time

import numpy as np
import pytest

from polarjax.engine import pages
from polarjax.engine.pages import PagePool


def known(pool, tokens, salt=b""):
    """Read a prompt whole, and let it go: its whole pages stay, idle."""
    prompt = pool.prompt(tokens, salt)
    table = pool.take(pool.pages_for(prompt.length))
    pool.enter(prompt, table, range(len(prompt.hashes)))
    pool.release(table)
    return table


def found(pool, tokens, salt=b"", most=None):
    prompt = pool.prompt(tokens, salt)
    return pool.match(prompt, len(tokens) if most is None else most)


def test_pages_are_numbered_from_one_and_given_once():
    pool = PagePool(6, page=4)
    assert pool.free == pool.available == 5 and not pool.idle
    taken = pool.take(5)
    assert sorted(taken) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="1 pages are asked for, and 0 of 5"):
        pool.take(1)
    pool.check([taken])
    pool.release(taken)
    pool.check([])
    assert pool.available == 5


def test_a_prompt_is_found_by_whole_pages_up_to_what_is_asked():
    pool = PagePool(20, page=4)
    tokens = list(range(10))
    table = known(pool, tokens)
    assert pool.idle == 2 and pool.free == 17
    assert found(pool, tokens) == table[:2]
    assert found(pool, [*range(8), 77, 78]) == table[:2]
    assert found(pool, [*range(7), 77, 78]) == table[:1]
    assert found(pool, [77, *range(1, 10)]) == []
    assert found(pool, tokens[:8]) == table[:2]
    assert found(pool, tokens[:8], most=7) == table[:1]
    assert found(pool, tokens[:4], most=3) == found(pool, tokens[:3]) == []
    assert (pool.queries, pool.hits) == (0, 0)  # that is for the caller to say
    pool.count(10, 8)
    assert (pool.queries, pool.hits) == (10, 8)


def test_the_same_tokens_elsewhere_are_another_page():
    pool = PagePool(20, page=4)
    known(pool, [1, 2, 3, 4, 1, 2, 3, 4])
    assert len(found(pool, [1, 2, 3, 4])) == 1
    assert len({*found(pool, [1, 2, 3, 4, 1, 2, 3, 4])}) == 2
    assert len(found(pool, [5, 6, 7, 8, 1, 2, 3, 4])) == 0


def test_another_salt_or_root_finds_nothing():
    tokens = list(range(8))
    pool, other = PagePool(20, 4, b"a model"), PagePool(20, 4, b"another")
    same = PagePool(20, 4, b"a model")
    table = known(pool, tokens, b"salt")
    assert found(pool, tokens, b"salt") == table
    assert found(pool, tokens) == found(pool, tokens, b"sal") == []
    assert pool.match(same.prompt(tokens, b"salt"), 8) == table
    assert pool.match(other.prompt(tokens, b"salt"), 8) == []
    hashes = [p.prompt(tokens, s).hashes for p in (pool, other) for s in (b"", b"x")]
    assert len({each for some in hashes for each in some}) == 8


@pytest.mark.parametrize("hashed", [b"", b"x"])
def test_a_collision_of_hashes_gives_no_false_page(monkeypatch, hashed):
    monkeypatch.setattr(pages, "chained", lambda parent, tokens, salt: hashed)
    pool = PagePool(20, page=2)
    table = known(pool, [1, 2, 3, 4])
    assert found(pool, [1, 2, 3, 4]) == table[:1]  # the second was taken for the first
    assert found(pool, [3, 4]) == found(pool, [1, 2], b"salt") == []
    assert found(pool, [1, 2, 1, 2]) == table[:1]  # a page is not its own parent
    known(pool, [5, 6])
    assert found(pool, [5, 6]) == []
    pool.check([])
    held = pool.take(19)  # which forgets it
    assert found(pool, [1, 2]) == []
    pool.check([held])


def test_the_longest_idle_goes_first_and_tails_before_heads():
    pool = PagePool(9, page=2)
    a = known(pool, [1, 2, 3, 4, 5, 6])
    b = known(pool, [1, 2, 3, 4, 7, 8, 9, 9])[2:]  # not to be known: no parent here
    assert pool.idle == 3
    prompt = pool.prompt([1, 2, 7, 7, 8, 8])
    shared = pool.match(prompt, 5)
    assert shared == a[:1] and pool.idle_among(shared) == 1
    pool.share(shared)
    assert pool.idle == 2
    table = shared + pool.take(2)
    pool.enter(prompt, table, range(1, 3))
    assert found(pool, [1, 2, 7, 7, 8, 8]) == table
    pool.check([table])
    pool.release(table)
    pool.check([])
    # Of a: its tail first. Its head has been used since, and waits for its new tails.
    order = [a[2], a[1], table[2], table[1], a[0]]
    assert pool.free == 3 and pool.idle == 5
    held = pool.take(3)
    for page in order:
        held += pool.take(1)
        assert held[-1] == page
        pool.check([held])
    assert pool.evictions == 5 and not pool.available
    assert len(b) == 2


def test_who_comes_second_with_the_same_page_keeps_it_alone():
    pool = PagePool(20, page=2)
    prompt = pool.prompt([1, 2, 3, 4, 5, 6])
    first, second = pool.take(2), pool.take(3)
    pool.enter(prompt, first, range(0, 2))
    pool.enter(prompt, second, range(0, 3))
    # Its third would be known after a page that it does not hold.
    assert pool.match(prompt, 6) == first
    pool.release(second)
    assert pool.idle == 0
    pool.check([first])
    pool.release(first)
    pool.check([])


def test_shared_pages_are_held_until_the_last_lets_go():
    pool = PagePool(5, page=2)
    table = known(pool, [1, 2, 3, 4])
    pool.share(table)
    pool.share(table)
    assert pool.available == 2
    pool.release(table)
    pool.check([table])
    assert pool.available == 2
    pool.release(table)
    assert pool.available == 4
    with pytest.raises(ValueError, match=f"page {table[1]} is released, and nobody"):
        pool.release(table)
    with pytest.raises(ValueError, match="page 0 is released"):
        pool.release([0])
    with pytest.raises(ValueError, match="page 4 is not known"):
        pool.share([4])


def test_random_work_loses_nothing():
    rng = np.random.default_rng(0)
    pool, tables, reads = PagePool(40, page=2), [], 0
    for _ in range(3000):
        if rng.random() < 0.5 and tables:
            pool.release(tables.pop(rng.integers(len(tables))))
        else:
            tokens = rng.integers(0, 2, rng.integers(1, 12))
            prompt = pool.prompt(tokens, bytes(rng.integers(0, 2, 1).tolist()))
            table = pool.match(prompt, tokens.size - 1)
            fresh = pool.pages_for(tokens.size) - len(table)
            if fresh + pool.idle_among(table) <= pool.available:
                pool.share(table)
                start = len(table)
                table = table + pool.take(fresh)
                stop = rng.integers(start, len(prompt.hashes) + 1)
                pool.enter(prompt, table, range(start, stop))
                tables.append(table)
                reads += start
        pool.check(tables)
    assert reads > 500 and pool.evictions > 100
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.available == 39


def broken(change):
    pool = PagePool(8, page=2)
    table = known(pool, [1, 2, 3, 4])
    held = pool.take(2)
    change(pool, table, held)
    return lambda: pool.check([held])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pool, table, held: pool._free.append(held[0]), "in two places"),
        (lambda pool, table, held: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool, table, held: pool._free.pop(), "lost"),
        (lambda pool, table, held: pool.share(table[:1]), "references"),
        (lambda pool, table, held: pool._idle.move_to_end(table[1]), "outlives"),
        (lambda pool, table, held: held.append(0), "trash"),
        (lambda pool, table, held: pool._by_hash.popitem(), "hashes"),
    ],
)
def test_the_check_sees_what_is_wrong(change, message):
    with pytest.raises(AssertionError, match=message):
        broken(change)()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PagePool(1), "pages must be an integer of at least 2, got 1"),
        (lambda: PagePool(4, page=0), "page must be a positive integer, got 0"),
        (lambda: PagePool(4).prompt([]), "a prompt must be one or more token ids"),
        (lambda: PagePool(4).prompt([0.5]), "a prompt must be one or more token ids"),
        (lambda: PagePool(4).prompt([[1]]), "a prompt must be one or more token ids"),
        (lambda: PagePool(4).prompt([3, -1]), "2.*31 - 1, got -1"),
        (lambda: PagePool(4).prompt([2**31]), "2.*31 - 1, got 2147483648"),
    ],
)
def test_errors_name_the_offender(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("factor", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_a_large_pool_costs_no_more_than_a_small_one(factor):
    def seconds(count):
        pool = PagePool(count, page=4)
        prompt, begin = pool.prompt(np.arange(4 * count - 4)), time.process_time()
        table = pool.take(count - 1)
        pool.enter(prompt, table, range(count - 1))
        pool.release(table)
        for _ in range(count - 1):
            pool.take(1)
        assert pool.evictions == count - 1
        return (time.process_time() - begin) / count

    small = min(seconds(2_000) for _ in range(5))
    assert min(seconds(200_000) for _ in range(3)) < 1.5 * factor * small
