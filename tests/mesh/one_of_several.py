"""What each process of test_distributed.py runs."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import polarjax
from polarjax.evaluation import Scorer, Settings, evaluate
from polarjax.mesh import processes
from polarjax.mesh.cut import by_writer, make_mesh, shard
from polarjax.policies import save_adapter
from polarjax.training import (
    Recovery,
    Resume,
    RouterTraining,
    train_routers,
    train_updates,
    write_blocks,
)
from tests.mesh import served
from tests.models import OPT, random_params

TOKENS = [[1, 2, 3], [7] * 20, [5, 6]]
PROMPTS = ["Once upon a time", [7, 8, 9], "ünïcode"]


def work_together(folder: Path) -> None:
    """What this process sees, into a file: the other one's stdout leads nowhere."""
    mesh = jax.make_mesh((4,), ("tp",), (AxisType.Auto,))
    spec = PartitionSpec("tp")
    whole = np.arange(8, dtype=np.float32)
    cut = jax.make_array_from_callback(
        whole.shape, NamedSharding(mesh, spec), lambda index: whole[index]
    )

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    def add(x):
        return jax.lax.psum(x.sum(), "tp")

    is_main = processes.is_main()
    tree = {"cut": cut, "half": cut.astype(jnp.bfloat16), "here": jnp.ones(2)}
    tree = processes.to_host({**tree, "sum": add(cut), "plain": 3})
    try:
        # What process 0 cannot send must not leave the other waiting.
        processes.from_main(object() if is_main else None)
    except (TypeError, RuntimeError) as error:
        unsent = type(error).__name__
    processes.agree({"same": [1]}, "tuple")
    told = None
    try:
        processes.agree(jax.process_index(), "number")
    except ValueError as error:
        told = str(error)
    failed = []
    for kind in (ValueError, OSError):

        def fail(kind=kind):
            raise kind("no such thing" if is_main else "it is not mine to do")

        try:
            by_writer(mesh, fail)
        except (ValueError, OSError) as error:
            failed.append([type(error).__name__, str(error)])
    by_writer(mesh, lambda: None)
    seen = {
        "told": told,
        "failed": failed,
        "devices": jax.device_count(),
        "local devices": jax.local_device_count(),
        "prompts": processes.from_main(PROMPTS if is_main else ["not these"]),
        "unsent": unsent,
        "host": {name: x.astype(float).tolist() for name, x in tree.items()},
        "numpy": all(isinstance(x, np.ndarray) for x in tree.values()),
    }
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(seen))
    print(f"printed by {jax.process_index()}")


def generate_together(folder: Path) -> None:
    """A model over both processes; what it says, into a file."""
    found = polarjax.generate(
        sharing_neurons(small_model(), 0.4),
        TOKENS if processes.is_main() else [[1]],
        density=[0.5, 0.25, 0.9],
        max_new_tokens=6,
        mesh=make_mesh(4, 2),
    )
    numbers = [found.tokens, found.stats.density]
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(numbers))


def serve_together(folder: Path) -> None:
    """An engine over pages, over both processes, in both ways; into a file."""
    seen = []
    for tp, dp in ((2, 1), (1, 2)):
        with served.make_engine(folder, make_mesh(tp, dp)) as engine:
            seen.append(served.serve(engine, jax.process_index()))
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(seen))


def evaluate_together(folder: Path) -> None:
    """A task, over both processes; stopped once, and asked for when it is done."""
    params = polarjax.load(folder / "model", mesh=make_mesh(2, 2))
    scored, result = [], {}
    score = Scorer.score

    def count(self, batch):
        scored[-1] += len(batch.rows) > 0
        return score(self, batch)

    Scorer.score = count

    def stop(what: str, done: int, total: int) -> None:
        if what != "compiling" and done:
            raise KeyboardInterrupt

    for progress in (stop, None, stop):
        scored.append(0)
        with contextlib.suppress(KeyboardInterrupt):
            out = folder / "result.json"
            result, _ = evaluate(
                params, eval_settings(folder), out=out, progress=progress
            )
    found = result["tasks"]["words"]["results"]
    (folder / f"{jax.process_index()}.json").write_text(json.dumps([found, scored]))


def train_together(folder: Path) -> None:
    """Routers, the training stopped once, then updates; adapters into the folder."""
    written = learn(folder, make_mesh(2, 2))
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(written))


def learn(folder: Path, mesh: Mesh | None) -> list[list[int]]:
    """As `train_together`, on whatever devices; what the dense model writes."""
    blocks = np.random.default_rng(0).integers(1, 300, (24, 16)).astype(np.int32)
    training, recovery = (
        RouterTraining(0.5, steps=6, batch=4),
        Recovery(steps=3, batch=4, rank=2),
    )
    model, resume = small_model(), Resume(folder / "work", every=2)
    model = shard(model, mesh) if mesh else model

    def train(stop: int) -> polarjax.Params:
        def at(_: polarjax.Params, step: int) -> bool:
            return step == stop

        return train_routers(model, blocks, training, resume=resume, stop=at)

    train(3)  # and from there to the end
    trained = train(6)
    save_adapter(folder / "routers", trained)
    save_adapter(folder / "recovered", train_updates(trained, blocks, recovery))
    return write_blocks(trained, 1, 8, 3).tolist()


def eval_settings(folder: Path) -> Settings:
    """Three batches."""
    policies = {"Polar": polarjax.Polar(0.5, 0.4)}
    return Settings(policies, batch=15, tasks=[folder / "words.jsonl"])


def small_model() -> polarjax.Params:
    """OPT with head and neuron routers, eight heads."""
    shape = {"layers": 2, "vocab_size": 336, "heads": 8, "kv_heads": 8, "head_dim": 8}
    config = dataclasses.replace(OPT, **shape)
    return random_params(config, routers=True, neuron_rank=5)


def sharing_neurons(params: polarjax.Params, density: float) -> polarjax.Params:
    """The model with a policy that reads a part of the neurons for the whole batch."""
    policy = dataclasses.replace(params.policy, neuron_density=density)
    return dataclasses.replace(params, policy=policy)


def end(how: str) -> None:
    if how == "ValueError":
        raise ValueError("no such thing")
    os.kill(os.getpid(), signal.Signals[how])
    time.sleep(60)  # where a signal was not heeded


def main() -> None:
    parser = argparse.ArgumentParser()
    processes.add_arguments(parser)
    parser.add_argument("what")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--victim", type=int)
    args = parser.parse_args()
    with processes.together():
        processes.start_from(args)
        processes.from_main("all are here")
        if args.what == "work":
            work_together(args.folder)
        elif args.what == "generate":
            generate_together(args.folder)
        elif args.what == "serve":
            serve_together(args.folder)
        elif args.what == "evaluate":
            evaluate_together(args.folder)
        elif args.what == "train":
            train_together(args.folder)
        elif args.process == args.victim:
            end(args.what)
        elif args.folder.name == "in_python":
            time.sleep(100)
        else:
            processes.from_main("the other one is dead by now")
            time.sleep(1)
            processes.from_main("surely")


if __name__ == "__main__":
    sys.exit(main())
