"""What is measured over a mesh is what one device measures."""

import dataclasses

import numpy as np
import pytest

import polarjax
from polarjax import Polar
from polarjax.calibration.search import Search, search_budgets
from polarjax.evaluation import Scorer, Settings, evaluate, measure, perplexity
from polarjax.mesh.cut import make_mesh, shard
from tests.evaluation.test_run import numbers
from tests.evaluation.test_scoring import make_items
from tests.evaluation.test_tasks import make_rows, write
from tests.models import LLAMA, OPT, random_params, write_checkpoint

pytestmark = pytest.mark.devices(8)

SHAPE = {"layers": 2, "vocab_size": 336, "heads": 8, "head_dim": 8}
MODELS = {
    # 4 groups over 8 devices: each is on two.
    "gqa": dataclasses.replace(LLAMA, **SHAPE, kv_heads=4, qk_norm=True),
    "opt": dataclasses.replace(OPT, **SHAPE, kv_heads=8),
}
POLICIES = {
    "gqa": {
        "Dense": polarjax.Dense(),
        "Polar": Polar(0.5),
        "Random": polarjax.Random(0.5),
    },
    "opt": {
        "Oracle": polarjax.Oracle(0.5),
        "Polar": Polar(0.5, 0.4),
        "Balanced": Polar(0.25, 0.4, balanced=4),
    },
}


def make(name):
    return random_params(MODELS[name], routers=True, head_rank=3, neuron_rank=4)


@pytest.mark.parametrize(
    ("name", "mode", "tp", "dp"),
    [
        ("opt", "decode", 4, 2),
        ("gqa", "decode", 8, 1),
        ("opt", "mask", 4, 2),
        pytest.param("gqa", "decode", 2, 4, marks=pytest.mark.slow),
        pytest.param("gqa", "mask", 8, 1, marks=pytest.mark.slow),
        pytest.param("opt", "kernel", 4, 2, marks=pytest.mark.slow),
        pytest.param("opt", "decode", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_every_figure_is_that_of_one_device(name, mode, tp, dp):
    params, policies = make(name), POLICIES[name]
    items = make_items(params.config, choices=5)

    def found(params):  # 5 rows, which two copies do not share evenly
        return measure(Scorer(params, policies, mode=mode, batch=5), items)

    one, many = found(params), found(shard(params, make_mesh(tp, dp)))
    for label, want in one.items():
        mine = many[label]
        np.testing.assert_allclose(mine.nll, want.nll, rtol=1e-5, err_msg=label)
        np.testing.assert_array_equal(mine.greedy, want.greedy)
        np.testing.assert_array_equal(mine.use, want.use)  # head for head
        same = "positions", "density", "neuron_density"
        assert [getattr(mine, x) for x in same] == [getattr(want, x) for x in same]
    assert one["Polar"].density < 1


def test_balanced_is_another_model_on_the_same_rows(tmp_path):
    """As on tp devices, so on one; and not the global choice."""
    config = dataclasses.replace(MODELS["opt"], vocab_size=257, model_hash="abc")
    params = random_params(config, routers=True)
    write_checkpoint(tmp_path / "model", params)
    write(tmp_path / "words.jsonl", make_rows(6))
    (tmp_path / "text.txt").write_text("green bottles on the wall. " * 20)
    policies = {"Polar": Polar(0.5), "Balanced": Polar(0.5, balanced=4)}
    settings = Settings(
        policies,
        batch=4,
        tasks=[tmp_path / "words.jsonl"],
        text=tmp_path / "text.txt",
        tokens=200,
        kinds=(),
        new_tokens=5,
        prompts=3,
        prompt_tokens=9,
    )
    one, _ = evaluate(polarjax.load(tmp_path / "model"), settings)
    cut = polarjax.load(tmp_path / "model", mesh=make_mesh(4, 2))
    many, path = evaluate(cut, settings, out=tmp_path / "many.json")
    assert one["setup"].pop("mesh") is None
    assert many["setup"].pop("mesh") == {"dp": 2, "tp": 4}
    assert numbers(one["setup"]) == numbers(many["setup"])  # the routers' hash too
    assert many["setup"]["policies"]["Balanced"]["balanced"] == 4
    assert_near(numbers(one), numbers({**many, "made": one["made"]}))
    nll = [many["tasks"]["words"]["results"][x]["nll"] for x in policies]
    assert np.abs(np.subtract(*nll)).max() > 0.01
    against = many["tasks"]["words"]["results"]["Balanced"]["against_dense"]
    assert len(against["accuracy"]) == 3
    pytest.importorskip("matplotlib", reason="needs it: pip install matplotlib")
    from polarjax.evaluation.report.page import make_report

    page = make_report([path], tmp_path / "page").read_text(encoding="utf-8")
    assert "Polar balanced 4" in page


def assert_near(one, other, path=""):
    """Equal but for the rounding of float32 sums."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_near(value, other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_near(*pair, f"{path}.{i}")
    elif isinstance(one, float):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5, err_msg=path)
    else:
        assert one == other, path


@pytest.mark.slow
def test_budgets_are_searched_over_a_mesh():
    params, items = make("gqa"), {"text": make_items(MODELS["gqa"])}
    cut = shard(params, make_mesh(2, 2))
    one, many = (
        search_budgets(x, items, Search(0.5, batch=3, context=64))
        for x in (params, cut)
    )
    assert [step.budgets for step in one] == [step.budgets for step in many]


@pytest.mark.slow
def test_kernels_score_on_each_device():
    params = make("opt")
    items = make_items(params.config, families=2, choices=2, longest=6)
    options = {"batch": 4, "implementation": "triton_interpret"}
    policies = {"Polar": Polar(0.5, 0.4)}
    cut = shard(params, make_mesh(2, 2))
    one = perplexity(params, items, policies, batch=4)["Polar"]
    many = perplexity(cut, items, policies, **options)["Polar"]
    np.testing.assert_allclose(one.nll, many.nll, rtol=1e-5)


def test_a_selection_balanced_over_other_devices_is_refused():
    cut = shard(make("opt"), make_mesh(4))
    with pytest.raises(ValueError, match="over 2 devices, but the model is cut over 4"):
        Scorer(cut, {"Balanced": Polar(0.5, balanced=2)})
