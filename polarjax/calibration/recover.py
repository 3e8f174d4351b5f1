"""`polarjax.recover`: text and routers in; what sparsity broke, mended."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from polarjax.calibration.calibrate import Texts
from polarjax.calibration.quality import (
    cost_and_warning,
    measure_quality,
    measure_recall,
    much_lost,
    quality_card,
)
from polarjax.evaluation import Mode, Perplexity, Recall
from polarjax.evaluation.measure import Progress
from polarjax.mesh.cut import (
    mesh_of,
    of_processes,
    place_routers,
    shard,
    whole_routers,
    writes,
)
from polarjax.mesh.processes import agree
from polarjax.params import Params, Tree
from polarjax.planning.sizes import positive
from polarjax.policies.adapter import as_stored, with_learned
from polarjax.settings import default_numbers
from polarjax.storage.writing import write_file
from polarjax.training import Recovery, Resume, train_updates
from polarjax.training.distance import divergence
from polarjax.training.loop import BEST_FILE, check_run, damaged, digest, with_steps
from polarjax.training.outcome import Trained
from polarjax.training.recovery import check_model, parameters

# Of each domain, blocks on which the divergence is watched.
_WATCHED = 8
# What is better by less, relatively, is a sum in another order: a GPU's add in any.
_GAIN = 1e-4


@dataclasses.dataclass(frozen=True)
class _Best:
    """What was best so far, also if the training is interrupted after it.

    Attributes:
      kl: on held-out text.
      step: after which it was; 0 before all.
      routers: nested dict of arrays by layer, such as `layers_3/heads/weight`.
    """

    kl: float
    step: int
    routers: Tree

    def save(self, file: Path) -> None:
        """Write it, whole or not at all."""
        flat: Tree = dict(traverse_util.flatten_dict(self.routers, sep="/"))
        stream = io.BytesIO()
        np.savez(stream, kl=self.kl, step=self.step, **flat)
        write_file(file, stream.getvalue())

    @classmethod
    def load(cls, file: Path) -> _Best:
        """Read what `save` wrote.

        Raises:
          ValueError: if it is damaged.
        """
        try:
            with file.open("rb") as stream, np.load(stream) as found:
                flat = dict(found)
            kl, step = float(flat.pop("kl")), int(flat.pop("step"))
            return cls(kl, step, traverse_util.unflatten_dict(flat, sep="/"))
        except Exception as error:  # what reads the archive raises all kinds
            raise ValueError(damaged(file, file.parent, error)) from error


@dataclasses.dataclass(frozen=True)
class Recovered(Trained):
    """A model with updates, and its quality on held-out text.

    Attributes:
      params: the model with routers, updates and budgets.
      before: by domain, KL divergence from dense of the model without updates, nats a
        token, every position sparse.
      after: the same with them.
      recall: by domain.
      perplexity: by domain and policy.
      facts: what it was made with and from, as JSON values.
      work: folder that keeps the training until `save` has written its outcome.
    """

    params: Params
    before: Mapping[str, float]
    after: Mapping[str, float]
    recall: Mapping[str, Recall]
    perplexity: Mapping[str, Mapping[str, Perplexity]]
    facts: Mapping[str, Any]
    work: Path | None = None

    @property
    def warning(self) -> str | None:
        """What to say of a model that is much worse than dense; None of others."""
        lost = much_lost(self.perplexity)
        return lost and (
            f"{lost}: more text helps (--tokens, now {self.facts['tokens']:,}), a "
            "higher --rank, or a higher --density"
        )

    def card(self) -> dict[str, Any]:
        """What an adapter's card says of it, as JSON values."""
        return {
            **self.facts,
            **cost_and_warning(self.params, self.warning),
            "divergence": {
                name: [round(self.before[name], 5), round(self.after[name], 5)]
                for name in self.before
            },
            "recall": {name: found.card() for name, found in self.recall.items()},
            "quality": quality_card(self.perplexity),
        }


@default_numbers
def recover(
    params: Params,
    texts: Texts,
    recovery: Recovery,
    *,
    passes: float = 1.0,
    patience: int = 4,
    mode: Mode = "decode",
    mesh: Mesh | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Distil the dense model into the sparse one, and measure both.

    Args:
      params: the model with routers and budgets, and with a tokenizer.
      texts: what to read.
      recovery: settings.
      passes: over the text, if the settings say no steps.
      patience: looks at the divergence on held-out text, one each twentieth of the
        steps, without a new best one, by a ten-thousandth, after which the training
        ends. What was best is what is kept.
      mode: how perplexities are measured.
      mesh: of `polarjax.mesh.cut.make_mesh`; None for where `params` is.
      work: folder that keeps the training, which all processes see, until what is
        returned is saved by its `save`; None for none.
      progress: called as the work goes on.

    Raises:
      FileNotFoundError: if a text does not exist.
      ValueError: if a text is too short, the model has no routers, or a setting is
        out of range.
    """
    say = progress or (lambda *_: None)
    # Before any text is read or written.
    check_model(params, recovery)
    positive("patience", patience)
    check_run(recovery, texts.blocks(params.config)[1], passes)
    if mesh is not None:
        params = shard(params, mesh)
    corpus = texts.read(params, say)
    recovery = with_steps(recovery, len(corpus.blocks), passes)
    facts = {
        **texts.facts(corpus),
        "recovery": dataclasses.asdict(recovery),
        "budgets": list(params.policy.learned.budgets),
        "weights_dtype": str(params.dtype),
    }
    before = whole_routers(params)
    start = [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(before)]
    whose = {
        "model_hash": params.config.model_hash,
        "routers_sha256": digest(np.concatenate([*start, np.zeros(0, np.float32)])),
    }
    if of_processes(mesh_of(params.weights)):
        agree({**facts, **whose}, "model, text or setting")
    resume = Resume(work, facts={**facts, **whose}) if work else None
    watched = np.concatenate([held[:_WATCHED] for held in corpus.held_out.values()])
    every = max(1, (recovery.steps or 1) // 20)
    best = _Best(divergence(params, watched), 0, before)
    last, file = best.kl, work / BEST_FILE if work else None
    if file and file.exists():
        best = _Best.load(file)

    def settled(trained: Params, step: int) -> bool:
        nonlocal best, last
        if step % every and step != recovery.steps:
            return False
        last = divergence(trained, watched)
        if last < best.kl * (1 - _GAIN):
            # The step takes its own.
            mine = jax.tree.map(np.array, whole_routers(trained))
            best = _Best(last, step, mine)
            if file and writes(mesh_of(params.weights)):
                best.save(file)
        return step // every - best.step // every >= patience

    begin = time.perf_counter()
    train_updates(
        params,
        corpus.blocks,
        recovery,
        resume=resume,
        progress=lambda p: say(
            f"recovering: KL {p.metrics['kl']:.4f}, held out {last:.4f}",
            p.step,
            p.steps,
        ),
        stop=settled,
    )
    facts["training_seconds"] = round(time.perf_counter() - begin, 1)
    routers = as_stored(jax.tree.map(jnp.asarray, best.routers))
    facts["parameters"] = parameters(routers)
    routers = place_routers(routers, params.config, mesh_of(params.weights))
    # Thresholds were of the routers before.
    found = with_learned(params, routers=routers, thresholds=())
    say("divergence on held-out text", 0, 1)
    before, after = (
        {name: divergence(model, held) for name, held in corpus.held_out.items()}
        for model in (params, found)
    )
    say("divergence on held-out text", 1, 1)
    recall = measure_recall(found, corpus.held_out)
    quality = measure_quality(found, corpus.held_out, mode, say)
    return Recovered(found, before, after, recall, quality, facts, work)
