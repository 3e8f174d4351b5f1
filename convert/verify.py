"""Is a converted model the same one? Its logits beside those of `transformers`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from rich.table import Table
from tokenizers import Tokenizer

from convert.core import token_ids, with_context
from convert.files import read_text
from convert.hub import locate
from convert.readers import open_source
from convert.rules import understand
from convert.same_tokens import Reference, same_tokens
from convert.source import ConversionError, Source, naming
from polarjax.config import ModelConfig
from polarjax.model import Decoder, check_weights
from polarjax.params import TOKENIZER_FILE, Params, Tree, read_folder
from polarjax.storage.repository import first_line

TOLERANCE = 1e-4
PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "1, 2, 3, 4, 5,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist",
    "It was the best of times, it was the worst of times, it was the age of wisdom, "
    "it was the age of foolishness, it was the epoch of belief, it was the epoch of "
    "incredulity, it was the season of Light, it was the season of Darkness, it was "
    "the spring of hope, it was the winter of despair, we had everything before us,",
)
_RANDOM = (1, 7, 23, 80)  # lengths of prompts for models without a tokenizer
_WITHOUT = "the checkpoint has no tokenizer: random token ids are compared, no texts"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A converted model beside its source, both computed in float32.

    Attributes:
      dtype: of the checkpoint; the reference's weights were rounded to it.
      prompts: how many.
      tokens: in all of them.
      relative_error: of the logits, Frobenius norm over a prompt's positions; the
        largest of all prompts.
      absolute_error: the largest of any logit.
      agreement: fraction of positions at which both put the same token first; ties to
        within the tolerance count.
      perplexities: of the prompts, transformers' and ours; NaN if no prompt has two
        tokens.
      uncrossed: a sliding window, in tokens, that no prompt is longer than; 0 if there
        is none.
      notes: what could not be compared, and why.
    """

    dtype: str
    prompts: int
    tokens: int
    relative_error: float
    absolute_error: float
    agreement: float
    perplexities: tuple[float, float]
    uncrossed: int
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether it is the same model."""
        return self.relative_error <= TOLERANCE and self.agreement == 1

    def table(self) -> Table:
        """For people."""
        agreed = round(self.agreement * self.tokens)
        title = f"{self.prompts} prompts, {self.tokens} tokens, {self.dtype} weights"
        table = Table("", "transformers", "polarjax", title=title)
        table.add_row(
            "perplexity of the prompts", *(f"{p:.5g}" for p in self.perplexities)
        )
        for name, value in (
            ("largest relative logit error", f"{self.relative_error:.2e}"),
            ("largest absolute logit error", f"{self.absolute_error:.2e}"),
            ("top-1 agreement", f"{agreed} of {self.tokens} tokens"),
        ):
            table.add_row(name, "", value)
        return table


def verify(
    source: str | Path,
    checkpoint: str | Path,
    prompts: Sequence[str] | None = None,
    *,
    context: int | None = None,
) -> Comparison:
    """Run prompts through `transformers` and through polarjax.

    First of all the configurations must be the same, the ids that start and end a
    text, and the tokenizers: prompts would show only some of what differs there. The
    prompts' ids are those of `transformers.AutoTokenizer`, which the checkpoint's own
    tokenizer must give too, of texts that tell tokenizers apart.
    Rounding the weights to bfloat16 or float16 is no error of the conversion: the
    reference's are rounded to the checkpoint's dtype too, and both compute in float32.
    No code of the checkpoint is run, and nothing is unpickled.

    Args:
      source: what was converted: a Hugging Face folder, a GGUF file, or an id of the
        hub.
      checkpoint: what `convert` made of it.
      prompts: texts; None for a few built-in ones, or random ids where the checkpoint
        has no tokenizer.
      context: that was asked for at the conversion; None for the source's own.

    Returns:
      How far the two are apart.

    Raises:
      ConversionError: if torch or transformers are missing, transformers cannot load
        the source or its tokenizer; if configuration or tokenizer differ, naming what
        does; or if a prompt is empty or too long, or none has two tokens.
      FileNotFoundError: if there is no checkpoint.
      ValueError: if it is damaged.
    """
    torch, transformers = libraries()
    source = locate(source)
    opened = open_source(source)
    if opened.ours_alone:
        raise ConversionError(f"{source}: {opened.ours_alone}")
    params = read_folder(checkpoint)
    _check_same(source, opened, params.config, context)
    check_weights(params.weights, params.config)
    texts = PROMPTS if prompts is None else prompts
    reference = _tokenizer(transformers, source, params.config, texts)
    notes = reference.notes if reference else (_WITHOUT,)
    tokens = _encode(prompts, params.config, reference)
    dtype = str(params.dtype)
    model = _reference(torch, transformers, source)
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
        theirs = [model(torch.tensor([ids])).logits[0].numpy() for ids in tokens]
    del model  # before there are our weights in float32 too
    found = _compare(params.config, dtype, tokens, theirs, _logits(params, tokens))
    return dataclasses.replace(found, notes=notes)


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines are left out.

    Raises:
      ConversionError: if there are none, or the file is not UTF-8.
      OSError: if there is no such file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is not UTF-8 text: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConversionError(f"{path} holds no prompts: write one a line")
    return prompts


def _check_same(
    source: Path, opened: Source, config: ModelConfig, context: int | None
) -> None:
    """Raise unless all but the tensors is what conversion makes of the source."""
    with naming(source):
        right, _ = understand(opened.config)
        right = right if context is None else with_context(right, context)
    ids, _ = token_ids(opened, right)
    ours = dataclasses.replace(
        config.architecture, bos_ids=config.bos_ids, eos_ids=config.eos_ids
    )
    theirs = dataclasses.replace(right.architecture, **ids)
    ours, theirs = (
        flatten_dict(dataclasses.asdict(c), sep=".") for c in (ours, theirs)
    )
    different = f"{config.folder} is not the same model as {source}"
    for name in theirs | ours:
        our, their = ours.get(name), theirs.get(name)
        if our != their:
            raise ConversionError(f"{different}: {name} is {our!r}, not {their!r}")
    path = Path(config.folder) / TOKENIZER_FILE
    stored = read_text(path) if path.exists() else None
    if not _same_tokenizer(stored, opened.files.get(TOKENIZER_FILE)):
        raise ConversionError(f"{different}: its {TOKENIZER_FILE} is another")


def _same_tokenizer(stored: str | None, right: str | None) -> bool:
    if stored == right or stored is None or right is None:
        return stored == right
    # Of a GGUF file it is rebuilt, and versions of the package write it differently.
    try:
        stored, right = (Tokenizer.from_str(t).to_str() for t in (stored, right))
    except Exception:  # the package raises bare ones, here for the stored one
        return False
    return stored == right


def _tokenizer(
    transformers: Any, source: Path, config: ModelConfig, texts: Sequence[str]
) -> Reference | None:
    """The source's tokenizer, which the checkpoint's agrees with; None without one."""
    path = Path(config.folder) / TOKENIZER_FILE
    if not path.exists():
        return None
    ours = Tokenizer.from_file(str(path))
    ours.no_padding()
    ours.no_truncation()
    return same_tokens(transformers, source, config.folder, ours, texts)


def _encode(
    prompts: Sequence[str] | None, config: ModelConfig, reference: Reference | None
) -> list[list[int]]:
    if reference is None:
        if prompts is not None:
            raise ConversionError(
                f"{config.folder} has no tokenizer for prompts: without any, random "
                "token ids are compared"
            )
        rng = np.random.default_rng(0)
        lengths = [min(n, config.context) for n in _RANDOM]
        return [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
    texts = PROMPTS if prompts is None else prompts
    tokens = [reference.encode(text) for text in texts]
    if prompts is None:
        tokens = [ids[: config.context] for ids in tokens]
    for i, ids in enumerate(tokens, 1):
        if not 1 <= len(ids) <= config.context:
            raise ConversionError(
                f"prompt {i} has {len(ids)} tokens; it may have 1 to {config.context}"
            )
        if max(ids) >= config.vocab_size:
            raise ConversionError(
                f"prompt {i} has token {max(ids)}, but the vocabulary is "
                f"{config.vocab_size}"
            )
    if max(map(len, tokens), default=0) < min(2, config.context):
        raise ConversionError(
            "no prompt has two tokens: attention would not be compared; give a longer "
            "one"
        )
    return tokens


def libraries() -> tuple[Any, Any]:
    """The packages torch and transformers, which a comparison needs.

    Raises:
      ConversionError: if they are missing.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConversionError(
            "a comparison needs torch and transformers (pip install torch transformers)"
        ) from None
    return torch, transformers


def _reference(torch: Any, transformers: Any, source: Path) -> Any:
    """The source as a model of `transformers`, float32."""
    folder, options = source, {}
    if source.is_file():
        folder, options = source.parent, {"gguf_file": source.name}
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            **options,
        ).eval()
    except Exception as error:  # of many types
        raise ConversionError(
            f"transformers cannot load {source}: {first_line(error)}"
        ) from error


def _logits(params: Params, tokens: list[list[int]]) -> list[np.ndarray]:
    """The same by polarjax. One program serves all prompts, padded to the longest.

    But for positions that transformers scales by a text's own length.
    """
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params.weights)
    config, rope = params.config.architecture, params.config.rope

    @functools.partial(jax.jit, static_argnums=0)
    def run(config: ModelConfig, weights: Tree, row: jax.Array) -> jax.Array:
        return Decoder(config).apply({"params": weights}, row)[0]

    def as_read(ids: list[int]) -> ModelConfig:
        if rope is None or rope.kind not in ("dynamic", "longrope"):
            return config
        context = max(len(ids), rope.original_context)
        return dataclasses.replace(config, context=context)

    padded = np.zeros((len(tokens), max(map(len, tokens))), np.int32)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = ids
    with jax.default_matmul_precision("highest"):  # a GPU's own is TF32
        return [
            np.asarray(run(as_read(ids), weights, row[None])[: len(ids)])
            for row, ids in zip(padded, tokens, strict=True)
        ]


def _compare(
    config: ModelConfig,
    dtype: str,
    tokens: list[list[int]],
    theirs: list[np.ndarray],
    ours: list[np.ndarray],
) -> Comparison:
    relative, absolute, agreed = [], [], []
    for their, our in zip(theirs, ours, strict=True):
        error = our - their
        relative.append(np.linalg.norm(error) / np.linalg.norm(their))
        absolute.append(np.abs(error).max())
        first = np.take_along_axis(their, our.argmax(-1)[:, None], -1)[:, 0]
        slack = TOLERANCE * np.sqrt((their**2).mean(-1))
        agreed.append(first >= their.max(-1) - slack)
    longest = max(map(len, tokens))
    window = max(config.window(layer) or 0 for layer in range(config.layers))
    return Comparison(
        dtype=dtype,
        prompts=len(tokens),
        tokens=sum(map(len, tokens)),
        # numpy's maximum, unlike Python's, lets no NaN pass.
        relative_error=float(np.max(relative)),
        absolute_error=float(np.max(absolute)),
        agreement=float(np.concatenate(agreed).mean()),
        perplexities=(_perplexity(theirs, tokens), _perplexity(ours, tokens)),
        uncrossed=window if longest <= window else 0,
    )


def _perplexity(logits: list[np.ndarray], tokens: list[list[int]]) -> float:
    """Perplexity: exp of the mean negative log-probability of tokens but the first."""
    found = []
    for rows, ids in zip(logits, tokens, strict=True):
        rows = rows[:-1].astype(np.float64)
        target = np.take_along_axis(rows, np.array(ids[1:], int)[:, None], -1)[:, 0]
        with np.errstate(invalid="ignore"):  # NaN is for the error to show
            found.append(np.logaddexp.reduce(rows, axis=-1) - target)
    found = np.concatenate(found)
    return float(np.exp(found.mean())) if found.size else float("nan")
