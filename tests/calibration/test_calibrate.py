"""`calibrate` as a whole: what it promises depends on what its routers learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polarjax.calibration import calibrate as module
from polarjax.calibration.calibrate import Calibration, Terms, Texts, calibrate
from polarjax.calibration.contract import Contract
from polarjax.calibration.recover import Recovered
from polarjax.evaluation import Perplexity
from polarjax.policies import load_adapter, save_adapter, with_learned
from polarjax.training import RouterTraining, Source, train_routers
from tests.evaluation.planted import IDLE, planted
from tests.models import LLAMA, OPT, random_params, write_checkpoint

TEXTS = Texts([Source.parse("self")], tokens=64 * 24, context=24, held_out=48 * 24)
TRAINING = RouterTraining(density=0.75, steps=200, batch=8)
CONFIG = dataclasses.replace(LLAMA, layers=2, vocab_size=257)
TERMS = Terms(0.02, mode="mask", batch=16, context=64, adaptive=False)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """A model of which two groups do nothing, with no routers yet."""
    model = with_learned(planted(), routers={})
    return write_checkpoint(tmp_path_factory.mktemp("planted") / "model", model)


def test_a_promise_is_kept_by_routers_that_learned(params):
    found = calibrate(params, TEXTS, TRAINING, terms=TERMS, mode="mask")
    contract = found.contract
    assert contract is not None and contract.kept
    budgets = found.params.policy.learned.budgets
    assert budgets == contract.budgets and min(budgets) == 3
    assert all(n == 4 for layer, n in enumerate(budgets) if layer not in IDLE)
    ratio = found.perplexity["self"]["Polar"].ratio(found.perplexity["self"]["Dense"])
    assert ratio.value < 1.02
    for layer, group in IDLE.items():
        assert found.recall["self"].routers[layer - 1] > 0.98, (layer, group)
    card = found.card()
    assert card["contract"]["budgets"] == list(budgets)
    assert card["training"]["steps"] == 200


def test_a_promise_of_budgets_that_are_means(params, tmp_path):
    terms = dataclasses.replace(TERMS, max_drop=0.1, adaptive=True)
    found = calibrate(params, TEXTS, TRAINING, terms=terms, mode="mask")
    contract, learned = found.contract, found.params.policy.learned
    assert contract is not None and contract.chosen is not None
    assert learned.adaptive and learned.budgets == contract.budgets
    reached = contract.chosen.domains["self"].density
    assert reached == pytest.approx(contract.chosen.setting.density, abs=0.04)
    # What was tested is what the adapter decodes.
    quality = found.perplexity["self"]
    assert set(quality) == {"Dense", "Polar", "Random"}
    ratio = quality["Polar"].ratio(quality["Dense"])
    assert ratio.value < 1.1 < quality["Random"].ratio(quality["Dense"]).value
    save_adapter(tmp_path / "a", found.params, found.card())
    loaded = load_adapter(params, tmp_path / "a")
    assert loaded.config == params.config
    assert loaded.policy.learned.numbers() == learned.numbers()
    ranking = dataclasses.replace(TRAINING, loss="ranking")
    with pytest.raises(ValueError, match="do not compare between tokens"):
        calibrate(params, TEXTS, ranking, terms=terms)


def test_routers_that_are_mixed_up_promise_nothing(params, monkeypatch):
    """What was learned of one group is said of another."""
    train = module.train_routers

    def sabotaged(*args, **options):
        trained = train(*args, **options)
        routers = {
            name: {"heads": {k: jnp.roll(x, 1, 0) for k, x in parts["heads"].items()}}
            for name, parts in trained.routers.items()
        }
        return with_learned(trained, routers=routers)

    monkeypatch.setattr(module, "train_routers", sabotaged)
    found = calibrate(params, TEXTS, TRAINING, terms=TERMS, mode="mask")
    assert found.contract is not None and not found.contract.kept
    assert found.params.policy.learned.budgets == (4, 4, 4, 4)
    assert "only dense passes" in str(found.contract)
    assert found.recall["self"].routers[0] < 0.9


def test_it_stops_where_recall_is_enough(params):
    told = []
    # Whatever a program of one's own forbids.
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = calibrate(
            params,
            TEXTS,
            dataclasses.replace(TRAINING, steps=40, batch=4),
            target_recall=0.8,
            mode="mask",
            progress=lambda *now: told.append(now),
        )
    steps = [done for what, done, _ in told if what.startswith("training")]
    assert steps[-1] % 2 == 0 and steps[-1] < 40
    assert found.contract is None and "contract" not in found.card()
    assert found.params.policy.learned.budgets == (4, 3, 3, 3)


def test_neuron_budgets_come_along(tmp_path):
    config = dataclasses.replace(OPT, layers=2, vocab_size=257)
    params = write_checkpoint(tmp_path / "model", random_params(config))
    training = dataclasses.replace(TRAINING, neuron_rank=8)
    found = calibrate(params, TEXTS, training, mode="mask")
    budgets = found.params.policy.learned.neuron_budgets
    assert [batch for batch, _ in budgets] == [1, 8]
    assert set(found.card()["neurons"]) == {"1", "8"}
    few = dataclasses.replace(TEXTS, tokens=24)
    with pytest.raises(ValueError, match="neuron routers need two blocks at the least"):
        calibrate(params, few, training, mode="mask")


def measured(**ratios):
    """Perplexities of domains, those of Polar so many times dense's."""
    scored = np.array([10, 10])
    return {
        name: {
            "Dense": Perplexity(scored * 3.0, scored),
            "Polar": Perplexity(scored * (3.0 + np.log(ratio)), scored, 0.7),
            "Random": Perplexity(scored * 9.0, scored, 0.7),
        }
        for name, ratio in ratios.items()
    }


def test_much_worse_is_said_and_not_advertised(params):
    facts = {"tokens": 8192}
    trained = random_params(CONFIG, routers=True, budgets=(4, 2))

    def made(quality, contract=None):
        return Calibration(trained, {}, quality, contract, facts)

    for fine in (measured(a=1.0, b=1.14), measured(a=0.7)):
        assert made(fine).warning is None
        card = made(fine).card()
        assert card["cost"]["expected_speedup"] > 1 and "warning" not in card
    worse = made(measured(a=1.0, b=1.64, c=1.2))
    warning = worse.warning
    assert warning and warning.startswith("perplexity of b is 64% above the dense mod")
    assert "--tokens, now 8,192" in warning and "--max-drop" in warning
    card = worse.card()
    assert card["warning"] == warning and "expected_speedup" not in card["cost"]
    recovered = Recovered(trained, {}, {}, {}, measured(a=1.64), facts)
    assert "--rank" in (recovered.warning or "")
    assert "expected_speedup" not in recovered.card()["cost"]
    # What was asked for is no surprise.
    asked = Contract(0.7, 0.95, "mask", 16, ("a",), (), ())
    assert made(measured(a=1.64), asked).warning is None
    assert made(measured(a=1.75), asked).warning


def test_budgets_of_the_checkpoint_are_not_of_the_new_routers(params):
    """A model that was saved with an adapter whose budgets are means."""
    saved = with_learned(
        params,
        budgets=(4, 2.5, 2.5, 2.5),
        adaptive=True,
        thresholds=(0.0, 0.1, 0.2, 0.3),
    )
    training = dataclasses.replace(TRAINING, steps=1)
    found = train_routers(saved, np.ones((8, 24), np.int32), training)
    learned = found.policy.learned
    assert learned.budgets == (4, 3, 3, 3)
    assert not learned.adaptive and not learned.thresholds


def test_errors(params):
    for wrong, match in (
        ({"tokens": 23}, "at least one block"),
        ({"context": 1}, "context must be an integer of at least 2, got 1"),
        ({"tokens": 0}, "tokens must be a positive integer, got 0"),
        ({"held_out": -1}, "held_out must be a positive integer, got -1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"context": 513}, "context is 513, beyond the model's context of"),
        ({"held_out": 47}, "at least two blocks of 24 tokens to measure on"),
        ({"sources": []}, "no text to read"),
    ):
        with pytest.raises(ValueError, match=match):
            calibrate(params, dataclasses.replace(TEXTS, **wrong), TRAINING)
    bare = dataclasses.replace(params.config, folder="")
    with pytest.raises(ValueError, match="calibration needs a tokenizer"):
        calibrate(dataclasses.replace(params, config=bare), TEXTS, TRAINING)
    # Before the training, not after it.
    for terms, match in (
        ({"max_drop": 0.0}, "max_drop must be positive, got 0"),
        ({"max_drop": np.nan}, "max_drop must be positive, got nan"),
        ({"max_drop": 0.01, "confidence": 1.0}, "between 0 and 1, got 1"),
        ({"max_drop": 0.01, "batch": 0}, r"batch \(--decode-batch\) must be a pos"),
        ({"max_drop": 0.01, "context": 0}, r"context \(--decode-context\) must be a"),
    ):
        with pytest.raises(ValueError, match=match):
            Terms(**terms)
    few = dataclasses.replace(TEXTS, held_out=48)
    with pytest.raises(ValueError, match="needs three blocks of each text"):
        calibrate(params, few, TRAINING, terms=TERMS)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"passes": 0}, "passes must be a number above 0, got 0"),
        ({}, {"passes": np.nan}, "passes must be a number above 0, got nan"),
        ({}, {"target_recall": 2}, "target_recall must be .* and at most 1, got 2"),
        ({}, {"target_recall": 0.0}, "target_recall must be a number above 0"),
        ({"learning_rate": 0.0}, {}, "learning_rate must be a number above 0, got 0.0"),
        ({"batch": 65}, {}, "batch is 65, but the text to learn from has 64 blocks"),
        ({"head_rank": 1025}, {}, "has rank 1025: it must be between 1 and 1024"),
        ({"neuron_rank": 8}, {}, "neuron routers are for ReLU MLPs"),
    ],
)
@pytest.mark.usefixtures("no_text_is_read")
def test_what_cannot_be_done_is_said_before_any_text_is_read(
    params, changes, options, message
):
    with pytest.raises(ValueError, match=message):
        calibrate(params, TEXTS, dataclasses.replace(TRAINING, **changes), **options)
