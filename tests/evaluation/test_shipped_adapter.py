"""The adapter in the package, on text that it was not trained on."""

import gzip
import json

import numpy as np
import pytest

import polarjax
from benchmarks import readme
from polarjax.evaluation import perplexity, router_recall, window_items
from polarjax.generation import Tokenizer
from polarjax.hub import find_adapter

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def model(smollm2_folder):
    return polarjax.load(smollm2_folder, adapter=NAME)


@pytest.fixture(scope="module")
def tokens(model, shared_data):
    path = shared_data / "text" / "wikitext2_raw_test.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return np.array(Tokenizer.load(model.config).encode(file.read(40_000)))


def test_recall_is_far_above_chance_on_held_out_text(model, tokens):
    batches = tokens[:4096].reshape(8, 1, 512)
    recall = router_recall(model, batches)
    found, chance = recall.routers, recall.chance
    assert abs(chance.mean() - 2 / 3) < 0.01
    assert found.mean() > chance.mean() + 0.15
    assert (found > chance).all()


def test_perplexity_is_closer_to_the_oracles_than_to_chance(model, tokens):
    policies = {"o": polarjax.Oracle(), "p": polarjax.Polar(), "r": polarjax.Random()}
    windows = window_items(tokens[:768], 96, 32)
    oracle, polar, chance = perplexity(model, windows, policies, batch=8).values()
    assert oracle.density == polar.density == chance.density
    assert oracle.value < polar.value < chance.value
    assert polar.value - oracle.value < chance.value - polar.value


def test_it_is_small_and_belongs_to_the_default_model(model):
    folder = find_adapter(NAME)
    assert sum(f.stat().st_size for f in folder.iterdir()) < 5_000_000
    assert model.config.budgets == (3, *[2] * 29)


def test_the_readme_says_what_its_card_says():
    text = (readme.REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert readme.render(text) == text, "run `python -m benchmarks.readme`"


def test_the_card_names_its_training_and_what_it_is_worth():
    card = json.loads((find_adapter(NAME) / "card.json").read_text(encoding="utf-8"))
    assert card["tokens"] >= 10_000_000 and card["parameters"] < 2_400_000
    assert card["made"]["command"].startswith("polarjax recover")
    for name, found in card["quality"].items():
        recall = card["recall"][name]["mean"]
        assert recall["routers"] > recall["chance"] + 0.2
        ratio = {policy: x["ratio_to_dense"][0] for policy, x in found.items()}
        assert 1 < ratio["Oracle"] < ratio["Polar"] < 1.2 < ratio["Random"]
