"""Log-likelihoods of given continuations under several policies, in one of three modes.

`decode` (what `generate` does): a context but its last token is prefilled dense, that
token and all that follow go one by one through the sparse decode step. `kernel`: so do
all tokens, from the first. `mask`: the literature's masked dense model, which computes
everything at once and sets to zero what is not selected; equal to `kernel`, no kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import NamedSharding

from pallas_kernels import Implementation, runnable
from polarjax.cache import PagedCache
from polarjax.engine.places import PAGES, place_rows
from polarjax.evaluation import programs
from polarjax.evaluation.batches import Batch, Continuation, Mode, make_batches
from polarjax.mesh.processes import to_host
from polarjax.model import make_decoder
from polarjax.params import Params
from polarjax.planning.sizes import positive
from polarjax.policy import Load, Policy, check_policy


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one batch yielded under one policy.

    Attributes:
      nll: per row, float32[scored], negative log-likelihoods in nats.
      greedy: per row, bool[scored], whether the token was the most probable one.
      use: int64[layers, k], how often each KV group was read.
      positions: tokens that were computed sparsely, over all rows.
      seconds: that it took, compilation apart.
    """

    nll: list[np.ndarray]
    greedy: list[np.ndarray]
    use: np.ndarray
    positions: int
    seconds: float


class Scorer:
    """Scores batches under several policies with one compiled step for each.

    All policies see the same batches, and share the dense prefill.

    Args:
      params: the model, on one device or on the mesh that it was loaded on; of one
        over several processes all of them call this alike.
      policies: by label, not yet bound.
      mode: "decode" (what `generate` does), "kernel" (its step for every token) or
        "mask" (a masked dense model).
      batch: rows computed together; a batch that lacks rows, or does not divide by the
        mesh's "dp", is filled up with rows that are finished.
      implementation: of the kernels; None chooses by device.

    Raises:
      ValueError: if the mode is unknown, the kernels do not run here, or a policy does
        not fit the model.
    """

    def __init__(
        self,
        params: Params,
        policies: Mapping[str, Policy],
        *,
        mode: Mode = "decode",
        batch: int = 16,
        implementation: Implementation | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            names = ", ".join(get_args(Mode))
            raise ValueError(f"no mode {mode!r}: there are {names}")
        runnable(implementation)
        self.params = params
        self.mode: Mode = mode
        self.batch = positive("batch", batch)
        self._model = make_decoder(
            params.config.architecture, params.weights, implementation=implementation
        )
        self._mesh, self._parts = self._model.mesh, self._model.share.dp
        self._bound = {}
        for label, policy in policies.items():
            own = check_policy(policy).of(params.policy.learned).sized(self.batch)
            self._bound[label] = own.bind(params)
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def labels(self) -> list[str]:
        """Of the policies."""
        return list(self._bound)

    def neuron_density(self, label: str) -> float:
        """MLP neurons that a policy reads / neurons there, mean over layers."""
        config = self.params.config
        reads = self._bound[label][1].reads(config, Load(self.batch, config.context))
        return float(np.mean(reads.neuron_density)) if reads else 1.0

    def plan(self, items: Sequence[Continuation]) -> list[Batch]:
        """Cut work into batches, which depend on the items, mode and batch size alone.

        Raises:
          ValueError: if an item is longer than the model's context.
        """
        return make_batches(items, self.batch, self.params.config.context, self.mode)

    def cost(self, batch: Batch) -> int:
        """About how long a batch takes, in tokens computed."""
        steps = batch.steps
        if self.mode != "mask":  # decoding ends with the longest row
            steps = max(row.steps for row in batch.rows)
        dense = batch.contexts * batch.prefix
        return dense + len(self._bound) * self.batch * steps

    def compile(
        self,
        batches: Sequence[Batch],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compile what the batches need, several programs at a time.

        Args:
          batches: from `plan`.
          progress: called as progress(done, total).
        """
        jobs: dict[Any, Callable[[], Any]] = {}
        distinct = {self._keys(batch): batch for batch in batches}.values()
        for batch in distinct:
            contexts, arrays = self._arrays(batch)
            first, *others = self._keys(batch)
            function = programs.mask
            if self.mode != "mask":
                if first not in self._programs:
                    jobs[first] = functools.partial(
                        programs.prefill.lower,
                        self.params.weights,
                        *contexts[:2],
                        model=self._model,
                    )
                shapes = self._cache_shapes(batch, *contexts)
                function, arrays = programs.decode, (shapes, *arrays)
            for key, bound in zip(others, self._bound.values(), strict=True):
                if key not in self._programs:
                    jobs[key] = functools.partial(
                        function.lower,
                        *bound,
                        *arrays,
                        model=self._model.clone(score_rows=bound[1].wants.scores),
                        kind=type(bound[1]),
                    )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = pool.map(lambda lower: lower().compile(), jobs.values())
            for done, (key, program) in enumerate(zip(jobs, built, strict=True), 1):
                self._programs[key] = program
                if progress:
                    progress(done, len(jobs))
        for batch in distinct if jobs else ():
            if self.mode != "mask":  # once untimed: the first run loads programs
                self.score(dataclasses.replace(batch, rows=()))

    def score(self, batch: Batch) -> dict[str, Scores]:
        """Score one batch under every policy.

        Args:
          batch: from `plan`, compiled.
        """
        contexts, arrays = self._arrays(batch)
        first, *others = self._keys(batch)
        if self.mode != "mask":
            *read, rows = contexts
            cache = self._programs[first](self.params.weights, *read)
            cache = programs.fork(cache, rows, room=batch.room, model=self._model)
            arrays = jax.block_until_ready(cache), *arrays
        found = {}
        for key, (label, bound) in zip(others, self._bound.items(), strict=True):
            begin = time.perf_counter()
            nll, greedy, use = to_host(self._programs[key](*bound, *arrays))
            seconds = time.perf_counter() - begin
            scored = [
                (i, slice(row.steps - row.scored, row.steps))
                for i, row in enumerate(batch.rows)
            ]
            found[label] = Scores(
                [nll[at] for at in scored],
                [greedy[at] for at in scored],
                use.astype(np.int64),
                sum(row.steps for row in batch.rows),
                seconds,
            )
        return found

    def _keys(self, batch: Batch) -> tuple:
        """Of a batch's programs: what reads its contexts, then each policy's."""
        first = batch.contexts, batch.prefix
        room = *first, batch.steps, batch.room
        return first, *((label, *room) for label in self._bound)

    def _arrays(self, batch: Batch) -> tuple[tuple, tuple]:
        """On the devices, each row where it is computed."""
        return place_rows(batch.arrays(self.batch, self._parts), self._mesh)

    def _cache_shapes(
        self, batch: Batch, contexts: jax.Array, lengths: jax.Array, rows: jax.Array
    ) -> PagedCache:
        """Those of what rows go on from, on their devices."""
        model = {"model": self._model}
        read = programs.prefill.eval_shape(
            self.params.weights, contexts, lengths, **model
        )
        shapes = programs.fork.eval_shape(read, rows, room=batch.room, **model)
        mesh = self._mesh
        if mesh is None:
            return shapes

        def place(spec: Any, tree: Any) -> Any:
            where = NamedSharding(mesh, spec)
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
            )

        return jax.tree.map(place, PAGES, shapes)
