"""A result of `polarjax eval` that was made up."""

import copy

DENSITY = {"Dense": 1.0, "Polar 0.5": 0.625, "Polar 0.75": 0.8125, "Random 0.5": 0.625}
POLICIES = {
    label: {"policy": label.split()[0].lower(), "density": None} for label in DENSITY
}


def counted(label, positions):
    density = DENSITY[label]
    return {
        "density": density,
        "positions": positions,
        "seconds": 2.0,
        "tokens_per_second": 12345.0 / density,
        "use": [[1.0, 1.0], *[[density, density]] * 3],
    }


def task(kind, at):
    """Every number in it differs from all others by the place it stands at."""
    choice = kind == "choice"

    def found(i, label):
        low = 0.4 + at / 10 + i / 100
        change = [-i / 100, -i / 100 - 0.0123, 0.0123]
        against = {
            "accuracy": change,
            "accuracy_per_byte": [-0.0101, -0.0202, 0.0303] if choice else None,
            "mcnemar_p": 0.031 + i / 1000,
            "mcnemar_p_per_byte": 0.41 if choice else None,
            "gained": 3,
            "lost": 4,
            "target_perplexity_ratio": None if choice else [1.0511, 1.0312, 1.0713],
        }
        return {
            "accuracy": [low, low - 0.05, low + 0.05],
            "accuracy_per_byte": [0.3301, 0.3102, 0.3503] if choice else None,
            "target_perplexity": None if choice else [9.111, 8.222, 10.333],
            "against_dense": against if i else None,
            **counted(label, 100),
            "right": [1, 0],
            "right_per_byte": [1, 0] if choice else None,
            "nll": [1.0, 2.0],
        }

    return {
        "file": f"{kind}.jsonl.gz",
        "sha256": f"{at}" * 64,
        "kind": kind,
        "ids": ["a", "b"],
        "results": {label: found(i, label) for i, label in enumerate(DENSITY)},
    }


def text(window):
    def found(i, label):
        ratio = 1 + i / 10
        return {
            "perplexity": [20.5 + i, 19.25 + i, 21.75 + i],
            "against_dense": {"ratio": [ratio, ratio - 0.05, None]} if i else None,
            "word_perplexity": [41.5, 40.5, 42.5] if window is None else None,
            "byte_perplexity": 1.75 if window is None else None,
            "bits_per_byte": [0.8125, 0.75, None] if window is None else None,
            **counted(label, 5000),
            "nll": [1.0],
        }

    return {
        **{"file": "text.txt", "sha256": "c" * 64, "tokens": 4321, "window": window},
        **{"prefix": 64, "stride": None, "scored": [10]},
        "results": {label: found(i, label) for i, label in enumerate(DENSITY)},
    }


def generation():
    found = {
        "identical": [0.615, 0.511, 0.712],
        "tokens_until_divergence": [33.3, 30.1, 36.6],
        "divergence": [64, 3],
        "kl": [0.0456, 0.0345, 0.0567],
        "kl_per_token": [[0.0, -1e-9, 1e-9, 0.2], [0.001, 0.03, 1.5, 0.0002]],
        "agreement": [0.9715, 0.9616, 0.9817],
        "density": 0.625,
    }
    return {
        **{"file": "prompts.txt", "sha256": "d" * 64, "prompts": 2},
        **{"prompt_tokens": 64, "new_tokens": 64},
        "results": {label: found for label in DENSITY if label != "Dense"},
    }


def whole():
    return {
        "format_version": 1,
        "kind": "polarjax eval",
        "made": {
            "command": ["eval", "checkpoints/toy", "--out", "my result.json"],
            "finished": "2026-11-22T20:00:00+00:00",
            "commit": "abc1234",
            "device": "NVIDIA H200",
            "versions": {"polarjax": "0.1.0", "jax": "0.11.2"},
        },
        "setup": {
            **{"checkpoint": "toy-135m", "model_hash": "beef" * 8, "dtype": "float32"},
            "adapter": {
                "name": "a-toy",
                "sha256": "feed" * 16,
                "budgets": [2, 1, 1, 1],
            },
            **{"mode": "decode", "batch": 16, "implementation": "xla"},
            **{
                "bootstrap_seed": 0,
                "layers": 4,
                "kv_heads": 2,
                "policies": copy.deepcopy(POLICIES),
            },
        },
        "tasks": {"arc": task("choice", 1), "lambada": task("target", 2)},
        "perplexity": {"windows": text(2048), "words": text(None)},
        "generation": generation(),
        "recall": {
            **{"file": "text.txt", "layers": [1, 2, 3]},
            **{"routers": [0.9, 0.8, 0.95], "chance": [0.5, 0.51, 0.49]},
        },
    }
