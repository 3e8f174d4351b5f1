"""One policy bound, compiled and timed, beside dense if that is there already."""

import argparse
import dataclasses
from typing import Any

import jax

from polarjax import Policy
from polarjax.bench import profiling, rounds, steps
from polarjax.bench.meshes import Devices, of_one
from polarjax.bench.shapes import Case
from polarjax.engine.stats import imbalance
from polarjax.params import Params


@dataclasses.dataclass(frozen=True)
class Timed:
    """What was measured of a policy.

    Attributes:
      state: from which the next one goes on.
      step: compiled.
      seconds: of a step, in each round.
      beside: those of the step that was timed in the same rounds; empty without one.
      read: bytes of weights, and of keys and values, that a step must read.
      known: of the compiled program, as rows hold it.
      summary: the profile, if wanted.
    """

    state: Any
    step: steps.Step
    seconds: list[float]
    beside: list[float]
    read: tuple[int, float]
    known: dict[str, Any]
    summary: dict[str, Any] | None


def time_policy(
    params: Params,
    policy: Policy,
    asked: bool,
    state: Any,
    case: Case,
    alone: bool,
    args: argparse.Namespace,
    where: Devices,
    beside: steps.Step | None,
) -> Timed:
    """Bind a policy, compile its step and run it.

    Args:
      params: the model.
      policy: not bound.
      asked: whether it is done as it is, or only where it pays.
      state: donated.
      case: the case.
      alone: whether the model is layers alone.
      args: of the command.
      where: the devices that the model is on.
      beside: dense, to be timed again in the same rounds; None for none.
    """
    weights, bound, notes = steps.bind(
        params, policy, case.batch, case.context, asked=asked, alone=alone
    )
    step = steps.make_step(params, weights, bound)
    compiled, seconds_taken = rounds.timed_compile(lambda: step.lower(state))
    known: dict[str, Any] = {**seconds_taken, "notes": list(notes)}
    texts = [program.as_text() for program in compiled]
    cache = of_one(state.cache.apart()[-1][0]).shape
    known["cache_copies"] = sum(profiling.cache_copies(hlo, cache) for hlo in texts)
    each = [step] if beside is None else [step, beside]
    state, seconds, drawn = rounds.times(each, state, case.context, args.repeats)
    read = steps.step_bytes(params, weights, bound, drawn[0])
    if where.count > 1:
        known |= {
            "sent_bytes": steps.sent_bytes(params, bound, case.batch, where),
            "imbalance": imbalance(drawn[0]),
            "collectives": profiling.collectives(*texts),
        }
    summary = None
    if args.profile:
        state = jax.block_until_ready(steps.rewind(state, case.context))

        def once() -> None:
            nonlocal state
            state, _ = rounds.follow(step, state, case.context)

        count = steps.steps_in(case.context)
        summary = profiling.profile(once, count, texts)
    return Timed(
        state=state,
        step=step,
        seconds=seconds[0],
        beside=[] if beside is None else seconds[1],
        read=read,
        known=known,
        summary=summary,
    )
