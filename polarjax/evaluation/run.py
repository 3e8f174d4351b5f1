"""`polarjax.evaluation.evaluate`: everything that is asked for, as one JSON result."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pallas_kernels import Implementation, resolve
from polarjax.engine import Tokenizer, start_token
from polarjax.evaluation import statistics
from polarjax.evaluation.batches import Mode
from polarjax.evaluation.damage import check_lengths, measure_damage
from polarjax.evaluation.journal import FileJournal
from polarjax.evaluation.measure import Journal, Progress, measure, missing
from polarjax.evaluation.perplexity import rolling_items, strided_items, window_items
from polarjax.evaluation.recall import router_recall
from polarjax.evaluation.record import digest_of, environment, model, now
from polarjax.evaluation.results import (
    DENSE,
    FORMAT,
    damage_result,
    perplexity_result,
    task_result,
)
from polarjax.evaluation.scoring import Scorer
from polarjax.evaluation.tasks import read_rows, task_items
from polarjax.mesh.cut import mesh_of, of_processes, writes
from polarjax.mesh.processes import agree, from_main
from polarjax.params import Params
from polarjax.planning.sizes import positive, up_to_context
from polarjax.policy import Dense, Policy
from polarjax.settings import default_numbers
from polarjax.training.text import open_text

Kind = Literal["windows", "strided", "words"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to evaluate, and how.

    Attributes:
      policies: by label, not yet bound. Dense is added: everything is paired with it.
      mode: how continuations are scored, see `polarjax.evaluation.scoring`.
      batch: rows computed together.
      tasks: JSONL files.
      limit: most rows of each; None for all.
      text: file for perplexity, generation and recall.
      tokens: most of them, from its start; None for all.
      kinds: of perplexity.
      window: tokens per window; None for 2048, or the model's context if that is less.
      prefix: tokens of each window (of the first, strided) that are not scored; None
        for 64 in "decode", which reads them dense, and else 1.
      stride: tokens by which strided windows move; None for half a window.
      new_tokens: to generate for each prompt; 0 for no generation.
      prompts: most of them, each the first `prompt_tokens` of a window of the text.
      prompt_tokens: of each prompt.
      implementation: of the kernels; None chooses by device.
    """

    policies: Mapping[str, Policy]
    mode: Mode = "decode"
    batch: int = 16
    tasks: Sequence[str | Path] = ()
    limit: int | None = None
    text: str | Path | None = None
    tokens: int | None = None
    kinds: Sequence[Kind] = ("windows",)
    window: int | None = None
    prefix: int | None = None
    stride: int | None = None
    new_tokens: int = 0
    prompts: int = 64
    prompt_tokens: int = 64
    implementation: Implementation | None = None


@default_numbers
def evaluate(
    params: Params,
    settings: Settings,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    adapter: str | Path | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Path | None]:
    """Measure the quality of policies on tasks, a text, and what the model writes.

    Args:
      params: the model, with a tokenizer, on one device or on the mesh that it was
        loaded on. Where that spans processes, all of them call this alike, with the
        same texts and tasks; process 0 alone writes.
      settings: what to do.
      out: file to write, if its name ends in ".json"; else a folder in which it is
        named after what decides its numbers; None for none. Work that was cut short is
        taken up where it stopped, batch by batch; what is done is not done again.
      overwrite: whether to replace what is there, once the new result is whole.
      adapter: folder that the routers came from, for the record.
      command: that asked for it, for the record.
      progress: called as the work goes on.

    Returns:
      The result, as JSON values, which `polarjax.evaluation.report.page` draws; and its
      file.

    Raises:
      FileExistsError: if `out` holds another result.
      FileNotFoundError: if there is no such task or text.
      ValueError: if a setting, a row or the model is not right; it is named.
    """
    path = None if out is None else Path(out)
    if path is not None and path.suffix != ".json" and path.is_file():
        raise FileExistsError(
            f"{path} is a file, but no .json: pass the JSON file to write, or a folder"
        )
    work = _Work(params, settings)
    setup, made = work.facts(adapter), environment()
    facts = {"made": made, "setup": setup, "digests": work.digests(), **work.inputs}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    mesh = mesh_of(params.weights)
    many = of_processes(mesh)
    shared = from_main if many else lambda value: value
    if many:
        agree(digest, "model, text, task or setting")

    if path is not None and (path.suffix != ".json" or path.is_dir()):
        name = f"{setup['checkpoint'] or 'model'}-{setup['mode']}-{digest[:8]}.json"
        path /= name
    file = path if writes(mesh) else None
    found = None
    if file is not None and file.exists() and not overwrite:
        found = _same(file, digest)
    if found := shared(found):
        return found, path
    opened = contextlib.nullcontext({})
    if file is not None:
        opened = FileJournal(file, facts, overwrite)
    with opened as journal:
        # All processes go on where process 0 stopped.
        known = shared(dict(journal))
        journal = known if file is None else journal
        parts = work.run(journal, progress)
        about = {"command": list(command), "finished": now(), **made, "facts": digest}
        head = {"format_version": FORMAT, "kind": "polarjax eval"}
        result = {**head, "made": about, "setup": setup, **parts}
        if isinstance(journal, FileJournal):
            journal.finish(result)
    return result, path


def _same(path: Path, digest: str) -> dict[str, Any] | None:
    """What a file holds, if it is the result of the same facts."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["made"]["facts"] == digest else None
    except (ValueError, KeyError, TypeError):
        return None


class _Work:
    """Settings that were checked, and their files read, before anything is computed."""

    def __init__(self, params: Params, settings: Settings) -> None:
        self.params, self.settings = params, settings
        self.policies: dict[str, Policy] = {
            DENSE: Dense(),
            **settings.policies,
        }
        if not isinstance(self.policies[DENSE], Dense):
            raise ValueError(
                f"the label {DENSE!r} is the dense model's: choose another"
            )
        for name in ("batch", "limit", "tokens", "window", "prefix", "stride"):
            if getattr(settings, name) is not None:
                positive(name, getattr(settings, name))
        if not settings.tasks and settings.text is None:
            raise ValueError("nothing to evaluate: pass tasks (--tasks) or a --text")
        if settings.new_tokens and settings.mode != "decode":
            raise ValueError(
                f"generation is what decoding does: there is no mode {settings.mode!r} "
                "of it; leave one of --generation and --mode out"
            )
        if settings.new_tokens and settings.text is None:
            raise ValueError("generation takes its prompts from a text: pass --text")
        if settings.new_tokens and len(self.policies) == 1:
            raise ValueError("generation compares with Dense: pass a sparse policy")
        tokenizer = Tokenizer.require(params.config, "an evaluation")
        self.inputs: dict[str, Any] = {}
        self.tasks, self.texts, self.prompts = {}, {}, []
        for path in settings.tasks:
            name = Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
            if name in self.tasks:
                raise ValueError(f"two tasks are named {name!r}: rename {path}")
            rows = read_rows(path, settings.limit)
            self.tasks[name] = rows, task_items(rows, tokenizer, params.config)
            self.inputs[f"task {name}"] = {**digest_of(path), "limit": settings.limit}
        if settings.text is not None:
            self._read_text(settings.text, tokenizer)
        self.work = {f"task {name}": items for name, (_, items) in self.tasks.items()}
        for kind, (_, items) in self.texts.items():
            self.work[f"perplexity {kind}"] = items
        sizes = {name: min(settings.batch, len(x)) for name, x in self.work.items()}
        by_size = {size: self._scorer(size) for size in set(sizes.values())}
        self.scorers = {name: by_size[size] for name, size in sizes.items()}

    def _scorer(self, batch: int) -> Scorer:
        return Scorer(
            self.params,
            self.policies,
            mode=self.settings.mode,
            batch=batch,
            implementation=self.settings.implementation,
        )

    def _read_text(self, path: str | Path, tokenizer: Tokenizer) -> None:
        s, config = self.settings, self.params.config
        window = up_to_context("window", s.window, 2048, config)
        with open_text(path) as file:
            text = file.read()
        ids = tokenizer.encode(text, special=False)
        if "windows" in s.kinds and min(len(ids), s.tokens or len(ids)) < window:
            raise ValueError(
                f"{path}: {min(len(ids), s.tokens or len(ids))} tokens are less than "
                f"one window of {window}: make --window smaller"
            )
        if s.tokens is not None and s.tokens < len(ids):
            ids = ids[: s.tokens]
            text = tokenizer.decode(ids)
        self.text = {"file": Path(path).name, "tokens": len(ids)}
        self.tokens = np.array(ids, np.int32)
        prefix = min(64, window // 2) if s.mode == "decode" else 1
        prefix = prefix if s.prefix is None else s.prefix
        stride = max(1, window // 2) if s.stride is None else s.stride
        start = start_token(tokenizer, config)
        source = digest_of(path)
        for kind in s.kinds:
            shape: dict[str, Any] = {"window": window, "prefix": prefix, "stride": None}
            if kind == "windows":
                items = window_items(ids, window, prefix)
            elif kind == "strided":
                items, shape["stride"] = (
                    strided_items(ids, window, stride, prefix),
                    stride,
                )
            elif kind == "words":
                items = rolling_items(ids, window, start)
                shape = {"window": window, "prefix": 0, "stride": None}
                shape |= {
                    "words": len(re.split(r"\s+", text)),
                    "bytes": len(text.encode()),
                }
            else:
                raise ValueError(f"no perplexity {kind!r}: windows, strided or words")
            self.texts[kind] = {**self.text, **shape}, items
            self.inputs[f"perplexity {kind}"] = {
                **source,
                **self.texts[kind][0],
            }
        if s.new_tokens:
            check_lengths([s.prompt_tokens], s.new_tokens, config.context)
            length = positive("prompt_tokens", s.prompt_tokens)
            starts = range(0, len(ids) - length + 1, s.new_tokens + length)
            self.prompts = [ids[at : at + length] for at in starts]
            self.prompts = self.prompts[: positive("prompts", s.prompts)]
            if not self.prompts:
                raise ValueError(f"{path} is too short for a prompt of {length} tokens")
            self.inputs["generation"] = {
                **source,
                "prompts": len(self.prompts),
                "prompt_tokens": length,
                "new_tokens": s.new_tokens,
            }

    def facts(self, adapter: str | Path | None) -> dict[str, Any]:
        """What decides the numbers, but for the texts and tasks."""
        s, config = self.settings, self.params.config
        return {
            **model(self.params, adapter),
            "mode": s.mode,
            "batch": s.batch,
            "implementation": resolve(s.implementation),
            "bootstrap_seed": statistics.SEED,
            "layers": config.layers,
            "kv_heads": config.kv_heads,
            "policies": {k: _describe(policy) for k, policy in self.policies.items()},
        }

    def digests(self) -> dict[str, str]:
        """Of every token that is scored or continued: they tell tokenizers apart."""
        work = {name: [x.tokens for x in items] for name, items in self.work.items()}
        work |= {"generation": self.prompts} if self.prompts else {}
        return {
            name: hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
            for name, tokens in work.items()
        }

    def run(self, journal: Journal, progress: Progress | None) -> dict[str, Any]:
        """Measure; what the journal has is not measured again."""
        say = progress or (lambda *_: None)
        plans = {name: self.scorers[name].plan(x) for name, x in self.work.items()}
        # All is compiled first: what remains then takes as long as it says.
        for scorer in set(self.scorers.values()):
            batches = [
                batch
                for name, plan in plans.items()
                if self.scorers[name] is scorer
                for batch in missing(plan, name, journal)
            ]
            scorer.compile(batches, lambda *counts: say("compiling", *counts))
        costs = {k: sum(map(self.scorers[k].cost, plan)) for k, plan in plans.items()}
        measured, done = {}, 0
        for name, items in self.work.items():

            def step(_, now: int, __, name=name, before=done) -> None:
                say(name, before + now, sum(costs.values()))

            measured[name] = measure(
                self.scorers[name], items, name=name, journal=journal, progress=step
            )
            done += costs[name]
        found: dict[str, Any] = {"tasks": {}, "perplexity": {}}
        for name, (rows, _) in self.tasks.items():
            facts = self.inputs[f"task {name}"]
            found["tasks"][name] = facts | task_result(rows, measured[f"task {name}"])
        for kind, (_, items) in self.texts.items():
            facts = self.inputs[f"perplexity {kind}"]
            scored = [item.scored for item in items]
            scores = measured[f"perplexity {kind}"]
            found["perplexity"][kind] = perplexity_result(facts, scored, scores)
        found["generation"] = self._damage(journal, say) if self.prompts else None
        found["recall"] = self._recall() if self.texts else None
        return found

    def _damage(self, journal: Journal, say: Progress) -> dict[str, Any]:
        s = self.settings
        damage = measure_damage(
            self.params,
            self.prompts,
            {k: policy for k, policy in self.policies.items() if k != DENSE},
            new_tokens=s.new_tokens,
            batch=s.batch,
            implementation=s.implementation,
            journal=journal,
            progress=say,
        )
        return self.inputs["generation"] | damage_result(damage, s.new_tokens)

    def _recall(self) -> dict[str, Any] | None:
        """Of the adapter's routers at its budgets, on the text's first tokens."""
        if not self.params.routers or not self.params.policy.learned.budgets:
            return None
        length = min(512, self.params.config.context, len(self.tokens))
        count = min(16, len(self.tokens) // length)
        blocks = self.tokens[: count * length].reshape(count, 1, length)
        found = router_recall(self.params, blocks)
        return {
            "file": self.text["file"],
            "tokens": int(blocks.size),
            "layers": list(range(1, self.params.config.layers)),
            "routers": found.routers.tolist(),
            "chance": found.chance.tolist(),
        }


def _describe(policy: Policy) -> dict[str, Any]:
    facts = policy.settings()
    return {"policy": type(policy).__name__.lower(), "density": None, **facts}
