"""A model as EleutherAI's lm-eval wants it, on our scorer and on `generate`.

The one module that cannot be imported without lm-eval; `run_lm_eval` says so in words.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from pallas_kernels import Implementation
from polarjax.engine import Tokenizer, start_token
from polarjax.engine.generate import generate
from polarjax.evaluation.batches import Continuation, Mode
from polarjax.evaluation.measure import Journal, Progress, measure
from polarjax.evaluation.perplexity import rolling_items
from polarjax.evaluation.scoring import Scorer
from polarjax.params import Params
from polarjax.planning.sizes import positive
from polarjax.policy import Policy

_log = logging.getLogger(__name__)
_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class Read(NamedTuple):
    """KV groups that were read, and how many there were to read."""

    groups: float = 0.0
    there: float = 0.0


class PolarLM(TemplateLM):
    """A model for lm-eval: `lm_eval.simple_evaluate(PolarLM(params, policy), ...)`.

    Tokens, windows and truncation are those of lm-eval's own Hugging Face model.

    Args:
      params: the model; its checkpoint must have a tokenizer.
      policy: not yet bound. Or several by label: they are scored in one pass, which
        reads contexts once for all, and the one that `label` names answers.
      mode: how continuations are scored, see `polarjax.evaluation.scoring`; texts are
        generated as `generate` does it in any mode.
      batch: requests computed together.
      implementation: of the kernels; None chooses by device.
      journal: batches found there are not scored again, others are added to it. One
        is good for one model, mode, batch size and set of policies.
      progress: called as progress(what, units done, units in all).

    Attributes:
      policies: by label.
      label: of the policy that answers.
      read: by policy and task, what was read where it computed sparsely.
      truncated: by task and kind of request, how many were cut from the left.

    Raises:
      ValueError: if there is no tokenizer, or (once it scores) if the mode is unknown
        or a policy does not fit the model.
    """

    def __init__(
        self,
        params: Params,
        policy: Policy | Mapping[str, Policy],
        *,
        mode: Mode = "decode",
        batch: int = 16,
        implementation: Implementation | None = None,
        journal: Journal | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        alone = isinstance(policy, Policy)
        self.policies = {"policy": policy} if alone else dict(policy)
        self.label = next(iter(self.policies))
        self.params = params
        self.batch_size = positive("batch", batch)
        self.tokenizer: Any = Tokenizer.require(params.config, "lm-eval")
        self.read: dict[tuple[str, str], Read] = {}
        self.truncated: dict[tuple[str, str], int] = {}
        self._mode: Mode = mode
        self._implementation: Implementation | None = implementation
        self._journal: Journal = {} if journal is None else journal
        self._progress = progress or (lambda *_: None)
        self._task = ""  # whose requests are being answered

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(
            self.params,
            self.policies,
            mode=self._mode,
            batch=self.batch_size,
            implementation=self._implementation,
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text: the tokenizer's own."""
        ends = self._own_ends()
        return [*ends, *self.params.config.eos_ids, self.prefix_token_id][0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for the start of a text, as lm-eval chooses it.

        The tokenizer's own, by which models are compared, not the configuration's.
        """
        config = self.params.config
        start = self.tokenizer.bos_id
        own = [*([] if start is None else [start]), *self._own_ends()]
        ends = start_token(self.tokenizer, config)
        return [*own, *config.bos_ids, *config.eos_ids, ends][0]

    def _own_ends(self) -> list[int]:
        end = self.tokenizer.eos_id
        return [] if end is None else [end]

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self.params.config.context

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens, where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Tells checkpoints apart in lm-eval's cache of requests."""
        return str(Path(self.params.config.folder).resolve()).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text.

        Args:
          string: the text.
          add_special_tokens: whether to add what the tokenizer starts texts with; None
            for all texts but those that start with the prefix token.
          **kwargs: of no use here.
        """
        del kwargs
        if add_special_tokens is None:
            prefix = self.tokenizer.backend.id_to_token(self.prefix_token_id)
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self.tokenizer.encode(string, special=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the model's template.

        Args:
          chat_history: each with "role" and "content".
          add_generation_prompt: whether an answer is to follow; else the last message
            is the beginning of one.

        Raises:
          ValueError: if the checkpoint has no template, or it fails.
        """
        chat = functools.partial(
            self.tokenizer.chat,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return chat(chat_history)
        except ValueError:
            rest = [m for m in chat_history if m["role"] != "system"]
            if self.tokenizer.chat_template is None or len(rest) == len(chat_history):
                raise
            _log.warning("the chat template failed: it is tried without system message")
            return chat(rest)

    def loglikelihood(
        self, requests: list, disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Score continuations.

        Args:
          requests: of lm-eval, whose arguments are (context, continuation).
          disable_tqdm: whether to do without lm-eval's own bars.

        Returns:
          Log-likelihood in nats, and whether every token was the most probable one.

        Raises:
          ValueError: if a continuation has no token, or more than the model's context.
        """
        score = super().loglikelihood
        return self._by_task(requests, lambda part: score(part, disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: list, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        most, items, cut = self.max_length, [], 0
        for text, context, continuation in requests:
            name = f"the continuation {text[1][:40]!r} of task {self._task!r}"
            if len(continuation) > most:
                raise ValueError(
                    f"{name} has {len(continuation)} tokens, the model's context is "
                    f"{most}"
                )
            # The last token is not read: one more than the context can be scored.
            tokens = (*context, *continuation)
            items.append(Continuation(tokens[-most - 1 :], len(continuation), name))
            cut += len(tokens) > most + 1
        self._note_truncated("loglikelihood", cut, len(requests))
        nll, greedy = self._measure(items)
        answers = [(-float(x), bool(best)) for x, best in zip(nll, greedy, strict=True)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list, disable_tqdm: bool = True
    ) -> list[float]:
        """Score whole texts, in windows as wide as the model's context.

        Args:
          requests: of lm-eval, whose arguments are (text,).
          disable_tqdm: there is no bar.

        Returns:
          Log-likelihoods in nats.
        """
        del disable_tqdm
        return self._by_task(requests, self._rolling)

    def _rolling(self, requests: list) -> list[float]:
        start, items, counts = self.prefix_token_id, [], []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            new = rolling_items(tokens, self.max_length, start) if tokens else []
            items += new
            counts.append(len(new))
        nll, _ = self._measure(items)
        parts = np.split(-nll, np.cumsum(counts)[:-1])
        answers = [float(part.sum()) for part in parts]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        """Continue prompts.

        Args:
          requests: of lm-eval, whose arguments are (prompt, settings).
          disable_tqdm: there is no bar.

        Returns:
          New texts, cut before a stop string.

        Raises:
          ValueError: if there is no room for a prompt beside the new tokens.
        """
        del disable_tqdm
        return self._by_task(requests, self._generate)

    def _generate(self, requests: list) -> list[str]:
        def key(request: Any) -> str:
            return json.dumps(request.args[1], sort_keys=True, default=str)

        texts: dict[int, str] = {}
        for places in _grouped(requests, key).values():
            settings = self._settings(requests[places[0]].args[1])
            room = self.max_length - settings["max_new_tokens"]
            if room < 1:
                raise ValueError(
                    f"task {self._task!r} asks for {settings['max_new_tokens']} new "
                    f"tokens: the model's context of {self.max_length} has no room for "
                    "a prompt beside them"
                )
            whole = [self.tok_encode(requests[i].args[0]) for i in places]
            cut = sum(len(ids) > room for ids in whole)
            self._note_truncated("generate_until", cut, len(whole))
            prompts = {
                i: ids[-room:] or [self.prefix_token_id]
                for i, ids in zip(places, whole, strict=True)
            }
            places = sorted(places, key=lambda i: -len(prompts[i]))
            for at in range(0, len(places), self.batch_size):
                some = places[at : at + self.batch_size]
                # Seeds count on, so that no two requests draw alike.
                found = self._write([prompts[i] for i in some], len(texts), settings)
                for i, text in zip(some, found, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial(
                        "generate_until", requests[i].args, text
                    )
                what = f"{self._task}: generating, {self.label}"
                self._progress(what, len(texts), len(requests))
        return [texts[i] for i in range(len(requests))]

    def _settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of `generate`, from lm-eval's."""
        found: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        if ignored := sorted(found.keys() - _SETTINGS):
            _log.warning("task %s: ignored %s", self._task, ", ".join(ignored))
        sampled = {"temperature": float, "top_k": int, "top_p": float}
        return {
            "max_new_tokens": found["max_gen_toks"],
            "stop": [stop for stop in found["until"] if stop],
            "stop_ids": sorted({*self.params.config.eos_ids, *self._own_ends()}),
            **{
                name: kind(found[name])
                for name, kind in sampled.items()
                if found["do_sample"] and found.get(name) is not None
            },
        }

    def _write(
        self, prompts: list[list[int]], seed: int, settings: Mapping[str, Any]
    ) -> list[str]:
        out = generate(
            self.params,
            prompts,
            policy=self.policies[self.label],
            seed=seed,
            implementation=self._implementation,
            **settings,
        )
        if out.stats.density:
            there = out.stats.new_tokens * self.params.config.kv_heads
            there *= len(out.stats.density)
            self._note_read(float(np.mean(out.stats.density)) * there, there)
        assert out.texts is not None
        return out.texts

    def _measure(self, items: list[Continuation]) -> tuple[np.ndarray, np.ndarray]:
        if not items:
            return np.zeros(0), np.zeros(0, bool)
        digest = hashlib.sha256()
        for item in items:
            digest.update(np.array([*item.tokens, -item.scored], np.int32).tobytes())
        task = self._task
        found = measure(
            self._scorer,
            items,
            name=f"{task or 'lm-eval'}/{digest.hexdigest()[:16]}",
            journal=self._journal,
            progress=lambda what, *counts: self._progress(f"{task}: {what}", *counts),
        )[self.label]
        self._note_read(float(found.use.sum()), found.positions * found.use.size)
        return found.nll, found.greedy

    def _by_task(self, requests: list, answer: Callable[[list], list]) -> list:
        """Answer each task's requests apart, to know what each one reads."""
        answers = [None] * len(requests)
        for task, places in _grouped(requests, lambda r: r.task_name or "").items():
            self._task = task
            found = answer([requests[i] for i in places])
            for i, one in zip(places, found, strict=True):
                answers[i] = one
        return answers

    def density(self, label: str, tasks: Sequence[str]) -> float | None:
        """KV groups read / KV groups there, over tokens that were computed sparsely.

        Args:
          label: of the policy.
          tasks: by name.

        Returns:
          The density, mean over layers; None if nothing was computed.
        """
        read = [self.read.get((label, task), Read()) for task in tasks]
        there = sum(part.there for part in read)
        return sum(part.groups for part in read) / there if there else None

    def _note_read(self, groups: float, there: float) -> None:
        before = self.read.get((self.label, self._task), Read())
        after = Read(before.groups + groups, before.there + there)
        self.read[self.label, self._task] = after

    def _note_truncated(self, kind: str, cut: int, total: int) -> None:
        place = self._task, kind
        if cut and place not in self.truncated:  # once for all policies
            self.truncated[place] = cut
            _log.warning(
                "%d of %d %s requests of task %s were cut from the left to fit the "
                "model's context of %d tokens",
                cut,
                total,
                kind,
                self._task,
                self.max_length,
            )


def _grouped(values: Sequence, key: Callable[[Any], str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(key(value), []).append(i)
    return groups
