"""Adapters: saved and loaded whole, and refused where they do not belong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import polarjax
from polarjax.params import write_folder
from polarjax.policies import adapter as adapter_module
from polarjax.policies import load_adapter, read_card, save_adapter, with_learned
from polarjax.policy import Learned
from tests.convert.damage import limits
from tests.models import LLAMA, OPT, random_params
from tests.seal import seal
from tests.storage.test_files import KINDS, replace

CONFIG = dataclasses.replace(LLAMA, layers=3, model_hash="0123456789abcdef" * 4)
BUDGETS = (4, 2, 2)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, routers=True, budgets=BUDGETS)


@pytest.fixture
def bare(params):
    """The same model without its adapter."""
    return polarjax.Params(params.weights, polarjax.Dense(), CONFIG)


@pytest.fixture
def saved(params, tmp_path):
    save_adapter(tmp_path / "adapter", params, {"data": "a novel", "recall": [0.9]})
    return tmp_path / "adapter"


def edit_card(folder, **changes):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **changes}))
    seal(folder)


def edit_tensors(folder, edit):
    tensors = load_file(folder / "routers.safetensors")
    save_file(edit(tensors), folder / "routers.safetensors")
    seal(folder)


def numbers(params):
    """What the adapter says beside its arrays."""
    return params.policy.learned.numbers()


def assert_equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_round_trip(params, bare, saved):
    assert sorted(p.name for p in saved.parent.iterdir()) == ["adapter"]
    card = read_card(saved)
    assert card["data"] == "a novel" and card["recall"] == [0.9]
    assert card["model_hash"] == CONFIG.model_hash
    loaded = load_adapter(bare, saved)
    assert loaded.config == params.config and numbers(loaded) == numbers(params)
    assert loaded.weights is bare.weights and not bare.routers
    assert_equal_trees(loaded.routers, params.routers)


NEURONS = dataclasses.replace(OPT, layers=3, model_hash="fedcba9876543210" * 4)
NEURON_BUDGETS = ((1, (80, 20, 30)), (8, (80, 40, 80)))


def with_neurons(**options):
    """A model whose adapter has budgets of heads and neurons."""
    return random_params(
        NEURONS,
        0,
        routers=True,
        budgets=(6, 3, 6),
        neuron_budgets=NEURON_BUDGETS,
        **options,
    )


@pytest.fixture
def saved_neurons(tmp_path):
    """An adapter with neuron routers and budgets, and the model it belongs to."""
    params = with_neurons(neuron_rank=8, head_rank=5)
    save_adapter(tmp_path / "adapter", params)
    bare = polarjax.Params(params.weights, polarjax.Dense(), NEURONS)
    return tmp_path / "adapter", params, bare


def test_round_trip_of_neuron_routers(saved_neurons):
    folder, params, bare = saved_neurons
    loaded = load_adapter(bare, folder)
    assert loaded.config == NEURONS and numbers(loaded) == numbers(params)
    for name, router in params.routers.items():
        ours = loaded.routers[name]
        linear = {"weight", "bias"}
        for kind, parts in router.items():
            assert set(ours[kind]) == set(parts)
            for part, array in parts.items():
                dtype = jnp.float32 if part in linear else jnp.bfloat16
                assert ours[kind][part].dtype == dtype
                np.testing.assert_array_equal(ours[kind][part], array.astype(dtype))
    # Its own text is what the model with the same rounded routers writes.
    rounded = with_learned(params, routers=loaded.routers)
    prompts = [[1, 2, 3], [7]]
    ours, theirs = (
        polarjax.generate(x, prompts, max_new_tokens=9) for x in (loaded, rounded)
    )
    assert ours.tokens == theirs.tokens
    # Between two measured batch sizes: rounded up to 128, of which there are 80.
    assert ours.stats.neuron_density == (1.0, 1.0, 1.0)
    single = polarjax.generate(loaded, [[1, 2, 3]], max_new_tokens=9)
    assert single.stats.neuron_density == (1.0, 0.25, 0.375)


def test_a_checkpoint_keeps_them(saved_neurons, tmp_path):
    folder, _, bare = saved_neurons
    loaded = load_adapter(bare, folder)
    polarjax.save(loaded, tmp_path / "model")
    again = polarjax.load(tmp_path / "model")
    assert again.policy.learned.neuron_budgets == NEURON_BUDGETS
    assert numbers(again) == numbers(loaded)
    assert_equal_trees(again.routers, loaded.routers)


def test_an_older_adapter_has_no_neuron_budgets(saved_neurons):
    folder, params, bare = saved_neurons
    card = json.loads((folder / "card.json").read_text())
    del card["neuron_budgets"]
    (folder / "card.json").write_text(json.dumps(card))
    for name in ("checksums.json", "fingerprint.safetensors"):
        (folder / name).unlink()
    tensors = load_file(folder / "routers.safetensors")
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(tensors, folder / "routers.safetensors")
    loaded = load_adapter(bare, folder)
    assert loaded.policy.learned.neuron_budgets == ()
    assert {x.dtype for x in jax.tree.leaves(loaded.routers)} == {jnp.dtype("float32")}
    # An adapter's budgets replace those of the one before.
    assert params.policy.learned.neuron_budgets
    assert load_adapter(params, folder).policy.learned.neuron_budgets == ()


@pytest.mark.parametrize(
    "budgets",
    [
        5,
        None,
        "12",
        {"1": [80, 20, 30]},
        [1, 2],
        [[1]],
        [[1, 80]],
        [[1, 2, 3]],
        [[1, [80, 20]]],
        [[1, [80, 20, 81]]],
        [[1, [80, 20, 0]]],
        [[1, [40, 20, 20]]],
        [[1, [80, 20.0, 20]]],
        [[1, [80, True, 20]]],
        [[8, [80, 20, 20]], [1, [80, 20, 20]]],
        [[1.0, [80, 20, 20]]],
        [[None, [80, 20, 20]]],
        [[[1], [80, 20, 20]]],
        [[1, [80, [20], 20]]],
    ],
)
def test_neuron_budgets_that_do_not_fit_are_refused(saved_neurons, budgets):
    folder, _, bare = saved_neurons
    edit_card(folder, neuron_budgets=budgets)
    with pytest.raises(ValueError, match=r"neuron budgets|no adapter card"):
        load_adapter(bare, folder)


def test_neuron_budgets_without_routers_are_refused(saved_neurons, tmp_path):
    folder, _, bare = saved_neurons
    edit_tensors(
        folder,
        lambda ts: {n: t for n, t in ts.items() if not n.startswith("layers_2/neu")},
    )
    with pytest.raises(ValueError, match="no neuron router for layer 2"):
        load_adapter(bare, folder)
    # Nor are they saved so.
    lacking = with_neurons()
    with pytest.raises(ValueError, match="no neuron router for layer 1"):
        save_adapter(tmp_path / "other", lacking)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_neuron_routers_that_are_not_finite_are_refused(saved_neurons, poison):
    folder, _, bare = saved_neurons

    def edit(tensors):
        tensors["layers_2/neurons/up"][3, 1] = poison
        return tensors

    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match="layers_2/neurons/up holds NaN or inf"):
        load_adapter(bare, folder)


def test_adapters_serve_a_model_of_another_dtype(bare, saved):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), bare)
    loaded = load_adapter(low, saved)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.routers)} == {
        jnp.dtype("float32")
    }
    weights, bound = polarjax.Polar().bind(loaded)
    qkv = weights["layers_1"]["attention"]["qkv"]
    assert qkv.dtype == jnp.bfloat16 and bound.wants.scores == (0, 4, 4)
    rows = np.asarray(loaded.routers["layers_1"]["heads"]["weight"], jnp.bfloat16)
    np.testing.assert_array_equal(qkv[-4:], rows)


def test_load_takes_an_adapter(params, bare, saved, tmp_path):
    write_folder(tmp_path / "model", bare.config, bare.weights)
    loaded = polarjax.load(tmp_path / "model", adapter=saved)
    assert loaded.policy.learned.budgets == BUDGETS
    assert_equal_trees(loaded.routers, params.routers)
    prompts = [[1, 2, 3], [7], [8, 9], [5]]
    ours = polarjax.generate(loaded, prompts, max_new_tokens=18)
    theirs = polarjax.generate(params, prompts, max_new_tokens=18)
    assert ours.tokens == theirs.tokens and ours.stats.policy == "Polar"


def test_an_adapter_of_another_model_is_refused(bare, saved):
    config = dataclasses.replace(bare.config, model_hash="f" * 64)
    other = dataclasses.replace(random_params(CONFIG, 1), config=config)
    with pytest.raises(ValueError, match=r"made for another model .hash 0123456789ab"):
        load_adapter(other, saved)
    edit_card(saved, model_hash=None)
    with pytest.raises(ValueError, match=r"card: model_hash must be text, got None"):
        load_adapter(bare, saved)


def transposed(tensors):
    name = "layers_1/heads/weight"
    return {**tensors, name: np.ascontiguousarray(tensors[name].T)}


def per_query_head(tensors):
    # What the paper's public code trains for GQA: one score per query head.
    wide = {
        "weight": np.zeros((CONFIG.heads, CONFIG.dim), np.float32),
        "bias": np.zeros(CONFIG.heads, np.float32),
    }
    return {name: wide[name.rsplit("/")[-1]] for name in tensors}


def without(part):
    return lambda tensors: {n: t for n, t in tensors.items() if part not in n}


def plus(name, *shape):
    return lambda tensors: {**tensors, name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (transposed, r"router layers_1 has shapes .*48, 4.*needs .*4, 48"),
        (per_query_head, r"router layers_1 has shapes .*8, 48.*needs .*4, 48"),
        (without("bias"), "router layers_1 has shapes"),
        (without("layers_2"), "no router for layer 2"),
        (without("layers"), "no router for layer 1"),
        (plus("layers_3/heads/weight", 4, 48), "router layers_3: the model has"),
        (plus("layers_0/heads/weight", 4, 48), "router layers_0"),
        (plus("layers_01/heads/weight", 4, 48), "router layers_01: the model has"),
        (plus("something", 3), "router something: the model has"),
        (plus("layers_1/neurons", 3), "router layers_1 has shapes"),
        (plus("layers_1/neurons/down"), "router layers_1 has shapes"),
        (plus("layers_1/neurons/down", 8, 48), "router layers_1 has shapes"),
        (plus("layers_1/heads/down", 8, 48), r"has shapes .*needs .*'up': \(4, 8\)"),
        (plus("layers_1/heads/down", 8), "needs .*'rank', 48"),
        (plus("layers_1/heads/up", 4, 8), "needs .*'rank', 48"),
        (plus("layers_1/heads", 3), "routers.safetensors is damaged"),
    ],
)
def test_routers_that_do_not_fit_are_refused(bare, saved, edit, message):
    edit_tensors(saved, edit)
    with pytest.raises(ValueError, match=message):
        load_adapter(bare, saved)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_routers_that_are_not_finite_are_refused(bare, saved, poison):
    def edit(tensors):
        tensors["layers_2/heads/bias"][1] = poison
        return tensors

    edit_tensors(saved, edit)
    with pytest.raises(ValueError, match="layers_2/heads/bias holds NaN or inf"):
        load_adapter(bare, saved)


@pytest.mark.parametrize(
    "budgets",
    [
        None,
        5,
        "422",
        [],
        {},
        [4, 2],
        [4, 2, 3, 3],
        [4, 2, 5],
        [4, 0, 3],
        [4, True, 3],
        [4, 2.5, 3],
        [4, [2], 3],
        [2, 2, 3],
    ],
)
def test_budgets_that_do_not_fit_are_refused(bare, saved, budgets):
    edit_card(saved, budgets=budgets)
    with pytest.raises(ValueError, match=r"budgets|no adapter card"):
        load_adapter(bare, saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"budgets": []}', "\0"])
def test_a_garbled_card_is_refused(bare, saved, text):
    (saved / "card.json").write_text(text)
    with pytest.raises(ValueError, match=r"card\.json is no adapter card"):
        load_adapter(bare, saved)
    (saved / "card.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"card\.json is no adapter card"):
        load_adapter(bare, saved)


def test_a_card_of_another_format_is_refused(bare, saved):
    edit_card(saved, format_version=2)
    with pytest.raises(ValueError, match=r"adapter format 2, .* reads 1"):
        load_adapter(bare, saved)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_routers_are_refused(bare, saved, keep):
    file = saved / "routers.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"routers\.safetensors is not what was wri"):
        load_adapter(bare, saved)
    seal(saved)
    with pytest.raises(ValueError, match=r"routers\.safetensors is damaged"):
        load_adapter(bare, saved)


def test_garbled_headers_are_refused(bare, saved):
    file = saved / "routers.safetensors"
    data, rng = file.read_bytes(), np.random.default_rng(0)
    header = int.from_bytes(data[:8], "little")
    accepted = 0
    for _ in range(60):
        bad = bytearray(data)
        bad[rng.integers(8 + header)] ^= 1 << rng.integers(8)
        file.write_bytes(bad)
        seal(saved)
        try:
            loaded = load_adapter(bare, saved)
        except ValueError:
            continue
        # A flip that leaves a valid file, such as in its padding, changes nothing.
        accepted += 1
        assert jax.tree.structure(loaded.routers).num_leaves == 4
    assert accepted < 30


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int32", "float16", "float64", "complex64"]
)
def test_routers_of_other_dtypes_are_refused(bare, saved, dtype):
    """1e300 would become infinity, and a flag a weight."""

    def edit(tensors):
        name = "layers_2/heads/weight"
        return {**tensors, name: tensors[name].astype(dtype)}

    edit_tensors(saved, edit)
    match = f"layers_2/heads/weight is {dtype}, but must be one of float32, bfloat16"
    with pytest.raises(ValueError, match=match):
        load_adapter(bare, saved)


def test_a_checkpoint_s_routers_are_held_to_it_too(bare, params, tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.float16), params.routers)
    learned = Learned(half, BUDGETS)
    write_folder(tmp_path / "model", CONFIG, bare.weights, learned)
    with pytest.raises(ValueError, match="router layers_1/heads/bias is float16, but"):
        polarjax.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["layers_1/heads/weight", "layers_2/heads/bias"])
def test_tensors_without_a_rank_are_refused(bare, saved, name):
    edit_tensors(saved, plus(name))
    with pytest.raises(ValueError, match=r"router layers_[12] has shapes"):
        load_adapter(bare, saved)


@pytest.mark.parametrize("rank", [0, 1025])
def test_ranks_that_nobody_has_are_refused(bare, saved, rank):
    edit_tensors(saved, plus("layers_1/heads/up", 4, rank))
    edit_tensors(saved, plus("layers_1/heads/down", rank, 48))
    match = f"router layers_1/heads has rank {rank}: it must be between 1 and 1024"
    with pytest.raises(ValueError, match=match):
        load_adapter(bare, saved)


@pytest.mark.parametrize(
    "name", ["card.json", "routers.safetensors", "fingerprint.safetensors"]
)
def test_a_flipped_bit_is_found(bare, saved, name):
    whole = (saved / name).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (saved / name).write_bytes(flipped)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load_adapter(bare, saved)
    (saved / name).write_bytes(whole)
    load_adapter(bare, saved)


@pytest.mark.parametrize(
    "sums", [{}, {"routers.safetensors": 1, "x": "y"}, {"card.json": "0"}]
)
def test_checksums_of_other_files_are_refused(bare, saved, sums):
    (saved / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match=r"checksums\.json names|card\.json is not"):
        load_adapter(bare, saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptive": "yes"}, "adaptive must be true or false, got 'yes'"),
        ({"thresholds": ["0", "1", "2"]}, r"thresholds\[0\] must be a number, got '0'"),
        ({"thresholds": [0, 10**400, 0]}, r"thresholds\[1\] must be between"),
        ({"thresholds": [0, float("nan"), 0]}, r"thresholds\[1\] must be between"),
        ({"treshold": [0]}, "unknown key 'treshold': did you mean 'thresholds'"),
        ({"anything": 1}, "unknown key 'anything'"),
        ({"format_version": "1"}, "adapter format '1'"),
        ({"kv_heads": 0}, "kv_heads must be a positive integer"),
        ({"contract": []}, "contract must be a record"),
        ({"tokens": "many"}, "tokens must be an integer"),
    ],
)
def test_a_card_is_judged_field_by_field(bare, saved, changes, message):
    edit_card(saved, **changes)
    for read in (read_card, lambda folder: load_adapter(bare, folder)):
        with pytest.raises(
            ValueError, match=r"card\.json is no adapter card: .*" + message
        ):
            read(saved)


def test_a_card_too_deep_or_with_a_key_twice(bare, saved):
    whole = (saved / "card.json").read_text()
    for text in ("[" * 100_000, '{"a":' * 100_000, whole[:-2] + ', "data": 1}'):
        (saved / "card.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"card\.json is no adapter card"
        ) as caught:
            load_adapter(bare, saved)
        assert "\n" not in str(caught.value)


def test_a_card_says_nothing_unknown(params, tmp_path):
    with pytest.raises(ValueError, match="unknown key 'quailty': did you mean"):
        save_adapter(tmp_path / "a", params, {"quailty": {}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["card.json", "checksums.json", "routers.safetensors", "fingerprint.safetensors"],
)
def test_what_is_no_file_is_refused(bare, saved, name, kind):
    replace(saved / name, kind)
    with limits(), pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_adapter(bare, saved)


def test_an_adapter_in_the_hub_s_cache_is_links(params, bare, saved, tmp_path):
    (tmp_path / "links").mkdir()
    for path in saved.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    loaded = load_adapter(bare, tmp_path / "links")
    assert loaded.config == params.config and numbers(loaded) == numbers(params)


@pytest.mark.parametrize("name", ["card.json", "routers.safetensors"])
def test_a_missing_file_is_named(bare, saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*should hold"):
        load_adapter(bare, saved)


def test_a_name_that_the_package_does_not_ship_is_refused(bare, tmp_path):
    write_folder(tmp_path / "model", bare.config, bare.weights)
    with pytest.raises(FileNotFoundError, match="no adapter at nonesuch, and the pack"):
        polarjax.load(tmp_path / "model", adapter="nonesuch")


def test_an_interrupted_save_leaves_nothing(params, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_module, "write_checksums", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(tmp_path / "adapter", params)
    assert not list(tmp_path.iterdir())


def test_saving_over_an_adapter_must_be_asked_for(params, saved):
    before = (saved / "card.json").read_text()
    with pytest.raises(FileExistsError, match="overwrite"):
        save_adapter(saved, params, {"data": "another"})
    assert (saved / "card.json").read_text() == before
    save_adapter(saved, params, {"data": "another"}, overwrite=True)
    assert read_card(saved)["data"] == "another"


def test_routers_that_could_not_be_loaded_are_not_saved(params, bare, tmp_path):
    for wrong in (
        bare,
        with_learned(params, routers={}),
        with_learned(params, budgets=()),
        with_learned(params, budgets=(1, 2, 3)),
    ):
        with pytest.raises(ValueError, match="the adapter has"):
            save_adapter(tmp_path / "adapter", wrong)
    assert not list(tmp_path.iterdir())


def test_lists_of_numbers_make_the_same_policy():
    lists = Learned(budgets=[4, 2], neuron_budgets=[[1, [8, 9]]], thresholds=[0.5])
    tuples = Learned({}, (4, 2), False, ((1, (8, 9)),), (0.5,))
    where = [
        jax.tree.structure(polarjax.Polar(learned=each)) for each in (lists, tuples)
    ]
    assert where[0] == where[1] and hash(where[0]) == hash(where[1])
