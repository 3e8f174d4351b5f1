"""Axes that would make a step slower are off, but not those that a user asked for."""

import dataclasses
import json

import jax
import pytest

import polarjax
from benchmarks import measure_overheads
from polarjax.planning import crossover
from polarjax.planning.crossover import Measured, Overhead, fit
from polarjax.policies import with_learned
from polarjax.policy import Load
from tests.models import OPT, random_params

NEURONS = (OPT.neurons, 40, 40, 40)
PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.fixture(scope="module")
def params():
    return random_params(
        OPT,
        routers=True,
        neuron_rank=8,
        head_rank=2,
        budgets=(6, 3, 3, 2),
        neuron_budgets=((2, NEURONS),),
    )


@pytest.fixture
def overheads(monkeypatch):
    """Make it a device on which selection was measured."""

    def measured(heads_us, neurons_us, bandwidth=1e9):
        table = (Overhead(2, heads_us, neurons_us),)
        monkeypatch.setattr(crossover, "shipped", lambda kind: table)
        monkeypatch.setattr(crossover, "read_bandwidth", lambda device: bandwidth)

    return measured


def bind(params, policy=None, context=32):
    settled, notes = crossover.settle(params, policy, Load(2, context), False)
    return *settled.bind(params), notes


@pytest.mark.parametrize(
    ("heads_us", "neurons_us", "off"),
    [(0, 0, ""), (1e6, 0, "heads"), (0, 1e6, "neurons"), (1e6, 1e6, "heads neurons")],
)
def test_what_costs_more_than_it_saves_is_off(
    params, overheads, heads_us, neurons_us, off
):
    overheads(heads_us, neurons_us)
    weights, bound, notes = bind(params)
    heads, neurons = "heads" not in off, "neurons" not in off
    assert bound.budget.limits == ((None, 3, 3, 2) if heads else (None,) * 4)
    assert bound.neuron_counts == ((0, 40, 40, 40) if neurons else (0,) * 4)
    # No row is read that serves nothing.
    rows = (OPT.kv_heads + 2) * heads + 8 * neurons
    assert bound.wants.scores == (0, rows, rows, rows)
    grown = weights["layers_1"]["attention"]["qkv"].shape[0]
    assert grown - params.weights["layers_1"]["attention"]["qkv"].shape[0] == rows
    assert len(notes) == len(off.split())
    for name, note in zip(off.split(), notes, strict=True):
        assert note.startswith(f"all {name} are read") and "2999." in note


def test_longer_contexts_cross_over(params, overheads):
    # A layer's KV group, 2 requests of 1 token: 2 x 2 x 8 numbers of 4 bytes.
    row = 2 * 2 * 8 * 4
    layers, groups = 3, 3 + 3 + 4
    cost = crossover.step_cost(params, batch=2, context=1)
    router = sum(cost.routers)
    overhead_us = 5.0
    crossing = (router + layers * overhead_us * 1e3) / (groups * row)  # at 1 GB/s
    overheads(overhead_us, 0)
    for context, heads in ((int(crossing), False), (int(crossing) + 1, True)):
        _, bound, notes = bind(params, context=context)
        assert (bound.budget.limits[1] is not None) == heads
        assert bool(notes) != heads


def test_an_explicit_request_is_honoured_and_told(params, overheads):
    overheads(1e6, 1e6)
    for policy in (polarjax.Polar(0.5), polarjax.Polar(), polarjax.Polar(0.5, 0.3)):
        _, bound, notes = bind(params, policy)
        _, same = policy.sized(2).bind(params)
        assert bound.budget.limits == same.budget.limits
        assert bound.neuron_counts == same.neuron_counts
        assert bound.wants.scores == same.wants.scores
        assert len(notes) == 1 and notes[0].startswith("slower than dense")
    assert bind(params, polarjax.Dense())[2] == ()
    assert bind(params, polarjax.Oracle(0.5))[2] == ()
    overheads(0, 0, bandwidth=1.0)
    assert bind(params, polarjax.Polar(0.5), context=4096)[2] == ()


def test_generate_says_so_and_reads_all(params, overheads, monkeypatch):
    monkeypatch.setattr(crossover, "mlp_dense_above", lambda **_: None)
    overheads(0, 0)

    def generate(**settings):
        return polarjax.generate(params, PROMPTS, max_new_tokens=5, **settings)

    dense, sparse = generate(policy=polarjax.Dense()), generate()
    assert min(sparse.stats.density) < 1 and len(sparse.stats.notes) == 1
    overheads(1e6, 1e6)
    found = generate()
    assert found.tokens == dense.tokens
    assert found.stats.policy == "Polar"
    assert set(found.stats.density) == set(found.stats.neuron_density) == {1.0}
    assert found.stats.weight_bytes == dense.stats.weight_bytes
    assert [note[:9] for note in found.stats.notes] == ["all heads", "all neuro"]
    assert "all heads" in str(found.stats)
    asked = generate(density=0.5)
    assert asked.stats.density[1:] == (0.5,) * 3
    assert asked.stats.notes[0].startswith("slower than dense")


def test_neurons_that_are_all_read_anyway_save_nothing(params, overheads, monkeypatch):
    overheads(0, 0)
    for above, on in ((0.5, True), (0.49, False)):  # the budgets keep 40 of 80
        monkeypatch.setattr(
            crossover, "mlp_dense_above", lambda above=above, **_: above
        )
        _, bound, notes = bind(params)
        assert bool(bound.neuron_counts[1]) == on and bool(notes) != on


def test_adaptive_budgets_are_means(params, overheads):
    adaptive = with_learned(
        params, budgets=(6, 2.5, 3.5, 6), adaptive=True, thresholds=(0.0,) * 4
    )
    overheads(1e6, 0)
    _, bound, notes = bind(adaptive)
    assert bound.budget.limits == (None,) * 4 and bound.budget.thresholds == ()
    assert "1999." in notes[0]  # two layers select
    _, bound, notes = bind(adaptive, polarjax.Polar())
    assert len(bound.budget.thresholds) == 4 and "by 1999." in notes[0]


def test_nothing_is_turned_off_where_nothing_was_measured(params, monkeypatch):
    monkeypatch.setattr(crossover, "shipped", lambda kind: ())
    _, bound, notes = bind(params)
    assert bound.budget.limits == (None, 3, 3, 2) and notes == ()
    # An adapter's absence is still told by the policy.
    with pytest.raises(ValueError, match="no density given"):
        bind(with_learned(params, budgets=(), neuron_budgets=()))


def test_fit_finds_what_was_planted():
    bandwidth = 4e12
    dense = Measured(1e-3, 3e9)
    heads = Measured(1e-3 + 7 * 5e-6 - 4e8 / bandwidth, 2.6e9, layers=7)
    neurons = Measured(1e-3 + 7 * 11e-6 - 1e9 / bandwidth, 2e9, layers=7)
    found = fit(16, dense, heads, neurons, bandwidth)
    assert found.batch == 16
    assert found.heads_us == pytest.approx(5) and found.neurons_us == pytest.approx(11)
    faster = dataclasses.replace(heads, seconds=1e-4)
    assert fit(16, dense, faster, neurons, bandwidth).heads_us == 0
    table = [Overhead(1, 1, 1), Overhead(16, 2, 2), Overhead(64, 3, 3)]
    batches = [crossover.nearest(table, b).batch for b in (1, 3, 5, 30, 40, 900)]
    assert batches == [1, 1, 16, 16, 64, 64]


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "{}",
        '{"overheads": []}',
        '{"overheads": [{"batch": 1, "heads_us": 1}]}',
        '{"overheads": [{"batch": 0, "heads_us": 1, "neurons_us": 1}]}',
        '{"overheads": [{"batch": 1, "heads_us": NaN, "neurons_us": 1}]}',
        '{"overheads": [{"batch": 1, "heads_us": -1, "neurons_us": 1}]}',
    ],
)
def test_a_damaged_table_is_named(text):
    with pytest.raises(ValueError, match=r"h300\.json is no table of overheads"):
        crossover.parse(text, "h300.json")


def test_tables_in_the_package_are_whole():
    from importlib import resources

    folder = resources.files("polarjax.planning") / "overheads"
    for file in folder.iterdir() if folder.is_dir() else ():
        assert crossover.parse(file.read_text(), file.name)


def test_the_command_measures_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_overheads, "read_bandwidth", lambda device: 1e10)
    out = tmp_path / "toy.json"
    if jax.default_backend() != "gpu":  # there it would measure
        assert measure_overheads.main(["--batches", "2"]) == 1
        assert "needs a GPU" in capsys.readouterr().err
    arguments = ["--toy", "--batches", "2", "--out", str(out)]
    assert measure_overheads.main(arguments) == 0
    [found] = crossover.parse(out.read_text(), str(out))
    assert found.batch == 2 and f"{found.heads_us:.1f} us" in capsys.readouterr().out
    assert json.loads(out.read_text())["device"] == jax.devices()[0].device_kind
