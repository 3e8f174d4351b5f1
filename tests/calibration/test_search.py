"""The search for budgets: what it measures, in which order, and at what price."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

import polarjax
from polarjax.calibration import search
from polarjax.calibration.contract import choose_sequence
from polarjax.calibration.path import search_path
from polarjax.calibration.search import Search, search_budgets
from polarjax.evaluation import Scorer, perplexity
from polarjax.planning.cost import StepCost, step_cost
from polarjax.policies import with_learned
from polarjax.policy import Reads
from polarjax.training.thresholds import score_thresholds, sorted_scores
from tests.evaluation.planted import IDLE, own_text, planted, sabotaged
from tests.models import LLAMA, OPT, random_params

WINDOWS = 12
SCORED = [np.full(WINDOWS, 10)]


def fake(loss, noise=0.0):
    """An evaluation whose mean loss per token is `loss(budgets)`; notes its calls."""
    calls = []

    def evaluate(budgets):
        calls.append(budgets)
        rng = np.random.default_rng([round(12 * n) for n in budgets])
        return 30 + 10 * (loss(budgets) + noise * rng.normal(size=WINDOWS))

    return evaluate, calls


def cost_of(k, layers, routers=0, groups=()):
    return StepCost(1000, (routers,) * layers, groups or (10,) * layers, k)


def path_of(evaluate, cost, limit=1.0, width=4, step=1):
    return search_path(evaluate, cost, SCORED, limit=limit, width=width, step=step)


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
    assert len(calls) == 1 + 5 + 3 and calls[0] == (2,) * 6
    assert len(set(calls)) == len(calls)
    np.testing.assert_allclose(
        [s.drop.value for s in path], np.expm1([0, 1e-3, 3e-3, 6e-3]), atol=1e-12
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
    assert (2, 1, 1, 2, 2) in calls and path[-1].drop.value < 0.006
    assert (2, 2, 1, 1, 2) not in calls  # not measured beside what is not taken


def test_the_domain_that_loses_most_counts():
    """Layer 1 gains on one domain and costs the other; layer 2 costs both a little."""

    def losses(budgets):
        one, other = (n == 1 for n in budgets[1:])
        gain = np.array([-0.008] * 5 + [0.004] * 3) * one
        return np.array([30.0] * 5 + [60.0] * 3) + np.array([10] * 5 + [20] * 3) * (
            gain + 0.001 * other
        )

    scored = [np.full(5, 10), np.full(3, 20)]
    options = {"limit": 1.0, "width": 4, "step": 1}
    path = search_path(losses, cost_of(2, 3), scored, **options)
    assert lowered(path) == [2, 1]  # by the mean 1 would be first, it gains
    drops = [s.drop.value for s in path]
    np.testing.assert_allclose(drops, np.expm1([0, 0.001, 0.005]), atol=1e-12)


def test_of_three_domains_what_a_further_one_may_lose():
    """Layer 1 costs one domain alone, layer 2 all of them a little more than that."""
    gain = np.array([[0.0, 0.0, 0.004], [0.005, 0.005, 0.005], [-0.02, -0.02, -0.02]])

    def losses(budgets):
        less = np.array([n == 1 for n in budgets[1:]]) @ gain
        return np.repeat(3.0 + less, 4) * 10

    scored = [np.full(4, 10)] * 3
    options = {"limit": 1.0, "width": 4, "step": 1}
    path = search_path(losses, cost_of(2, 4), scored, **options)
    assert lowered(path) == [3, 2, 1]
    t = 4.30265273  # of two degrees of freedom, 95 % two-sided
    spread = t * np.std([0, 0, 0.004], ddof=1) * np.sqrt(4 / 3)
    # What layer 3 gained is no credit.
    bounds = np.expm1([0, 0.005, 0.005 + 0.004 / 3 + spread])
    assert [s.further for s in path[1:]] == pytest.approx(bounds, abs=1e-9)
    drops = np.expm1([-0.02, -0.015, -0.011])
    assert [s.drop.value for s in path[1:]] == pytest.approx(drops, abs=1e-9)
    assert [s.saved_bytes for s in choose_sequence(path, 0.012)] == [10, 20]


def test_harm_to_the_unharmed_is_no_gain():
    """Layer 1 harms one domain, layer 2 the others as much, layer 3 all a little."""
    harm = np.array([[0.0, 0.0, 0.01], [0.01, 0.01, 0.0], [0.001, 0.001, 0.001]])

    def losses(budgets):
        less = np.array([n == 1 for n in budgets[1:]]) @ harm
        return np.repeat(3.0 + less, 4) * 10

    # Layer 1 is free of bytes to read first: it is taken before the others.
    cost = StepCost(1000, (0,) * 4, (10, 1000, 10, 10), 2)
    options = {"limit": 1.0, "width": 4, "step": 1}
    path = search_path(losses, cost, [np.full(4, 10)] * 3, **options)
    assert lowered(path) == [1, 3, 2]


def test_parts_of_a_group_are_spread_over_layers():
    """The first tokens of a layer to lose a group cost little, the last ones much."""

    def loss(budgets):
        return float(sum((2 - n) ** 2 for n in budgets)) * 1e-3

    evaluate, _ = fake(loss)
    path = path_of(evaluate, cost_of(2, 5), step=0.25)
    by_density = {s.density: s for s in path}
    assert sorted(by_density[0.8].budgets) == [1.5, 1.5, 1.5, 1.5, 2]
    whole = path_of(fake(loss)[0], cost_of(2, 5))
    assert whole[2].density == 0.8
    assert by_density[0.8].drop.value < whole[2].drop.value / 1.9
    assert path[-1].budgets == (2, 1, 1, 1, 1)
    assert all(s.step_bytes + s.saved_bytes == 1100 for s in path)


def test_thresholds_make_budgets_means():
    """Each setting reads, over the text, what its budgets say."""
    params = random_params(LLAMA, routers=True, scale=0.25)
    domains, k = {"own": own_text(params, 24)}, LLAMA.kv_heads
    blocks = np.array([w.tokens for w in domains["own"]])
    found = functools.partial(
        score_thresholds, sorted_scores(params, blocks), kv_heads=k
    )
    options = dataclasses.replace(OPTIONS, max_drop=0.1)
    path = search_budgets(params, domains, options, thresholds=found)
    assert len(path) > 2 and any(n != int(n) for s in path for n in s.budgets)
    last = with_learned(
        params,
        budgets=path[-1].budgets,
        adaptive=True,
        thresholds=found(path[-1].budgets),
    )
    policies = {"Polar": polarjax.Polar(), "Dense": polarjax.Dense()}
    scored = perplexity(last, domains["own"], policies, mode="mask")
    assert scored["Polar"].density == pytest.approx(path[-1].density, abs=0.02)
    # The same setting, another way: the search scores what decoding will do.
    ratio = scored["Polar"].ratio(scored["Dense"]).value
    assert path[-1].drop.value == pytest.approx(ratio - 1, abs=1e-5)


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
    assert calls == [(3,) * 4]  # two groups save less than the router reads
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
    assert len(calls) <= 1 + (layers - 1) + width * (layers - 2)
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
    prompts, new, k = [[1, 2, 3], [4, 5, 6]], 4, config.kv_heads
    budgets = (k, 1, k, k - 1)
    params = random_params(config, routers=True, head_rank=3, budgets=budgets)
    stats = polarjax.generate(params, prompts, max_new_tokens=new).stats
    cost = step_cost(params, batch=2, context=5)
    # The KV rows of its steps grow by one each; their weights are the same.
    steps = stats.steps
    assert (
        cost.bytes_read(Reads(budgets))
        - sum(n * g for n, g in zip(budgets, cost.group, strict=True))
        == stats.weight_bytes
    )
    rows = stats.kv_bytes_dense / (2 * k * config.layers * 2 * config.head_dim * 4)
    assert cost.group[0] * rows / 5 * sum(budgets) == pytest.approx(stats.kv_bytes)
    assert steps >= 3
    without = with_learned(params, routers={})
    assert step_cost(without, batch=2, context=5).routers == (0,) * 4
    with pytest.raises(ValueError, match="batch 0 and context 5 must be positive"):
        step_cost(params, batch=0, context=5)
    for wrong in ((k,) * 3, (k, 0, k, k), (k, k, k, k + 1)):
        with pytest.raises(ValueError, match=f"4 numbers from 1 to {k}"):
            cost.bytes_read(Reads(wrong))


@pytest.fixture(scope="module")
def model():
    params = planted()
    return params, {"own": own_text(params, 16)}


OPTIONS = Search(max_drop=0.03, batch=8, context=64, rows=8)


def test_idle_groups_go_first(model):
    params, domains = model
    path = search_budgets(params, domains, OPTIONS)
    assert sorted(lowered(path)[:2]) == sorted(IDLE)
    assert path[2].drop.value == pytest.approx(0, abs=1e-6)
    assert all(s.drop.value > 1e-4 for s in path[3:])
    assert all(s.budgets[0] == LLAMA.kv_heads for s in path)
    assert path == search_budgets(params, domains, OPTIONS)
    # A router that picks just those groups finds nothing that is free.
    wrong = search_budgets(sabotaged(params), domains, OPTIONS)
    assert all(s.drop.value > 1e-4 for s in wrong[1:])
    # An oracle needs no router.
    bare = with_learned(params, routers={})
    oracle = search_budgets(bare, domains, OPTIONS, policy=polarjax.Oracle())
    assert sorted(lowered(oracle)[:2]) == sorted(IDLE)


@pytest.mark.parametrize("mode", ["mask", "decode"])
def test_one_program_scores_what_polar_does(model, mode, monkeypatch):
    params, domains = model
    made = []

    class Noted(search._Budgeted):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(search, "_Budgeted", Noted)
    journal = {}
    options = dataclasses.replace(OPTIONS, mode=mode)
    search_budgets(params, domains, options, journal=journal)
    [scorer] = made
    assert len(journal) > 4
    assert len(scorer._programs) == (1 if mode == "mask" else 2)  # one: the prefill
    # The last of the path are far from dense.
    for key in list(journal)[-1 if mode == "decode" else -2 :]:
        budgets = tuple(map(int, key.removeprefix("budgets/").split(",")))
        model = with_learned(params, budgets=budgets)
        usual = Scorer(model, {"": polarjax.Polar()}, mode=mode, batch=8)
        batches = usual.plan(domains["own"])
        usual.compile(batches)
        for batch in batches:
            found = usual.score(batch)[""].nll
            for row, nll in zip(batch.rows, found, strict=True):
                assert journal[key][row.item] == pytest.approx(nll.sum(), rel=1e-5)


def test_the_drop_is_from_the_original_model(model, monkeypatch):
    """Recovery's updates are the sparse policy's: they must not move the baseline."""
    params, domains = model
    bind = polarjax.Polar.bind

    def updated(self, params):
        weights, bound = bind(self, params)
        norm = {"scale": 1.2 * weights["final_norm"]["scale"]}
        return {**weights, "final_norm": norm}, bound

    usual = search_budgets(params, domains, OPTIONS, journal=(one := {}))
    monkeypatch.setattr(polarjax.Polar, "bind", updated)
    path = search_budgets(params, domains, OPTIONS, journal=(other := {}))
    dense = next(iter(one))
    assert one[dense] == other[dense] and path[0] == usual[0]
    idle = next(key for key in one if key in other and key != dense)
    assert one[idle] != pytest.approx(other[idle], rel=1e-4)


def test_goes_on_where_it_was_cut_short(model, monkeypatch):
    params, domains = model
    journal, said = {}, []
    path = search_budgets(
        params,
        domains,
        OPTIONS,
        journal=journal,
        progress=lambda *args: said.append(args),
    )
    assert len(said) == len(journal)
    assert said[-1][0] == "searching budgets" and said[-1][1] <= said[-1][2]
    scored, score = [], Scorer.score
    monkeypatch.setattr(
        Scorer, "score", lambda self, batch: scored.append(1) or score(self, batch)
    )
    assert search_budgets(params, domains, OPTIONS, journal=journal) == path
    assert not scored
    part = dict(list(journal.items())[:-3])
    assert search_budgets(params, domains, OPTIONS, journal=part) == path
    assert part == journal and len(scored) == 3 * 2  # two batches for each


def test_errors(model):
    params, domains = model
    for name in ("max_drop", "width", "rows", "reach"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            dataclasses.replace(OPTIONS, **{name: 0})
    with pytest.raises(ValueError, match="no calibration window"):
        search_budgets(params, {"own": []}, OPTIONS)
    with pytest.raises(ValueError, match="a search finds it, leave it out"):
        search_budgets(params, domains, OPTIONS, policy=polarjax.Polar(0.5))
    with pytest.raises(ValueError, match="no router for layer 1"):
        bare = with_learned(params, routers={})
        search_budgets(bare, domains, OPTIONS)
