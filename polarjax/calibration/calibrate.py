"""`polarjax.calibrate`: text in; routers, budgets and what they are worth out."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from polarjax.calibration.contract import Contract, Terms, keep_promise
from polarjax.calibration.quality import (
    cost_and_warning,
    measure_quality,
    measure_recall,
    much_lost,
    quality_card,
    windows,
)
from polarjax.calibration.search import Search, search_budgets
from polarjax.config import ModelConfig
from polarjax.engine import Tokenizer, start_token
from polarjax.evaluation import Mode, Perplexity, Recall, router_recall
from polarjax.evaluation.measure import Progress
from polarjax.mesh.cut import mesh_of, of_processes, shard
from polarjax.mesh.processes import agree
from polarjax.params import Params
from polarjax.planning.sizes import above_zero, at_least, positive, up_to_context
from polarjax.policies.adapter import as_stored, with_learned
from polarjax.settings import default_numbers
from polarjax.training import (
    Corpus,
    Resume,
    RouterTraining,
    Source,
    read_corpus,
    train_routers,
    write_blocks,
)
from polarjax.training.loop import check_run, digest, with_steps
from polarjax.training.neuron_budgets import neuron_budgets
from polarjax.training.outcome import Trained
from polarjax.training.thresholds import score_thresholds, sorted_scores
from polarjax.training.train import check_training

# Of the text learned from, blocks on which thresholds are found.
_THRESHOLD_BLOCKS = 128


@dataclasses.dataclass(frozen=True)
class Texts:
    """What is read of the sources.

    Attributes:
      sources: text, by weight.
      tokens: to learn from, over all sources.
      context: tokens per block; None for 512, or the model's context if that is less.
      held_out: tokens of each source to measure on, from behind those it is learned
        from.
      seed: of text that the model writes itself.
    """

    sources: Sequence[Source]
    tokens: int = 400_000
    context: int | None = None
    held_out: int = 16_384
    seed: int = 0

    def __post_init__(self) -> None:
        positive("tokens", self.tokens)
        positive("held_out", self.held_out)
        at_least("seed", self.seed, 0)

    def blocks(self, config: ModelConfig) -> tuple[int, int, int]:
        """Tokens of a block, blocks to learn from, and of each source to measure on.

        Raises:
          ValueError: if a number leaves too few of them.
        """
        context = up_to_context("context", self.context, 512, config)
        at_least("context", context, 2)
        blocks, held = self.tokens // context, self.held_out // context
        if blocks < 1:
            raise ValueError(
                f"tokens is {self.tokens}: there must be at least one block of "
                f"{context} to learn from"
            )
        if held < 2:
            raise ValueError(
                f"held_out is {self.held_out}: there must be at least two blocks of "
                f"{context} tokens to measure on"
            )
        return context, blocks, held

    def read(self, params: Params, progress: Progress | None = None) -> Corpus:
        """Blocks to learn from and to measure on.

        Raises:
          FileNotFoundError: if a source does not exist.
          ValueError: if a number or a source is not right.
        """
        config, say = params.config, progress or (lambda *_: None)
        tokenizer = Tokenizer.require(config, "calibration")
        context, blocks, held = self.blocks(config)

        def write(count: int) -> np.ndarray:
            return write_blocks(
                params,
                start_token(tokenizer, config),
                context,
                count,
                batch=512,
                seed=self.seed,
                progress=lambda done, total: say("writing text", done, total),
            )

        say("reading text", 0, 1)
        corpus = read_corpus(self.sources, tokenizer, context, blocks, held, write)
        say("reading text", 1, 1)
        return corpus

    def facts(self, corpus: Corpus) -> dict[str, Any]:
        """What an adapter's card says of them, as JSON values."""
        return {
            "texts": [
                {"name": s.name, "weight": round(s.weight, 6)} for s in self.sources
            ],
            "tokens": int(corpus.blocks.size),
            "tokens_sha256": digest(corpus.blocks),
            "held_out_tokens": {k: int(v.size) for k, v in corpus.held_out.items()},
            "held_out_sha256": {k: digest(v) for k, v in corpus.held_out.items()},
            "context": int(corpus.blocks.shape[1]),
            "seed": self.seed,
        }


@dataclasses.dataclass(frozen=True)
class Calibration(Trained):
    """Trained routers and their quality on held-out text.

    Attributes:
      params: the model with the routers and budgets.
      recall: by domain, of the routers and of chance.
      perplexity: by domain and policy (Dense, Oracle, Polar, Random), decoded at the
        budgets.
      contract: what may be promised; None if nothing was asked.
      facts: what it was made with and from, as JSON values.
      work: folder that keeps the training until `save` has written its outcome.
    """

    params: Params
    recall: Mapping[str, Recall]
    perplexity: Mapping[str, Mapping[str, Perplexity]]
    contract: Contract | None
    facts: Mapping[str, Any]
    work: Path | None = None

    @property
    def warning(self) -> str | None:
        """What to say of routers that cost much quality; None of others."""
        promised = self.contract and self.contract.max_drop
        lost = much_lost(self.perplexity, promised)
        return lost and (
            f"{lost}: more text helps (--tokens, now {self.facts['tokens']:,}), "
            "`polarjax recover` on this adapter, a higher --density, or a promise "
            "(--max-drop 1%), for which budgets are searched layer by layer"
        )

    def card(self) -> dict[str, Any]:
        """What an adapter's card says of it, as JSON values."""
        card = {
            **self.facts,
            **cost_and_warning(self.params, self.warning),
            "recall": {name: found.card() for name, found in self.recall.items()},
            "quality": quality_card(self.perplexity),
        }
        if self.contract:
            card["contract"] = self.contract.card()
        return card


@default_numbers
def calibrate(
    params: Params,
    texts: Texts,
    training: RouterTraining,
    *,
    passes: float = 1.0,
    terms: Terms | None = None,
    target_recall: float | None = None,
    mode: Mode = "decode",
    mesh: Mesh | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Train every layer's routers, and measure them on text they have not seen.

    Args:
      params: the model, with a tokenizer.
      texts: what to read.
      training: settings.
      passes: over the text, if the settings say no steps.
      terms: of a contract, for which budgets are searched layer by layer; None for
        the uniform ones of `training.density`.
      target_recall: stop the training when the routers' mean recall on the held-out
        text reaches it; None to go on to the end.
      mode: how perplexities are measured; a contract has its own.
      mesh: of `polarjax.mesh.cut.make_mesh`, for everything that is done: the model
        is cut over its axis "tp", batches over "dp", which must divide
        `training.batch`. None for where `params` is.
      work: folder that keeps the training, which all processes see, until what is
        returned is saved by its `save`; None for none.
      progress: called as the work goes on.

    Raises:
      FileNotFoundError: if a text does not exist.
      ValueError: if a text is too short, or a setting is out of range.
    """
    say = progress or (lambda *_: None)
    check_training(params.config, training)
    if target_recall is not None:
        above_zero("target_recall", target_recall, 1)
    _check_texts(params.config, texts, training, passes, terms)
    if mesh is not None:
        params = shard(params, mesh)
    corpus = texts.read(params, say)
    training = with_steps(training, len(corpus.blocks), passes)
    made = {
        **texts.facts(corpus),
        "training": dataclasses.asdict(training),
        "weights_dtype": str(params.dtype),
    }
    facts = {**made, "model_hash": params.config.model_hash}
    if of_processes(mesh_of(params.weights)):
        asked = terms and dataclasses.asdict(terms)
        agree([facts, asked, target_recall, mode], "model, text or setting")
    resume = Resume(work, facts=facts) if work else None
    few = [held[:4] for held in corpus.held_out.values()]
    every = max(1, (training.steps or 1) // 20)

    def enough(trained: Params, step: int) -> bool:
        if target_recall is None or step % every:
            return False
        return router_recall(trained, few).mean >= target_recall

    begin = time.perf_counter()
    trained = train_routers(
        params,
        corpus.blocks,
        training,
        resume=resume,
        progress=lambda p: say(
            f"training: loss {p.metrics['loss']:.4f}, recall {p.metrics['recall']:.3f}",
            p.step,
            p.steps,
        ),
        stop=enough,
    )
    made["training_seconds"] = round(time.perf_counter() - begin, 1)
    trained = with_learned(trained, routers=as_stored(trained.routers))
    say("recall on held-out text", 0, 1)
    recall = measure_recall(trained, corpus.held_out)
    say("recall on held-out text", 1, 1)
    if training.neuron_rank:
        say("neuron budgets", 0, 1)
        trained, made["neurons"] = _with_neuron_budgets(trained, corpus)
        say("neuron budgets", 1, 1)
    say("thresholds", 0, 1)
    scores = sorted_scores(trained, evenly(corpus.blocks, _THRESHOLD_BLOCKS))
    say("thresholds", 1, 1)
    contract = None
    if terms is not None:
        trained, contract = _with_contract(trained, corpus, scores, terms, say)
    budgets = trained.policy.learned.budgets
    thresholds = score_thresholds(scores, budgets, trained.config.kv_heads)
    trained = with_learned(trained, thresholds=thresholds)
    together = terms.batch if terms else 16
    quality = measure_quality(trained, corpus.held_out, mode, say, together)
    return Calibration(trained, recall, quality, contract, made, work)


def _check_texts(
    config: ModelConfig,
    texts: Texts,
    training: RouterTraining,
    passes: float,
    terms: Terms | None,
) -> None:
    """Raise unless the text will do for what is asked, before any of it is read."""
    if terms and terms.adaptive and training.loss != "bce":
        raise ValueError(
            f"loss {training.loss!r} gives scores that do not compare between tokens, "
            "as budgets that are means need: use loss 'bce', or fixed budgets (--fixed)"
        )
    _, blocks, held = texts.blocks(config)
    if terms and held < 3:
        raise ValueError(
            "a contract needs three blocks of each text to measure on, one to search "
            f"budgets and two to test them: raise held_out, now {texts.held_out}"
        )
    if training.neuron_rank and blocks < 2:
        raise ValueError(
            f"neuron routers need two blocks at the least: raise tokens, now "
            f"{texts.tokens}"
        )
    check_run(training, blocks, passes)


def evenly(blocks: np.ndarray, most: int) -> np.ndarray:
    """So many blocks from all over the text: neighbours are of one source and author.

    Args:
      blocks: int32[n, t].
      most: blocks to take; all, if there are no more.
    """
    count = min(most, len(blocks))
    return blocks[np.linspace(0, len(blocks) - 1, count).astype(int)]


def _with_neuron_budgets(
    params: Params, corpus: Corpus
) -> tuple[Params, dict[str, Any]]:
    """Budgets from the text learned from, and their recall on the held-out one."""
    held = np.concatenate(list(corpus.held_out.values()))
    sizes = tuple(b for b in (1, 8, 64) if 2 * b <= min(len(held), len(corpus.blocks)))

    most = 16 * sizes[-1]
    learned_from = evenly(corpus.blocks, most)
    budgets, found = neuron_budgets(
        params, learned_from, sizes, held_out=evenly(held, most)
    )
    total = params.config.neurons
    card = {
        str(batch): {
            "density": round(float(np.mean(counts[1:]) / total), 4),
            "union": round(float(union.mean() / total), 4),
            "recall": [round(float(x), 4) for x in reached],
        }
        for (batch, counts), union, reached in zip(
            budgets, found.union, found.reached(budgets), strict=True
        )
    }
    return with_learned(params, neuron_budgets=budgets), card


def _with_contract(
    params: Params, corpus: Corpus, scores: np.ndarray, terms: Terms, say: Progress
) -> tuple[Params, Contract]:
    """The sparsest budgets that the terms allow.

    The first quarter of each domain's held-out text is for the search, whose settings
    the rest has not seen.
    """
    search, test = {}, {}
    for name, held in corpus.held_out.items():
        cut = max(1, len(held) // 4)
        search[name], test[name] = windows(held[:cut]), windows(held[cut:])
    thresholds = None
    if terms.adaptive:
        k = params.config.kv_heads
        thresholds = functools.partial(score_thresholds, scores, kv_heads=k)
    path = search_budgets(
        params,
        search,
        Search(terms.max_drop, terms.batch, terms.context),
        thresholds=thresholds,
        progress=say,
    )
    contract = keep_promise(
        params,
        path,
        test,
        terms,
        thresholds=thresholds,
        progress=say,
    )
    budgets: Any = {"budgets": contract.budgets, "adaptive": terms.adaptive}
    if contract.budgets is None:  # the promise is then the dense model
        k, layers = params.config.kv_heads, params.config.layers
        budgets = {"budgets": (k,) * layers, "neuron_budgets": ()}
    return with_learned(params, **budgets), contract
