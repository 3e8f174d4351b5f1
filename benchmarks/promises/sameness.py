"""That no load changes an answer: among others, and where pages are short."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from benchmarks.promises.common import (
    DENSITIES,
    Bench,
    Engine,
    Plans,
    answers,
    finish,
    preemptions,
    settings,
)
from benchmarks.promises.sizes import Wanted
from polarjax import Settings
from polarjax.engine.plans import Plan
from polarjax.engine.request import Request

INVARIANT = (Wanted("most_distinct", most=1, timed=False),)
PREEMPT = (
    Wanted("different", most=0, timed=False),
    Wanted("preemptions", least=1, timed=False),
    Wanted("swap_share", most=0.03),
)
SHORT = 0.4  # of the pages that all slots need
NEAREST = 31  # steps that say what another one would have taken

Asked = tuple[list[int], Settings]


def invariant(bench: Bench) -> dict[str, Any]:
    """Ask for the same answers many times amid other requests, in random order.

    The copies of a prompt ask for two densities in turn. Every fifth also asks for the
    prompt's log-probabilities: its prompt is read anew, whatever is cached.

    Returns:
      The most distinct answers, tokens and log-probabilities to the last bit, that one
      prompt got at one density; and what was asked.
    """
    engine, sizes = bench.engine, bench.sizes
    rng = bench.rng(4)
    asked: list[tuple[Hashable, Asked]] = []
    for number in range(sizes.equal_prompts):
        prompt = bench.ids(rng, int(rng.integers(1, sizes.most_equal + 1)))
        for copy in range(sizes.copies):
            density = DENSITIES[copy % len(DENSITIES)]
            told = 0 if copy % 5 == 4 else None
            one = settings(sizes.equal_tokens, density, prompt_logprobs=told)
            asked.append(((number, density), (prompt, one)))
    asked += [(None, other) for other in _traffic(bench, rng)]
    order = rng.permutation(len(asked))
    start = time.perf_counter()
    requests = [(asked[i][0], engine.add(*asked[i][1])) for i in order]
    finish(engine)
    seconds = time.perf_counter() - start
    copies = [(of, one) for of, one in requests if of is not None]
    got = answers([one for _, one in copies])
    numbers = distinct(
        (of, answer) for (of, _), answer in zip(copies, got, strict=True)
    )
    return {
        "most_distinct": max(numbers.values()),
        "differing": sum(number > 1 for number in numbers.values()),
        "answers": len(numbers),
        "requests": len(requests),
        "from_cached_prompts": sum(one.cached > 0 for _, one in copies),
        "seconds": seconds,
    }


def _traffic(bench: Bench, rng: np.random.Generator) -> list[Asked]:
    """Other requests, as in a chat: of any density, half of them drawn by chance."""
    made = []
    for number, ask in enumerate(islice(bench.chat(2), bench.sizes.traffic)):
        density = [*DENSITIES, None][int(rng.integers(len(DENSITIES) + 1))]
        warmth = float(rng.choice([0.0, 0.8]))
        one = settings(ask.new_tokens, density, temperature=warmth, seed=number)
        made.append((ask.prompt.tolist(), one))
    return made


def distinct(answers: Iterable[tuple[Hashable, Hashable]]) -> dict[Hashable, int]:
    """How many distinct answers there are to each of some questions.

    Args:
      answers: questions, each with an answer.
    """
    found: dict[Hashable, set[Hashable]] = defaultdict(set)
    for question, answer in answers:
        found[question].add(answer)
    return {question: len(each) for question, each in found.items()}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of an engine.

    Attributes:
      seconds: that it took.
      kind: whether it read prompts, and whether requests decoded.
      swaps: requests that gave way in it, or came back.
    """

    seconds: float
    kind: tuple[bool, bool]
    swaps: int = 0

    @classmethod
    def of(cls, seconds: float, plan: Plan) -> Step:
        """A step that has followed a plan."""
        swaps = len(plan.swaps_in) + len(plan.swaps_out)
        return cls(seconds, (bool(plan.reads), bool(plan.decodes)), swaps)


def preempt(bench: Bench) -> dict[str, Any]:
    """Play requests on all the pages that they need, and again on 40 % of them.

    Returns:
      The requests whose tokens or log-probabilities differ, the times that one had to
      give way, the seconds of both runs, and the share of the second one's time that
      went into swapping: see `swap_seconds`.
    """
    sizes, rng = bench.sizes, bench.rng(5)
    asked: list[Asked] = []
    for number in range(sizes.crowd):
        prompt, answer = (
            int(rng.integers(low, high + 1))
            for low, high in (sizes.crowd_prompt, sizes.crowd_answer)
        )
        density = DENSITIES[number % len(DENSITIES)]
        asked.append((bench.ids(rng, prompt), settings(answer, density)))
    # Of all tokens but an answer's last one the cache holds something.
    pool = bench.engine._runner.scheduler.pools[0]
    ends = [len(prompt) + one.max_new_tokens - 1 for prompt, one in asked]
    need = sizes.slots * float(np.mean([pool.pages_for(end) for end in ends]))
    pages = round(SHORT * need)
    whole, whole_steps, gave_way = _play(bench.engine, asked)
    if gave_way:
        raise RuntimeError(f"{gave_way} requests gave way although all pages are there")
    with bench.make_engine(pages + 1) as engine:  # one is the trash page
        short, short_steps, gave_way = _play(engine, asked)
    pairs = zip(whole, short, strict=True)
    seconds, swapping = _seconds(short_steps), swap_seconds(short_steps)
    return {
        "different": sum(one != other for one, other in pairs),
        "preemptions": gave_way,
        "pages": pages,
        "pages_needed": need,
        "seconds_whole": _seconds(whole_steps),
        "seconds_short": seconds,
        "swap_seconds": swapping,
        "swap_share": swapping / seconds,
        "swap_steps": sum(one.swaps > 0 for one in short_steps),
        "steps_whole": len(whole_steps),
        "steps_short": len(short_steps),
    }


def _seconds(steps: Sequence[Step]) -> float:
    return sum(one.seconds for one in steps)


def _play(
    engine: Engine, asked: Sequence[Asked]
) -> tuple[list[tuple], list[Step], int]:
    """Answers, all steps, and how many requests gave way."""
    before, steps = preemptions(engine), []
    requests: list[Request] = [engine.add(*each) for each in asked]
    with Plans(engine) as plans:
        while not engine.idle:
            start = time.perf_counter()
            engine.step()
            steps.append(Step.of(time.perf_counter() - start, plans.made[-1]))
    finish(engine)
    return answers(requests), steps, preemptions(engine) - before


def swap_seconds(steps: Sequence[Step]) -> float:
    """What swapping took: what steps with it took beyond their neighbours without.

    The device runs behind the host, so the step after a swap is looked at too. A step
    would have taken the median of the nearest ones of its kind that no swap touches;
    where there are none, nothing, and all of it counts.

    Args:
      steps: all of a run, in order.
    """
    touched = {j for i, one in enumerate(steps) if one.swaps for j in (i, i + 1)}
    calm: dict[tuple[bool, bool], list[int]] = defaultdict(list)
    for i, one in enumerate(steps):
        if i not in touched:
            calm[one.kind].append(i)
    total = 0.0
    for i in sorted(touched & set(range(len(steps)))):
        near = sorted(calm[steps[i].kind], key=lambda j: abs(i - j))[:NEAREST]
        usual = float(np.median([steps[j].seconds for j in near])) if near else 0.0
        total += steps[i].seconds - usual
    return max(total, 0.0)
