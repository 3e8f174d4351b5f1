import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from pallas_kernels import tables
from pallas_kernels.mlp import configs as mlp_configs
from pallas_kernels.tuning import problems, search, timing, tune


@dataclasses.dataclass(frozen=True)
class Config:
    block: int
    num_warps: int
    fused: bool = False
    programs: int = 0


DEFAULT = Config(64, 4)
SHAPE = tables.product_shape(axis=1, b=64, n=6144, m=4096, itemsize=2)


def entry(**config):
    config = dataclasses.asdict(DEFAULT) | config
    return {"shape": SHAPE, "config": config, "us": 1.0, "heuristic_us": 2.0}


def text(**sections):
    return json.dumps({"device": "X 1", "jax": "0.11.2", **sections})


def test_an_entry_serves_its_bucket_and_nothing_else():
    measured = tables.parse(text(product=[entry(block=32)]), "x.json")
    found = tables.lookup(measured, "product", SHAPE, DEFAULT)
    assert found == Config(32, 4)
    for other in (SHAPE | {"m": 64}, SHAPE | {"n": 8192}):
        assert tables.lookup(measured, "product", other, DEFAULT) is DEFAULT
    assert tables.lookup(measured, "mlp", SHAPE, DEFAULT) is DEFAULT
    assert tables.lookup(None, "product", SHAPE, DEFAULT) is DEFAULT


def test_buckets():
    facts = {"axis": 1, "m": 4096, "itemsize": 2}
    assert SHAPE == {"itemsize": 2, "axis": 1, "b": 64, "m": 4096, "n": 6144}
    # Outputs down to a multiple of 128.
    assert tables.product_shape(b=33, n=6271, **facts) == SHAPE
    assert tables.product_shape(b=33, n=6272, **facts)["n"] == 6272
    # The batch up to the next one; the neurons as they are.
    shape = tables.mlp_shape(b=65, n=11059, m=9216, gated=False, itemsize=2)
    assert shape == {"itemsize": 2, "gated": 0, "b": 128, "m": 9216, "n": 11059}
    assert [tables.ceil_power_of_two(x) for x in (1, 2, 3, 64, 65)] == [
        1,
        2,
        4,
        64,
        128,
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"blok": 3}, r"x\.json: the product entry for .*'n': 6144.* unknown \['blok"),
        ({"block": 64.0}, "block = 64.0; it must be a int"),
        ({"block": True}, "block = True; it must be a int"),
        ({"fused": 1}, "fused = 1; it must be a bool"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    measured = tables.parse(text(product=[entry(**config)]), "x.json")
    with pytest.raises(ValueError, match=message):
        tables.lookup(measured, "product", SHAPE, DEFAULT)
    short = entry()
    del short["config"]["block"]
    measured = tables.parse(text(product=[short]), "x.json")
    with pytest.raises(ValueError, match=r"missing \['block'\]"):
        tables.lookup(measured, "product", SHAPE, DEFAULT)


DENSE = {"shape": tables.dense_shape(b=1, m=8, f=32, gated=True, itemsize=2)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"x\.json is not JSON"),
        ("[]", r"x\.json must be an object with the texts \['device', 'jax'\]"),
        ('{"device": "X"}', "must be an object with the texts"),
        (text(prodduct=[]), r"unknown sections \['prodduct'\]"),
        (text(mlp={}), "mlp must be a list"),
        (text(product=[3]), r"entry 0 of product must be an object with"),
        (text(product=[entry() | {"more": 1}]), "entry 0 of product must be"),
        (text(product=[entry(), entry()]), "entry 1 of product repeats the shape"),
        (text(product=[entry() | {"us": "1"}]), "us = '1'; it must be a float"),
        (text(mlp=[entry()]), r"entry 0 of mlp must have a shape of \['itemsize', 'ga"),
        (text(product=[entry() | {"shape": SHAPE | {"n": 0.5}}]), "n = 0.5; it must"),
        (text(mlp_dense_above=[DENSE | {"fraction": 1.5}]), "fraction = 1.5, not in"),
        (text(mlp_dense_above=[DENSE]), "entry 0 of mlp_dense_above must be"),
    ],
)
def test_a_damaged_table_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        tables.parse(bad, "x.json")


def test_what_the_kernels_ask(monkeypatch):
    facts = dict(axis=1, b=64, n=6144, m=4096, itemsize=2)
    layer = dict(b=2, m=8, gated=True, itemsize=2)
    measured = tables.parse(
        text(
            product=[entry(block=16)],
            mlp=[entry() | {"shape": tables.mlp_shape(n=16, **layer)}],
            mlp_dense_above=[
                {"shape": tables.dense_shape(f=32, **layer), "fraction": 0.6}
            ],
        ),
        "x.json",
    )
    monkeypatch.setattr(tables, "shipped", lambda kind: measured)
    assert tables.product_config(DEFAULT, **facts).block == 16
    assert tables.mlp_config(Config(1, 1), n=16, **layer) == DEFAULT
    assert tables.mlp_dense_above(f=32, **layer) == 0.6
    assert tables.mlp_dense_above(f=64, **layer) is None


def test_without_a_gpu_or_a_table_the_heuristic_serves():
    assert tables.shipped(None) is None
    assert tables.shipped("No Such GPU") is None
    assert tables.file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"
    facts = dict(axis=1, b=64, n=6144, m=4096, itemsize=2)
    if jax.default_backend() != "gpu":
        assert tables.device_kind() is None
        assert tables.product_config(DEFAULT, **facts) is DEFAULT
        assert tables.mlp_dense_above(b=1, m=8, f=32, gated=0, itemsize=2) is None


def test_a_trace_for_another_device_asks_too(lower_for_cuda):
    def function(x):
        config = tables.mlp_config(
            DEFAULT, b=x.shape[0], n=4, m=8, gated=False, itemsize=2
        )
        return jax.numpy.zeros(config.block) + x[0]

    x = jax.ShapeDtypeStruct((2,), "float32")
    assert "tensor<64xf32>" in lower_for_cuda(function, x)


def shipped_tables():
    return sorted(Path(tables.__file__).parent.glob("*.json"))


@pytest.mark.parametrize("path", shipped_tables(), ids=lambda path: path.name)
def test_shipped_tables_fit_the_kernels(path):
    measured = tables.parse(path.read_text(encoding="utf-8"), path.name)
    assert tables.file_name(measured.device) == path.name
    for each in measured.sections.get("product", ()):
        problem = problems.Product(**_dtype(dict(each["shape"])))
        assert problem.shape == each["shape"]
        tables.lookup(measured, "product", problem.shape, problem.default)
    for each in measured.sections.get("mlp", ()):
        problem = problems.Mlp(f=each["shape"]["n"], **_dtype(dict(each["shape"])))
        assert problem.shape == each["shape"]
        tables.lookup(measured, "mlp", problem.shape, problem.default)


def _dtype(call):
    return call | {"dtype": {2: "bfloat16", 4: "float32"}[call.pop("itemsize")]}


def test_variations():
    found = search.variations(Config(block=64, num_warps=4, programs=0))
    assert {(c.block, c.num_warps, c.fused, c.programs) for c in found} == {
        (32, 4, False, 0),
        (128, 4, False, 0),
        (64, 2, False, 0),
        (64, 8, False, 0),
        (64, 4, True, 0),
    }
    stages = dataclasses.make_dataclass("C", [("stages", int)], frozen=True)
    assert [c.stages for c in search.variations(stages(3))] == [1, 2, 4, 6]


@dataclasses.dataclass(frozen=True)
class Slope:
    """A problem whose time is the distance to block 512; some configs misbehave."""

    dtype = "float32"
    default = DEFAULT

    def candidates(self):
        return [Config(128, 4)]

    def inputs(self, most):
        return jax.numpy.ones(()), [()] * min(most, 2)

    def function(self, config):
        del config
        return lambda value: value

    def __hash__(self):
        return 0


@pytest.fixture
def fake_times(monkeypatch):
    """Chains that are their configs, with made-up milliseconds."""

    class Problem(Slope):
        def function(self, config, interpret=False):
            def call(value):
                # Wrong results of one config that would be the fastest.
                return value * (2.0 if config and config.num_warps == 1 else 1.0)

            call.config = config
            return call

    def median_ms(config, **_):
        if config.num_warps == 8:
            raise RuntimeError("out of shared memory\nand more")
        return abs(config.block - 512) + 10.0 * config.num_warps

    monkeypatch.setattr(search, "make_chain", lambda call, *_: call.config)
    monkeypatch.setattr(search, "median_ms", median_ms)
    return Problem()


def test_search_walks_to_the_best_right_config(fake_times):
    states = []
    with ThreadPoolExecutor(2) as pool:
        outcome = search.search(fake_times, pool, seconds=60, show=states.append)
        assert outcome.config is not None
        assert (outcome.config.block, outcome.config.num_warps) == (512, 2)
        assert outcome.heuristic_us > outcome.us > 0
        state = outcome.search
        assert {c.num_warps for c in state.wrong} == {1}
        assert {c.num_warps for c in state.failed} == {8}
        assert set(state.failed.values()) == {"out of shared memory"}
        assert state.tried == state.known == len(states) > 6
        # Without time, the first one is all there is.
        outcome = search.search(fake_times, pool, seconds=0)
        assert outcome.config is None and outcome.search.tried == 1


def test_search_refuses_a_heuristic_that_fails(fake_times, monkeypatch):
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(type(fake_times), "default", Config(64, 8))
        with pytest.raises(RuntimeError, match="out of shared memory"):
            search.search(fake_times, pool, seconds=0)
        monkeypatch.setattr(type(fake_times), "default", Config(64, 1))
        with pytest.raises(ValueError, match="is wrong"):
            search.search(fake_times, pool, seconds=0)


@pytest.mark.parametrize(
    ("dense_ms", "above"), [(5.0, 0.5), (2.0, 0.2), (0.5, 0.0), (20.0, 1.0)]
)
def test_dense_above_is_where_the_times_cross(monkeypatch, dense_ms, above):
    def make_chain(call, start, arguments):
        [some] = arguments[:1]
        return 100 if len(some) == 1 else some[1].shape[0]  # neurons read

    def median_ms(neurons):
        return dense_ms if neurons == 100 else neurons / 10

    monkeypatch.setattr(search, "make_chain", make_chain)
    monkeypatch.setattr(search, "median_ms", median_ms)
    layer = problems.Mlp(b=1, m=8, f=100, n=1)
    with ThreadPoolExecutor(1) as pool:
        found = search.dense_above(layer, pool, lambda layer: None, interpret=True)
    assert found == pytest.approx(above)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("conv:b=1", "must begin with one of"),
        ("mlp", "'' is not a name = a whole number"),
        ("mlp:b=1,m=8,f=8", r"\['n'\] missing or unknown; mlp takes b, m, f, n, gated"),
        ("mlp:b=1,m=8,f=8,n=4,q=1", r"\['q'\] missing or unknown"),
        ("mlp:b=1,m=8,f=8,n=-4", "'n=-4' is not a name = a whole number"),
    ],
)
def test_bad_words_for_a_shape(words, message):
    with pytest.raises(ValueError, match=message):
        problems.parse(words)
    assert problems.parse("mlp:b=1,m=8,f=16,n=0x4".replace("0x4", "4,gated=1")) == (
        problems.Mlp(1, 8, 16, 4, 1)
    )


def test_calls_and_sets_are_enough_and_not_too_many():
    assert timing.sets_to_rotate(2**30) == 1
    assert timing.sets_to_rotate(2**28) == 2
    assert timing.sets_to_rotate(1) == timing.calls_to_time(1) == 32
    assert timing.calls_to_time(2**40) == 4


def test_median_ms_chains_its_calls():
    chain = timing.make_chain(lambda x, y: x + y, 1, [(2,), (3,)])
    assert chain.program(chain.start, chain.arguments) == 6
    assert timing.median_ms(chain, repeats=1) > 0


def test_the_command_needs_a_gpu(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("needs a machine without a GPU: JAX_PLATFORMS=cpu")
    assert tune.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: tuning needs a GPU") and error.count("\n") == 1


def test_the_command_writes_a_table(tmp_path, capsys):
    """Interpreted, where there is no GPU; other entries of the table stay."""
    out = tmp_path / "tables" / "toy.json"
    out.parent.mkdir()
    other = SHAPE | {"m": 256}
    kind = jax.devices()[0].device_kind
    before = {"device": kind, "jax": "0.1", "product": [entry() | {"shape": other}]}
    out.write_text(json.dumps(before))
    words = "product:b=1,m=16,n=16,dtype=float32"
    command = ["--toy", "--seconds", "0", "--shapes", words, "--out", str(out)]
    assert tune.main(command) == 0
    after = tables.parse(out.read_text(), str(out))
    assert after.entry("product", other) is not None
    assert after.jax == jax.__version__ and after.device == kind
    assert [path.name for path in out.parent.iterdir()] == ["toy.json"]
    shown = capsys.readouterr().out
    assert "1 configs, 0 do not run; kept" in " ".join(shown.split())
    out.write_text(text())
    assert tune.main(command) == 1
    assert "is the table of X 1, not of" in capsys.readouterr().err


def test_a_winner_replaces_an_old_entry_and_a_loser_takes_it_out():
    problem = problems.parse("product:b=64,m=4096,n=6144")
    record = {"device": "X 1", "jax": "0", "product": [entry()]}
    outcome = search.Outcome(Config(16, 2), 1.0, 2.0, search.Search())
    tune._enter(record, problem, outcome)
    measured = tables.parse(json.dumps(record), "x")
    assert tables.lookup(measured, "product", SHAPE, DEFAULT) == Config(16, 2)
    tune._enter(record, problem, dataclasses.replace(outcome, config=None))
    assert record["product"] == []


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and "product:b=8,m=2048" in shown


def test_a_product_is_served_by_its_bucket(monkeypatch):
    entry = {
        "shape": {"itemsize": 2, "axis": 1, "b": 64, "m": 4096, "n": 6144},
        "config": {
            **dataclasses.asdict(problems.Product(64, 4096, 6144).default),
            "up_stages": 3,
        },
        "us": 1.0,
        "heuristic_us": 2.0,
    }
    text = json.dumps({"device": "some GPU", "jax": "1", "product": [entry]})
    monkeypatch.setattr(tables, "shipped", lambda kind: tables.parse(text, "here"))

    def stages(**facts):
        default = mlp_configs.product_config(**facts)
        return tables.product_config(default, **facts).up_stages

    shape = {"axis": 1, "b": 48, "n": 6152, "m": 4096, "itemsize": 2}
    assert stages(**shape) == 3  # a router's rows, and a batch below the next power
    for other in ({"b": 65}, {"n": 6272}, {"m": 2048}, {"itemsize": 4}):
        facts = {**shape, **other}
        assert stages(**facts) == mlp_configs.product_config(**facts).up_stages
