"""`Scheduler`: whatever happens, its plans can be executed, in time and memory."""

import collections
import gc
import math
import sys
import time
import types

import numpy as np
import pytest

from polarjax.engine.scheduler import Scheduler
from tests.engine.paged_device import PAGE, Run


def random_run(seed, parts=1, host_pages=math.inf):
    """Sequences of all kinds come and go; returns the run, all of it over."""
    rng = np.random.default_rng(seed)
    page = int(rng.choice([1, 3, 4, 7]))
    pages = int(rng.integers(12, 40)) * 4 // page
    scheduler = Scheduler(
        parts * int(rng.integers(2, 7)),
        pages,
        page=page,
        prefill_tokens=int(rng.integers(3, 30)),
        pieces=int(rng.integers(1, 5)),
        parts=parts,
        host_pages=host_pages,
    )
    one = Run(scheduler, late=int(rng.integers(0, 3)))
    stems = [rng.integers(0, 9, 24).tolist() for _ in range(3)]
    ids, now = [], 0.0
    while len(ids) < 60 or len(scheduler):
        for _ in range(rng.poisson(0.7) if len(ids) < 60 else 0):
            id = len(ids)
            stem = stems[rng.integers(3)][: rng.integers(0, 25)]
            prompt = [*stem, *rng.integers(0, 9, rng.integers(1, 12)).tolist()]
            new = int(rng.integers(1, 40))
            if scheduler.pools[0].pages_for(len(prompt) + new - 1) >= pages:
                continue
            one.add(
                id,
                prompt,
                new,
                stops_after=int(rng.integers(1, 60)) if rng.random() < 0.5 else None,
                priority=int(rng.integers(0, 3)),
                client=int(rng.integers(0, 3)),
                salt=bytes(rng.integers(0, 2, 1).tolist()),
                deadline=now + float(rng.integers(1, 99))
                if rng.random() < 0.2
                else None,
                prefix=bool(rng.random() < 0.9),
            )
            ids.append(id)
        if ids and rng.random() < 0.1:
            one.cancel(ids[rng.integers(len(ids))])
        now += 1.0
        one.step(now)
        assert now < 20_000, "somebody never ends"
    one.finish()
    for id in ids:
        if id not in one.given_up:
            assert one.device.finished[id] == one.device.lives[id]
    return one


@pytest.mark.parametrize("parts", [1, 2])
def test_random_traces_can_be_executed(parts):
    runs = [random_run(seed, parts=parts) for seed in range(60)]
    devices = [one.device for one in runs]
    assert sum(one.scheduler.preemptions for one in runs) > 300
    assert sum(len(plan.swaps_in) for one in runs for plan in one.plans) > 100
    assert sum(device.shared for device in devices) > 500
    assert sum(len(device.finished) for device in devices) > 60 * 30
    assert sum(len(plan.expired) for one in runs for plan in one.plans) > 50


@pytest.mark.parametrize(("parts", "host_pages"), [(1, 0), (1, 16), (2, 16)])
def test_what_the_host_has_no_room_for_begins_anew(parts, host_pages):
    runs = [random_run(seed, parts, host_pages) for seed in range(40)]
    plans = [plan for one in runs for plan in one.plans]
    assert sum(len(plan.restarts) for plan in plans) > 30
    assert bool(host_pages) == any(plan.swaps_in for plan in plans)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_many_random_traces_can_be_executed(parts):
    for seed in range(1000, 2500):
        random_run(seed, parts=parts)


def test_the_same_calls_give_the_same_plans():
    first, second = random_run(7, parts=2), random_run(7, parts=2)
    assert first.plans == second.plans
    assert first.plans != random_run(8, parts=2).plans


def test_ten_thousand_cancels_lose_no_page():
    rng = np.random.default_rng(5)
    scheduler = Scheduler(12, 50, page=PAGE, prefill_tokens=40)
    alive, cancelled, number = [], 0, 0
    while cancelled < 10_000:
        while len(alive) < 18:
            prompt = rng.integers(0, 3, rng.integers(1, 40))
            deadline = 1e9 if number % 2 else None
            scheduler.add(
                number,
                prompt,
                int(rng.integers(1, 150)),
                deadline=deadline,
                client=number,
            )
            alive.append(number)
            number += 1
        scheduler.plan()
        for _ in range(rng.poisson(0.4)):
            if alive:
                where = rng.integers(len(alive))
                alive[where], alive[-1] = alive[-1], alive[where]
                assert scheduler.cancel(alive.pop())
                cancelled += 1
        if cancelled % 50 == 0:
            scheduler.check()
    assert scheduler.preemptions > 100
    for id in alive:
        scheduler.cancel(id)
    scheduler.plan()
    scheduler.check()
    [pool] = scheduler.pools
    assert pool.available == 49 and not scheduler.live and not scheduler.waiting


class Load:
    """A steady load of a scheduler without a device: who ends is replaced."""

    def __init__(self, slots, waiting=0, clients=4, seed=0, new=200):
        self.rng = np.random.default_rng(seed)
        self.scheduler = Scheduler(slots, slots * 9, prefill_tokens=2048)
        self.count, self.clients, self.new = 0, clients, new
        self.ends, self.limits = collections.defaultdict(list), {}
        self.open = 0
        self.target = slots + waiting
        self.seconds = []

    def step(self):
        while self.open < self.target:
            prompt = self.rng.integers(0, 9, self.rng.integers(1, 400))
            self.limits[self.count] = int(self.rng.integers(1, self.new))
            self.scheduler.add(
                self.count,
                prompt,
                self.limits[self.count],
                client=self.count % self.clients,
                deadline=1e9 * (1 + self.rng.random()),
            )
            self.count += 1
            self.open += 1
        begin = time.process_time()
        plan = self.scheduler.plan()
        self.seconds.append(time.process_time() - begin)
        for begun in plan.begins:
            # By a stop token, or by its last one, after which it has no slot.
            most = self.limits[begun.sequence]
            ends = plan.number + int(self.rng.integers(1, most + 1))
            self.ends[ends].append(begun.sequence)
        for id in self.ends.pop(plan.number, ()):
            self.open -= self.scheduler.ended(id)

    def run(self, plans):
        for _ in range(plans):
            self.step()
        return float(np.mean(self.seconds[-plans:]))


@pytest.mark.parametrize("factor", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_plan_for_256_slots_takes_half_a_millisecond(factor):
    load = Load(256, waiting=64)
    load.run(300)
    seconds = min(load.run(300) for _ in range(3))
    assert load.scheduler.live > 200
    print(f"{1e6 * seconds:.0f} us a plan")
    assert seconds < factor * 0.5e-3


@pytest.mark.parametrize("factor", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("clients", [1, 10_000])
def test_ten_thousand_who_wait_do_not_slow_a_plan(factor, clients):
    loads = [Load(64, waiting, clients) for waiting in (10, 10_000)]
    for load in loads:
        load.run(300)
    few, many = (min(load.run(300) for _ in range(4)) for load in loads)
    print(f"{1e6 * few:.0f} and {1e6 * many:.0f} us a plan")
    assert many < factor * 1.3 * few


def reachable_bytes(start):
    """Of all objects that one leads to, code and types apart."""
    skip = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    seen, left, total = {}, [start], 0
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, skip):
            continue
        seen[id(one)] = one
        total += sys.getsizeof(one)
        left += gc.get_referents(one)
    return total


@pytest.mark.parametrize(
    "plans", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)]
)
def test_a_long_life_takes_no_more_memory(plans):
    load = Load(8, waiting=4, clients=10**9, new=40)
    load.run(5_000)
    early = reachable_bytes(load.scheduler)
    load.seconds.clear()
    for _ in range(plans):
        load.step()
    assert load.count > plans / 10
    assert reachable_bytes(load.scheduler) < 1.5 * early  # some 12 sequences are here


@pytest.mark.parametrize("priority", [lambda i: 0, lambda i: i // 9])
def test_who_comes_and_goes_while_all_is_full_leaves_nothing_behind(priority):
    scheduler = Scheduler(1, 20, page=PAGE)
    scheduler.add("runs", [1], 60, client="first")
    scheduler.add("waits", [1], 60, client="first")
    scheduler.add("waits too", [1], 60, client="other")
    scheduler.plan()

    def visit(times):
        for i in range(times):
            more = {"deadline": 9.0 - i, "priority": priority(i), "client": i % 7}
            scheduler.add("visitor", [1], 2, **more)
            scheduler.cancel("visitor")
        scheduler.plan(-1e9)
        return reachable_bytes(scheduler)

    few = visit(100)
    assert visit(5_000) < few + 20_000  # bytes
