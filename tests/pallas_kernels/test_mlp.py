import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from pallas_kernels import gathered_mlp, tables
from pallas_kernels.mlp import api, configs, triton

TOLERANCE = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


def make_case(b=3, m=40, f=70, dtype="float32", n=33, gated=False, biases=True):
    """Inputs x, weights, neurons; the rows of neurons not selected hold NaN."""
    rng = np.random.default_rng(m * f + b)
    names = ("up", "down", "gate") if gated else ("up", "down")
    weights = {name: rng.normal(size=(f, m)) / math.sqrt(m) for name in names}
    if biases:
        weights |= {"up_bias": rng.normal(size=f), "down_bias": rng.normal(size=m)}
        if gated:
            weights["gate_bias"] = rng.normal(size=f)
    neurons = None if n is None else rng.permutation(f)[:n]
    if n is not None:
        unselected = np.setdiff1d(np.arange(f), neurons)
        for name in weights.keys() - {"down_bias"}:
            weights[name][unselected] = np.nan
    x = jnp.asarray(rng.normal(size=(b, m)), dtype)
    weights = {name: jnp.asarray(weight, dtype) for name, weight in weights.items()}
    return x, weights, None if n is None else jnp.asarray(neurons, jnp.int32)


def mlp_float64(x, weights, neurons, activation):
    x = np.asarray(x, np.float64)
    w = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    rows = slice(None) if neurons is None else np.asarray(neurons)
    act = ACTIVATIONS[activation]
    up = x @ w["up"][rows].T
    if "up_bias" in w:
        up = up + w["up_bias"][rows]
    if "gate" in w:
        gate = x @ w["gate"][rows].T
        hidden = act(gate + w["gate_bias"][rows] if "gate_bias" in w else gate) * up
    else:
        hidden = act(up)
    return hidden @ w["down"][rows] + w.get("down_bias", 0.0)


def check(out, case, activation):
    x = case[0]
    assert out.shape == x.shape and out.dtype == x.dtype
    expected = mlp_float64(*case, activation)
    error = np.max(np.abs(np.asarray(out, np.float64) - expected))
    limit = TOLERANCE[x.dtype.name] * np.max(np.abs(expected))
    assert error <= limit, (error, limit)  # NaN fails the comparison


def run(case, activation, implementation):
    mlp = functools.partial(
        gathered_mlp, activation=activation, implementation=implementation
    )
    return jax.jit(mlp)(*case)


CASES = {
    "relu": ("relu", dict()),
    "relu-dense": ("relu", dict(n=None)),
    "one-input": ("relu", dict(b=1, f=1000, m=100, n=1)),
    "every-neuron-in-any-order": ("relu", dict(b=17, f=33, n=33)),
    "swiglu-dense": ("silu", dict(gated=True, n=None, biases=False)),
    "swiglu-bfloat16": ("silu", dict(gated=True, b=2, m=576, dtype="bfloat16")),
    "gated-with-biases": ("gelu", dict(gated=True, m=129)),
    "gelu-float16": ("gelu", dict(dtype="float16", m=136, f=300, n=160)),
    "batch-17": ("relu", dict(b=17, f=100, n=64)),
    "batch-64": ("silu", dict(b=64, gated=True, dtype="bfloat16")),
    "wide-batch": ("relu", dict(b=130, dtype="bfloat16")),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, implementation):
    activation, shape = CASES[name]
    case = make_case(**shape)
    check(run(case, activation, implementation), case, activation)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("b", [1, 200])
def test_sweep(activation, gated, dtype, b, implementation):
    for m, f, n in ((576, 1536, 500), (1000, 999, None)):
        case = make_case(b=b, m=m, f=f, dtype=dtype, n=n, gated=gated)
        check(run(case, activation, implementation), case, activation)


BASE = configs.Config(
    batch=16,
    up_neurons=32,
    up_columns=16,
    up_splits=1,
    up_folds=1,
    up_warps=4,
    up_stages=2,
    down_columns=32,
    down_neurons=16,
    down_splits=1,
    down_warps=4,
    down_stages=2,
    fused=0,
)
CONFIGS = {
    "one-program-per-sum": {},
    "shared-sums": dict(up_splits=3, down_splits=2),
    "folded": dict(up_folds=4),
    "folded-shared-sums": dict(up_folds=2, up_neurons=11, up_splits=2),
    "shares-of-none": dict(up_splits=9, down_splits=9),
    "tiles-not-filled": dict(up_neurons=11, down_columns=48),
    "tiles-not-filled-shared": dict(up_neurons=48, down_columns=48, up_splits=2),
    "steps-beyond-all": dict(up_columns=128, down_neurons=128),
    "fused": dict(fused=3),
    "fused-programs-of-none": dict(fused=80),
}
PROBLEMS = {
    "relu": ("relu", dict(b=3)),
    "swiglu": ("silu", dict(b=20, m=70, f=100, n=70, gated=True, dtype="bfloat16")),
    "no-masks": ("gelu", dict(b=16, m=128, f=96, n=None)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, problem, interpret):
    activation, shape = PROBLEMS[problem]
    case = make_case(**shape)
    mlp = functools.partial(
        triton.mlp,
        activation=activation,
        interpret=interpret,
        config=dataclasses.replace(BASE, **CONFIGS[name]),
    )
    check(jax.jit(mlp)(*case), case, activation)


@pytest.mark.parametrize("gated", [False, True])
def test_candidates(gated, interpret):
    case = make_case(b=1, m=64, f=150, n=140, gated=gated)
    facts = dict(b=1, n=140, m=64, itemsize=4, gated=gated)
    candidates = configs.candidates(**facts)
    assert configs.heuristic(**facts) in candidates
    for config in candidates:
        mlp = functools.partial(
            triton.mlp, activation="relu", interpret=interpret, config=config
        )
        check(jax.jit(mlp)(*case), case, "relu")


def test_all_neurons_is_dense(implementation):
    x, weights, _ = make_case(n=None)
    neurons = jnp.arange(70, dtype=jnp.int32)
    sparse = run((x, weights, neurons), "relu", implementation)
    dense = run((x, weights, None), "relu", implementation)
    np.testing.assert_allclose(sparse, dense, rtol=1e-5, atol=1e-5)


def test_dense_above_the_measured_fraction(monkeypatch):
    x, weights, neurons = make_case()
    # The others' activations would be far from 0.
    weights = {name: jnp.nan_to_num(w, nan=7.0) for name, w in weights.items()}
    case = (jnp.abs(x), weights, neurons)
    asked = []

    def mlp(limit, implementation=None):
        def dense_above(**facts):
            asked.append(facts)
            return limit

        monkeypatch.setattr(tables, "mlp_dense_above", dense_above)
        return gathered_mlp(*case, activation="relu", implementation=implementation)

    monkeypatch.setattr(api, "resolve", lambda name: name or "triton")
    monkeypatch.setattr(triton, "mlp", lambda *args, **kwargs: "gathered")
    # 33 of 70 are selected.
    check(mlp(0.47), case, "relu")
    assert mlp(0.48) == "gathered"
    assert mlp(None) == "gathered"
    facts = {"b": 3, "m": 40, "f": 70, "gated": False, "itemsize": 4}
    assert asked == [facts] * 3
    assert mlp(0.0, "triton") == "gathered"
    assert asked == [facts] * 3


def test_down_bias_is_kept_when_sparse(implementation):
    # The public code of the paper loses it after the first sparse step.
    x, weights, neurons = make_case()
    weights = {**weights, "down_bias": weights["down_bias"] + 100.0}
    out = run((x, weights, neurons), "relu", implementation)
    check(out, (x, weights, neurons), "relu")
    assert np.min(out) > 50.0


def test_an_input_does_not_depend_on_its_batch_mates(implementation):
    x, weights, neurons = make_case()
    out = run((x.at[1:].set(jnp.nan), weights, neurons), "silu", implementation)
    check(out[:1], (x[:1], weights, neurons), "silu")


def test_activations_far_from_zero(implementation):
    x = jnp.asarray([[-1e4], [-30.0], [-5.0], [0.0], [5.0], [1e4]], jnp.float32)
    weights = {"up": jnp.ones((1, 1)), "down": jnp.ones((1, 1))}
    for activation in ACTIVATIONS:
        with np.errstate(over="ignore"):
            expected = mlp_float64(x, weights, None, activation)
        out = run((x, weights, None), activation, implementation)
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_absent_weights_may_be_none(implementation):
    x, weights, neurons = make_case(biases=False)
    padded = {**weights, "gate": None, "up_bias": None, "down_bias": None}
    check(
        run((x, padded, neurons), "relu", implementation),
        (x, weights, neurons),
        "relu",
    )


def test_annotations_hold(implementation):
    checked = jaxtyped(typechecker=beartype)(gathered_mlp)
    case = make_case()
    out = checked(*case, activation="relu", implementation=implementation)
    check(out, case, "relu")


# The message, and the changes to (x, weights, neurons) that must raise it.
WRONG = {
    r"x has shape \(40,\); it must be \[b, m\]": lambda x, w, i: (x[0], w, i),
    r"x has dtype int32; it must be one of": lambda x, w, i: (x.astype("int32"), w, i),
    r"weights lacks \['down'\]; it has": lambda x, w, i: (x, {"up": w["up"]}, i),
    r"unknown 'bias'; it may have": lambda x, w, i: (x, {**w, "bias": x}, i),
    r"weights\['up'\] has shape \(40, 70\); .* must be \(40, 40\)": lambda x, w, i: (
        x,
        {**w, "up": w["up"].T},
        i,
    ),
    r"weights\['down'\] has shape \(69, 40\); .* must be \(70, 40\)": lambda x, w, i: (
        x,
        {**w, "down": w["down"][1:]},
        i,
    ),
    r"weights\['down_bias'\] has shape \(70,\); .* must be \(40,\)": lambda x, w, i: (
        x,
        {**w, "down_bias": w["up_bias"]},
        i,
    ),
    r"unknown 'gate_bias'; it may have": lambda x, w, i: (
        x,
        {**w, "gate_bias": w["up_bias"]},
        i,
    ),
    r"weights\['up'\] has dtype float16; it must be that of x": lambda x, w, i: (
        x,
        {**w, "up": w["up"].astype("float16")},
        i,
    ),
    r"neurons is float32\[33\]; it must be int32": lambda x, w, i: (
        x,
        w,
        i.astype("float32"),
    ),
    r"neurons is int32\[1, 33\]; it must be int32\[n\]": lambda x, w, i: (
        x,
        w,
        i[None],
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(ValueError, match=message):
        gathered_mlp(*WRONG[message](*make_case()), activation="relu")


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'tanh'; it must be 'relu'"):
        gathered_mlp(*make_case(), activation="tanh")


# b, m, f, n of the models, and whether they are gated.
MODELS = {
    "opt-66b": (64, 9216, 36864, 3686, False),
    "opt-6.7b": (1, 4096, 16384, 1638, False),
    "llama-2-7b": (16, 4096, 11008, 5504, True),
    "llama-3.1-8b": (256, 4096, 14336, 7168, True),
    "smollm2-135m": (8, 576, 1536, 500, True),
    "mlp-bias": (8, 576, 1536, 500, True),
    "mlp-bias-of-one": (1, 4096, 11008, 5504, True),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_lowers_for_cuda(model, dtype, lower_for_cuda, monkeypatch):
    b, m, f, n, gated = MODELS[model]
    spec = jax.ShapeDtypeStruct
    weights = {"up": spec((f, m), dtype), "down": spec((f, m), dtype)}
    if gated:
        weights["gate"] = spec((f, m), dtype)
    biased = model.startswith("mlp-bias")
    if biased:
        weights["gate_bias"] = spec((f,), dtype)
    if biased or not gated:
        weights |= {"up_bias": spec((f,), dtype), "down_bias": spec((m,), dtype)}
    # A named kernel must not ask which backend this host has, but for measured configs.
    monkeypatch.setattr(jax, "default_backend", None)
    monkeypatch.setattr(tables, "device_kind", lambda: None)
    for activation, neurons in (("gelu", None), ("silu", spec((n,), "int32"))):
        mlp = functools.partial(
            gathered_mlp, activation=activation, implementation="triton"
        )
        text = lower_for_cuda(mlp, spec((b, m), dtype), weights, neurons)
        assert text.count("@__gpu$xla.gpu.triton") == (
            1 if b == 1 and dtype == "bfloat16" else 2
        )
        # The weights go to the kernels as they are: no copy of them is made.
        assert "stablehlo.transpose" not in text
        assert "stablehlo.gather" not in text


@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("b", [1, 2, 16, 17, 64, 100, 256])
def test_heuristic_fits_the_hardware(b, itemsize, gated, shared, monkeypatch):
    monkeypatch.setattr(configs, "shared_bytes", lambda: shared * 1024)
    shapes = [(1, 1), (500, 576), (3686, 9216), (36864, 9216), (999, 1000), (7, 16384)]
    shapes += [(1, 2047), (4300, 1), (500, 2048), (4915, 256)]
    for n, m in shapes:
        c = configs.heuristic(b=b, n=n, m=m, itemsize=itemsize, gated=gated)
        if c.fused:
            # Registers of a thread: of each row, and of the inputs and sums.
            each = configs.ceil_power_of_two(m) / (32 * c.up_warps)
            assert each * (itemsize * (2 + gated) + itemsize + 4) <= 4 * 48
            assert c.fused <= n and c.up_warps <= 16
            continue
        assert c.up_neurons % 16 == 0 and c.down_columns % 16 == 0
        blocks = (c.batch, c.up_columns, c.down_neurons)
        assert all(x >= 16 and x.bit_count() == 1 for x in blocks)
        up = (1 + gated) * configs.ceil_power_of_two(c.up_neurons) + c.batch
        up *= c.up_folds * c.up_columns * c.up_stages
        down = configs.ceil_power_of_two(c.down_columns) + c.batch
        down *= c.down_neurons * c.down_stages
        assert max(up, down) * itemsize <= (shared - 19) * 1024
        assert min(c.up_stages, c.down_stages) >= 2
        # Programs that share sums all run at once.
        assert -(-n // c.up_neurons) * c.up_splits <= 132 or c.up_splits == 1
        columns = -(-m // c.down_columns)
        assert columns * c.down_splits <= 132 or columns > 132 or c.down_splits == 1
