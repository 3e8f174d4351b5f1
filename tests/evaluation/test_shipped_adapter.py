"""The adapters in the package, on text that they were not trained on."""

import gzip
import json

import numpy as np
import pytest

import polarjax
from benchmarks import readme
from polarjax.engine import Tokenizer
from polarjax.evaluation import perplexity, router_recall, window_items
from polarjax.loading import find_adapter
from polarjax.policies import read_card

RECOVERED, PROMISED = "smollm2-135m", "smollm2-135m-1pct"


@pytest.fixture(scope="module")
def recovered(smollm2_folder):
    return polarjax.load(smollm2_folder, adapter=RECOVERED)


@pytest.fixture(scope="module")
def promised(smollm2_folder):
    return polarjax.load(smollm2_folder, adapter=PROMISED)


@pytest.fixture(scope="module")
def tokens(recovered, shared_data):
    path = shared_data / "text" / "wikitext2_raw_test.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return np.array(Tokenizer.load(recovered.config).encode(file.read(40_000)))


@pytest.mark.parametrize("name", [RECOVERED, PROMISED])
def test_recall_is_far_above_chance_on_held_out_text(name, tokens, request):
    model = request.getfixturevalue("recovered" if name == RECOVERED else "promised")
    recall = router_recall(model, tokens[:2048].reshape(4, 1, 512))
    found, chance = recall.routers[recall.sparse], recall.chance[recall.sparse]
    groups = np.floor(model.policy.learned.budgets[1:])[recall.sparse] / 3
    np.testing.assert_allclose(chance, groups, atol=0.03)
    assert found.mean() > chance.mean() + 0.15
    assert (found > chance).all()


@pytest.mark.parametrize(
    "mode", ["mask", pytest.param("decode", marks=pytest.mark.slow)]
)
def test_perplexity_is_closer_to_the_oracles_than_to_chance(recovered, tokens, mode):
    policies = {"o": polarjax.Oracle(), "p": polarjax.Polar(), "r": polarjax.Random()}
    windows = window_items(tokens[:768], 96, 32)
    found = perplexity(recovered, windows, policies, mode=mode, batch=8)
    oracle, polar, chance = found.values()
    assert oracle.density == polar.density == chance.density
    assert oracle.value < polar.value < chance.value
    assert polar.value - oracle.value < chance.value - polar.value


def test_a_promise_costs_little_beside_chance(promised, tokens):
    policies = {"d": polarjax.Dense(), "p": polarjax.Polar(), "r": polarjax.Random()}
    windows = window_items(tokens[:768], 96, 32)
    found = perplexity(promised, windows, policies, mode="mask", batch=8)
    dense, polar, chance = found.values()
    assert 0.85 < polar.density < 0.95 and dense.density == 1
    # Of 512 tokens no more can be said.
    assert polar.ratio(dense).value < 1.02 < 1.1 < chance.ratio(dense).value


def test_they_are_small_and_belong_to_the_default_model(recovered, promised):
    for name in (RECOVERED, PROMISED):
        folder = find_adapter(name)
        assert sum(f.stat().st_size for f in folder.iterdir()) < 5_000_000
    assert recovered.policy.learned.budgets == (3, *[2] * 29)
    learned = promised.policy.learned
    assert learned.adaptive and np.mean(learned.budgets) < 0.93 * 3
    assert not any("updates" in parts for parts in promised.routers.values())


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_tables_say_what_cards_and_results_say(page):
    text = (readme.REPOSITORY / page).read_text(encoding="utf-8")
    assert readme.render(page, text) == text, "run `python -m benchmarks.readme`"


def test_the_card_names_its_training_and_what_it_is_worth():
    card = read_card(find_adapter(RECOVERED))
    assert card["tokens"] >= 10_000_000 and card["parameters"] < 2_400_000
    assert card["made"]["command"].startswith("polarjax recover")
    for name, found in card["quality"].items():
        recall = card["recall"][name]["mean"]
        assert recall["routers"] > recall["chance"] + 0.2
        ratio = {policy: x["ratio_to_dense"][0] for policy, x in found.items()}
        assert 1 < ratio["Oracle"] < ratio["Polar"] < 1.2 < ratio["Random"]


def test_the_card_holds_the_test_that_its_promise_rests_on():
    card = read_card(find_adapter(PROMISED))
    contract = card["contract"]
    assert card["made"]["command"].startswith("polarjax calibrate")
    assert contract["kept"] and contract["max_drop"] == 0.01
    assert contract["mode"] == "decode" and contract["batch"] == 64
    *kept, failed = contract["tested"]
    assert kept[-1]["budgets"] == contract["budgets"] == card["budgets"]
    assert all(setting["passed"] for setting in kept) and not failed["passed"]
    assert kept[-1]["further_domain"] < 0.01 < failed["further_domain"]
    assert len(kept[-1]["domains"]) == 5
    for found in kept[-1]["domains"].values():
        value, low, high = found["ratio"]
        assert low < value < high < 1.01 and found["density"] < 0.93


@pytest.mark.parametrize("text", ["books", "wikitext2"])
def test_the_promise_is_kept_on_further_text(text):
    """As measured on a GPU, of this adapter."""
    path = readme.newest(f"eval-smollm2-contract-{text}-b64")
    record = json.loads(path.read_text(encoding="utf-8"))
    card, routers = read_card(find_adapter(PROMISED)), record["setup"]["adapter"]
    for key in ("budgets", "thresholds"):
        assert list(card[key]) == routers[key]
    polar = record["perplexity"]["windows"]["results"]["Polar"]
    assert polar["against_dense"]["ratio"][0] < 1.01 and polar["density"] < 0.93
