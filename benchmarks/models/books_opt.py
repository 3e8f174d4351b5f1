"""Train a ReLU model with many heads on books: an OPT, with its own vocabulary.

    python -m benchmarks.models.books_opt --text TEXT --valid TEXT --out FOLDER

The folder is laid out as Hugging Face's, so that `polarjax convert` reads it as it
reads any OPT. Head sparsity and neuron sparsity are then measured on trained weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks.models.books_text import read_tokens, train_tokenizer
from benchmarks.models.opt_training import Trained, Training, evaluate, imbalance, train
from convert.core import DTYPES
from convert.export import shards, write
from polarjax.bench.shapes import opt
from polarjax.config import ModelConfig
from polarjax.model import weight_shapes
from polarjax.params import TOKENIZER_FILE
from polarjax.storage.folder import try_destination
from polarjax.terminal.output import counting_bar, make_console, one_line

LARGEST = 28_000_000  # parameters

_EXAMPLES = """\
examples:
  the model itself, in minutes on one GPU:
    python -m benchmarks.models.books_opt --text books_train.txt \\
        --valid books_valid.txt --out books-opt
  a toy, in seconds without one:
    python -m benchmarks.models.books_opt --text books_valid.txt \\
        --valid books_test.txt --out toy --steps 20 --batch 4 --context 64 \\
        --vocab 512 --layers 2 --dim 64 --heads 4 --neurons 128

Then: polarjax convert books-opt checkpoints/books-opt
"""


def make_config(
    *,
    vocab: int = 8192,
    context: int = 512,
    layers: int = 7,
    dim: int = 512,
    heads: int = 16,
    neurons: int = 2048,
) -> ModelConfig:
    """An OPT of some size; letters as in docs/glossary.md.

    Args:
      vocab: v; id 0 starts and ends a text.
      context: longest sequence in tokens.
      layers: decoder layers.
      dim: m, a multiple of `heads`.
      heads: h, as many KV heads.
      neurons: f.

    Raises:
      ValueError: if a size is impossible, or the model has more than `LARGEST`
        parameters.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
    if vocab > 2**16:
        raise ValueError(f"vocab {vocab} is larger than 65,536")
    config = dataclasses.replace(
        opt(layers, dim, heads, vocab),
        neurons=neurons,
        context=context,
        bos_ids=(0,),
        eos_ids=(0,),
    )
    if (count := parameters(config)) > LARGEST:
        raise ValueError(f"{count:,} parameters are more than {LARGEST:,}")
    return config


def parameters(config: ModelConfig) -> int:
    """Numbers in a model's weights."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weight_shapes(config)))


def build(
    text: str | Path,
    valid: str | Path,
    out: str | Path,
    config: ModelConfig,
    training: Training,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = 15 * 2**20,
    console: Console | None = None,
) -> dict[str, Any]:
    """From two texts to a folder as Hugging Face lays it out.

    Args:
      text: to learn from: UTF-8, plain or gzipped (.gz), documents separated by three
        newlines.
      valid: to measure on, likewise.
      out: the folder to make.
      config: of the model.
      training: settings.
      dtype: of the tensors in the folder.
      shard_bytes: most bytes of a file of tensors.
      console: where to show how far it is; None for nowhere.

    Returns:
      What was made and measured, as JSON values; also in the folder's training.json.

    Raises:
      FileExistsError: if there is something at `out`.
      FileNotFoundError: if a text does not exist.
      ValueError: if a text is no UTF-8 or too short, or a tensor too large.
      FloatingPointError: if the training diverges.
    """
    console = console or make_console(quiet=True)
    # What can be refused is refused before the work.
    try_destination(out, 4 * parameters(config))
    shards(config, dtype, shard_bytes)
    for path in (text, valid):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no text file at {path}")
    begin = time.perf_counter()
    console.print(f"learning a vocabulary of {config.vocab_size:,} tokens")
    tokenizer = train_tokenizer(text, config.vocab_size)
    console.print(f"tokenising, {time.perf_counter() - begin:.0f} s so far")
    held_out = read_tokens(valid, tokenizer, config.context + 1)
    block = config.context * (training.batch + 1) + 1
    tokens = read_tokens(text, tokenizer, block)
    prepared = time.perf_counter() - begin
    console.print(
        f"{parameters(config):,} parameters, {len(tokens):,} tokens of text, "
        f"{prepared:.0f} s so far"
    )
    with _Bar(console, training.steps) as bar:
        trained = train(config, tokens, training, bar.show)
    measured = evaluate(
        config, trained.weights, held_out, training.batch, training.compute
    )
    record = _record(config, training, trained, len(tokens), prepared, measured)
    files = {
        "training.json": json.dumps(record, indent=2) + "\n",
        TOKENIZER_FILE: tokenizer.to_str(pretty=True),
    }
    write(
        out,
        config,
        trained.weights,
        dtype=dtype,
        shard_bytes=shard_bytes,
        files=files,
    )
    return record


def _record(
    config: ModelConfig,
    training: Training,
    trained: Trained,
    tokens: int,
    prepared: float,
    measured: tuple[float, dict[str, Any], int],
) -> dict[str, Any]:
    """What was made, as `build` returns it.

    Args:
      config: of the model.
      training: settings.
      trained: the outcome.
      tokens: of text.
      prepared: seconds before the training.
      measured: as `evaluate` returns it.
    """
    perplexity, shares, scored = measured
    return {
        "parameters": parameters(config),
        "text_tokens": tokens,
        "tokens_seen": training.steps * training.batch * config.context,
        "preparation_seconds": round(prepared, 1),
        "training_seconds": round(trained.seconds, 1),
        "tokens_per_second": round(trained.tokens_per_second),
        "final_loss": sum(trained.losses[-100:]) / len(trained.losses[-100:]),
        "validation_perplexity": perplexity,
        "validation_tokens": scored,
        "active_neurons": [round(share, 4) for share in shares["active"]],
        "lesser_heads": [round(share, 4) for share in shares["lesser_heads"]],
        "head_imbalance": [
            round(float(imbalance(jnp.array(share))), 4) for share in shares["heads"]
        ],
        "training": dataclasses.asdict(training),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


class _Bar:
    """How far a training is; a line for each tenth where nobody watches a terminal."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps
        self.progress = counting_bar(console)
        self.task = self.progress.add_task("training: compiling", total=steps)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, step: int, loss: float, rate: float) -> None:
        now = f"loss {loss:.3f}, {rate:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, description=f"training: {now}")
        tenth = max(1, self.steps // 10)
        if not self.console.is_terminal and (step == 1 or step % tenth == 0):
            self.console.print(f"step {step} of {self.steps}: {now}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: of the command line; None for the process's own.

    Returns:
      The exit status: 0, or 1 after an error (one line on stderr).
    """
    options = _parser().parse_args(arguments)
    console = make_console(stderr=True)
    try:
        config = make_config(
            **{
                name: getattr(options, name)
                for name in ("vocab", "context", "layers", "dim", "heads", "neurons")
            }
        )
        training = Training(
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.learning_rate,
            head_sparsity=options.head_sparsity,
            seed=options.seed,
        )
        record = build(
            options.text,
            options.valid,
            options.out,
            config,
            training,
            dtype=options.dtype,
            shard_bytes=int(options.shard_mib * 2**20),
            console=console,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(json.dumps(record))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.books_opt",
        description="Train an OPT (ReLU, learned positions, as many KV heads as heads) "
        "and its byte-level BPE vocabulary on a text, and write both as a Hugging Face "
        "folder that appears whole or not at all. The last line printed is a JSON "
        "object: parameters, tokens, seconds, validation perplexity, and by layer the "
        "share of MLP neurons that are active and that of head norms which the smaller "
        "half of a token's heads holds.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    about = "UTF-8, .gz too; documents are separated by three newlines"
    add("--text", required=True, help=f"text to learn from: {about}")
    add("--valid", required=True, help="text to measure on, likewise")
    add("--out", required=True, help="the folder to make")
    default, made = "(default: %(default)s)", Training()
    add("--steps", type=int, default=made.steps, help=f"of the optimiser {default}")
    add("--batch", type=int, default=made.batch, help=f"sequences a step {default}")
    add("--context", type=int, default=512, help=f"tokens of a sequence {default}")
    add(
        "--learning-rate",
        type=float,
        default=made.learning_rate,
        help=f"its peak, after a warm-up over 4 %% of the steps {default}",
    )
    add(
        "--head-sparsity",
        type=float,
        default=made.head_sparsity,
        help="weight of a penalty on the share of a token's head norms that the "
        "smaller half of its heads holds, and on heads that no token uses: makes each "
        f"token use few heads {default}",
    )
    add(
        "--seed",
        type=int,
        default=made.seed,
        help=f"of the initial weights and the order of the text {default}",
    )
    add(
        "--vocab",
        type=int,
        default=8192,
        help=f"tokens, at least 257, at most 65536 {default}",
    )
    add("--layers", type=int, default=7, help=default)
    add("--dim", type=int, default=512, help=f"width of the model {default}")
    add("--heads", type=int, default=16, help=f"a divisor of --dim {default}")
    add("--neurons", type=int, default=2048, help=f"of each layer's MLP {default}")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="bfloat16",
        help=f"of the weights in the folder {default}",
    )
    add(
        "--shard-mib",
        type=float,
        default=15,
        help=f"largest file of weights, in MiB {default}",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
