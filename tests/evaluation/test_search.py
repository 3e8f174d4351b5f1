"""The search for budgets: what it measures, in which order, and at what price."""

import dataclasses
import itertools

import numpy as np
import pytest

import polarjax
from polarjax.evaluation import search
from polarjax.evaluation.search import search_budgets, search_path
from polarjax.sparsity.cost import StepCost, step_cost
from polarjax.sparsity.distance import distance, divergence
from tests.evaluation.planted import IDLE, own_blocks, planted, sabotaged
from tests.models import LLAMA, OPT, random_params

WINDOWS = 12


def fake(loss, noise=0.0):
    """An evaluation whose mean loss is `loss(budgets)`; notes its calls."""
    calls = []

    def evaluate(budgets):
        calls.append(budgets)
        rng = np.random.default_rng(list(budgets))
        return loss(budgets) + noise * rng.normal(size=WINDOWS)

    return evaluate, calls


def cost_of(k, layers, routers=0, groups=()):
    return StepCost(1000, (routers,) * layers, groups or (10,) * layers, k)


def path_of(evaluate, cost, limit=1.0, width=4, step=1):
    return search_path(evaluate, cost, limit=limit, width=width, step=step)


def lowered(path):
    """The layer that each step of a path lowers."""
    return [
        next(
            i
            for i, (a, b) in enumerate(zip(x.budgets, y.budgets, strict=True))
            if a > b
        )
        for x, y in itertools.pairwise(path)
    ]


def test_additive_losses_are_taken_in_order():
    price = np.array([0, 5, 1, 4, 2, 3]) * 1e-3

    def loss(budgets):
        return float(price @ (2 - np.array(budgets)))

    evaluate, calls = fake(loss)
    path = path_of(evaluate, cost_of(2, 6), limit=0.0075)
    assert lowered(path) == [2, 4, 5]  # 1 + 2 + 3 + 4 thousandths would be too much
    # Where costs do not grow, one measurement of the leader suffices.
    assert len(calls) == 5 + 3
    assert len(set(calls)) == len(calls)
    np.testing.assert_allclose(
        [s.divergence.value for s in path], [0, 1e-3, 3e-3, 6e-3], atol=1e-12
    )
    assert path[0].density == 1 and path[-1].density == 9 / 12
    assert [s.saved_bytes for s in path] == [0, 10, 20, 30]
    assert all(s.step_bytes + s.saved_bytes == 1120 for s in path)


def test_sets_are_measured_not_layers():
    """Layers 1 and 2 do the same work: either may go, never both."""

    def loss(budgets):
        both = budgets[1] == budgets[2] == 1
        return 0.1 * both + 0.002 * (budgets[3] == 1) + 0.003 * (budgets[4] == 1)

    evaluate, calls = fake(loss)
    path = path_of(evaluate, cost_of(2, 5), limit=0.01)
    assert lowered(path) == [1, 3, 4]  # 2 alone is free, with 1 it is not
    assert (2, 1, 1, 2, 2) in calls and path[-1].divergence.value < 0.006
    assert (2, 2, 1, 1, 2) not in calls  # not measured beside what is not taken


def test_the_loss_counts_by_the_byte():
    def loss(budgets):
        return 0.001 * (budgets[1] == 1) + 0.002 * (budgets[2] == 1)

    evaluate, _ = fake(loss)
    path = path_of(evaluate, cost_of(2, 3, groups=(10, 10, 40)))
    assert lowered(path) == [2, 1]  # twice the loss, but four times the bytes
    evaluate, _ = fake(loss)
    assert lowered(path_of(evaluate, cost_of(2, 3))) == [1, 2]


def test_router_rows_are_paid_for():
    evaluate, calls = fake(lambda budgets: 0.0)
    assert len(path_of(evaluate, cost_of(3, 4, routers=25))) == 1
    assert not calls  # two groups save less than the router reads
    # Of three groups two must go before a byte is saved.
    path = path_of(fake(lambda budgets: 0.0)[0], cost_of(3, 2, routers=15))
    assert [s.budgets for s in path] == [(3, 3), (3, 1)]
    assert path[-1].saved_bytes == 5


@pytest.mark.parametrize("k, step, counts", [(32, 4, 9), (3, 1, 3), (1, 1, 1)])
def test_many_heads_go_several_at_once(k, step, counts):
    evaluate, _ = fake(lambda budgets: 1e-4 * (2 * k - sum(budgets)))
    path = path_of(evaluate, cost_of(k, 2), step=step)
    assert len(path) == counts
    assert path[-1].budgets == (k, 1)
    read = [s.budgets[1] for s in path]
    assert all(a - b <= step for a, b in itertools.pairwise(read))


@pytest.mark.parametrize("width", [1, 3])
def test_a_step_measures_few_candidates(width):
    layers = 12

    def loss(budgets):  # costs grow with the number of sparse layers
        return 1e-4 * (2 * layers - sum(budgets)) ** 2

    evaluate, calls = fake(loss, noise=1e-5)
    path = path_of(evaluate, cost_of(2, layers), width=width)
    assert len(path) == layers
    assert len(calls) <= (layers - 1) + width * (layers - 2)
    read = [s.step_bytes for s in path]
    assert read == sorted(read, reverse=True) and len(set(read)) == len(read)
    for one, next_one in itertools.pairwise(path):
        assert all(a >= b for a, b in zip(one.budgets, next_one.budgets, strict=True))


def test_damaged_weights_are_named():
    evaluate, _ = fake(lambda budgets: np.nan if min(budgets) == 1 else 0.0)
    with pytest.raises(ValueError, match=r"budgets \(2, 1, 2\) yield no finite"):
        path_of(evaluate, cost_of(2, 3))


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_bytes_are_those_that_generate_counts(config):
    params = random_params(config, routers=True, head_rank=3)
    prompts, new, k = [[1, 2, 3], [4, 5, 6]], 4, config.kv_heads
    budgets = (k, 1, k, k - 1)
    sparse = dataclasses.replace(params.config, budgets=budgets)
    params = dataclasses.replace(params, config=sparse)
    stats = polarjax.generate(params, prompts, max_new_tokens=new).stats
    cost = step_cost(params, batch=2, context=5)
    # The KV rows of its steps grow by one each; their weights are the same.
    steps = stats.steps
    assert (
        cost.bytes_read(budgets)
        - sum(n * g for n, g in zip(budgets, cost.group, strict=True))
        == stats.weight_bytes
    )
    rows = stats.kv_bytes_dense / (2 * k * config.layers * 2 * config.head_dim * 4)
    assert cost.group[0] * rows / 5 * sum(budgets) == pytest.approx(stats.kv_bytes)
    assert steps >= 3
    without = dataclasses.replace(params, routers={})
    assert step_cost(without, batch=2, context=5).routers == (0,) * 4
    with pytest.raises(ValueError, match="batch 0 and context 5 must be positive"):
        step_cost(params, batch=0, context=5)
    for wrong in ((k,) * 3, (k, 0, k, k), (k, k, k, k + 1)):
        with pytest.raises(ValueError, match=f"4 numbers from 1 to {k}"):
            cost.bytes_read(wrong)


@pytest.fixture(scope="module")
def model():
    params = planted()
    return params, own_blocks(params, 12)


OPTIONS = {"limit": 0.06, "batch": 8, "context": 64, "rows": 8}


def test_idle_groups_go_first(model):
    params, blocks = model
    path = search_budgets(params, blocks, **OPTIONS)
    assert sorted(lowered(path)[:2]) == sorted(IDLE)
    assert path[0].divergence == (0, 0, 0)
    assert path[2].divergence.value == pytest.approx(0, abs=1e-6)
    assert len(path) > 3 and all(s.divergence.value > 1e-4 for s in path[3:])
    assert all(s.budgets[0] == LLAMA.kv_heads for s in path)
    assert path == search_budgets(params, blocks, **OPTIONS)
    # A router that picks just those groups finds nothing that is free.
    wrong = search_budgets(sabotaged(params), blocks, **OPTIONS)
    assert all(s.divergence.value > 1e-4 for s in wrong[1:])
    # An oracle needs no router.
    bare = dataclasses.replace(params, routers={})
    oracle = search_budgets(bare, blocks, policy=polarjax.Oracle(), **OPTIONS)
    assert sorted(lowered(oracle)[:2]) == sorted(IDLE)


@pytest.mark.parametrize("prompt", [0, 7])
def test_one_program_measures_what_polar_does(model, prompt):
    params, blocks = model
    journal, before = {}, search._divergences._cache_size()
    search_budgets(params, blocks, prompt=prompt, journal=journal, **OPTIONS)
    assert len(journal) > 4
    assert search._divergences._cache_size() <= before + 1
    # The last of the path are far from dense.
    for key in list(journal)[-2:]:
        budgets = tuple(map(int, key.removeprefix("divergence/").split(",")))
        config = dataclasses.replace(params.config, budgets=budgets)
        usual = dataclasses.replace(params, config=config)
        starts = np.full(1, prompt)
        for row, found in zip(blocks, journal[key], strict=True):
            expected = distance(usual, row[None], starts)[0]
            assert found == pytest.approx(float(expected), rel=1e-4)
        if not prompt:
            whole = divergence(usual, blocks)
            assert np.mean(journal[key]) == pytest.approx(whole, rel=1e-4)


def test_recoverys_updates_are_the_sparse_models(model):
    """They count as soon as a layer is sparse: an idle group is not free any more."""
    params, blocks = model
    name = "layers_2"
    shape = params.weights[name]["mlp"]["down"].shape
    update = {"b": np.full((shape[0], 1), 0.1), "a": np.full((1, shape[1]), 0.01)}
    parts = {**params.routers[name], "updates": {"mlp": {"down": update}}}
    updated = dataclasses.replace(params, routers={**params.routers, name: parts})
    one, other = ({}, {})
    search_budgets(params, blocks, journal=one, **OPTIONS)
    search_budgets(updated, blocks, journal=other, **OPTIONS)
    idle = "divergence/4,3,4,4"
    assert max(one[idle]) < 1e-6 < min(other[idle])


def test_goes_on_where_it_was_cut_short(model, monkeypatch):
    params, blocks = model
    journal, said = {}, []
    path = search_budgets(
        *(params, blocks),
        journal=journal,
        progress=lambda *args: said.append(args),
        **OPTIONS,
    )
    assert len(said) == len(journal)
    assert said[-1][0] == "searching budgets" and said[-1][1] <= said[-1][2]
    measured, measure = [], search._divergences
    monkeypatch.setattr(
        *(search, "_divergences"),
        lambda *args, **named: measured.append(1) or measure(*args, **named),
    )
    assert search_budgets(params, blocks, journal=journal, **OPTIONS) == path
    assert not measured
    part = dict(list(journal.items())[:-3])
    assert search_budgets(params, blocks, journal=part, **OPTIONS) == path
    assert part == journal and len(measured) == 3 * 2  # two batches for each


def test_errors(model):
    params, blocks = model
    for name in ("limit", "width", "rows"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            search_budgets(params, blocks, **{**OPTIONS, name: 0})
    with pytest.raises(ValueError, match="no calibration window"):
        search_budgets(params, blocks[:0], **OPTIONS)
    with pytest.raises(ValueError, match="below a window of 24 tokens, got 24"):
        search_budgets(params, blocks, prompt=24, **OPTIONS)
    with pytest.raises(ValueError, match="a search finds it, leave it out"):
        search_budgets(params, blocks, policy=polarjax.Polar(0.5), **OPTIONS)
    with pytest.raises(ValueError, match="no router for layer 1"):
        bare = dataclasses.replace(params, routers={})
        search_budgets(bare, blocks, **OPTIONS)
