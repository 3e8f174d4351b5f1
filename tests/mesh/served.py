"""What clients ask of an engine that several processes share, in test_processes.py."""

import dataclasses

import polarjax
from polarjax import Engine
from tests.models import LLAMA, random_params, write_checkpoint

PROMPTS = [[i + 1] * (5 + 7 * i) for i in range(5)]
WHOLE = {"max_new_tokens": 40, "stop_ids": ()}
SAMPLED = {"temperature": 1.0, "seed": list(range(5)), "logprobs": 2}


def write_model(folder):
    """Write a model with a tokenizer."""
    config = dataclasses.replace(LLAMA, context=96, vocab_size=257)
    write_checkpoint(folder / "model", random_params(config, routers=True))


def make_engine(folder, mesh=None):
    """Two slots of each part, and pages for less than what they may need."""
    parts = mesh.shape["dp"] if mesh else 1
    return Engine(
        polarjax.load(folder / "model"),
        slots=2 * parts,
        page=16,
        pages=8,
        prefill_tokens=32,
        mesh=mesh,
    )


def serve(engine, process=0):
    """All that comes of it, as JSON has it; what only one process' clients do too."""
    out = engine.generate(PROMPTS, density=0.5, **WHOLE, **SAMPLED)
    tops = [[one.logprobs for one in each] for each in out.alternatives]
    # A stop string ends one between two steps.
    text = engine.generate([[3, 4]], density=1.0, **WHOLE).texts[0]
    settings = polarjax.Settings(density=1.0, **WHOLE)
    stopped = engine.add([3, 4], dataclasses.replace(settings, stop=(text[9:11],)))
    streams = [engine.stream(prompt, settings) for prompt in PROMPTS]
    pieces = [next(streams[0]) for _ in range(3)]
    if process == 0:  # whose clients are heard
        streams[0].close()
        engine.cancel(streams[3].request)
        streams.pop()
    else:
        streams[1].close()
        streams[2].request.cancel()
    while not engine.idle:
        engine.step()
    asked = [stopped, *(stream.request for stream in streams[:4])]
    return {
        "tokens": out.tokens,
        "logprobs": [out.logprobs, tops],
        "preempted": engine._runner.scheduler.preemptions,
        "first": [token for piece in pieces for token in piece.tokens],
        "asked": [[one.finish_reason, one.tokens] for one in asked],
        "texts": [one.text for one in asked],
        "density": out.stats.density,
    }
