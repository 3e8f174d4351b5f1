"""One validation of config.json and of adapters' cards, by their annotations."""

import dataclasses
import json
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import polarjax
from polarjax.config import LARGEST
from polarjax.policies.card import card_text
from polarjax.policy import Learned
from polarjax.storage.checked import (
    LATER,
    UNSTORED,
    Between,
    check_record,
    read_record,
)
from tests.models import LLAMA, OPT


@dataclasses.dataclass(frozen=True)
class Inner:
    """A record in a record."""

    size: Annotated[int, Between(1, 9)]
    flag: bool = False


@dataclasses.dataclass(frozen=True)
class Outer:
    """One field of each kind."""

    word: Annotated[str, Between(0, 3)]
    kind: Literal["a", "b"]
    number: float
    pairs: tuple[tuple[int, tuple[bool, ...]], ...] = ()
    inner: Inner | None = None
    anything: Any = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    newer: Annotated[int, LATER] = 7
    here: Annotated[str, UNSTORED] = ""


WHOLE = {
    "word": "abc",
    "kind": "b",
    "number": 3,
    "pairs": [[1, [True, False]], [2, []]],
    "inner": {"size": 9, "flag": True},
    "anything": [{}],
    "record": {"x": 1},
}


def test_lists_become_tuples_and_objects_dataclasses():
    found = read_record(Outer, WHOLE)
    pairs = ((1, (True, False)), (2, ()))
    assert found == Outer("abc", "b", 3, pairs, Inner(9, True), [{}], {"x": 1})
    assert read_record(Outer, {**WHOLE, "inner": None, "newer": 8}).newer == 8
    few = {"word": "", "kind": "a", "number": -1.5}
    assert read_record(Outer, few, partial=True) == Outer("", "a", -1.5)
    check_record(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"word": 1}, "word must be text, got 1"),
        ({"word": "abcd"}, "word must be text of 0 to 3 characters, got 'abcd'"),
        ({"kind": "c"}, "kind must be one of 'a', 'b', got 'c'"),
        ({"kind": []}, "kind must be one of"),
        ({"number": True}, "number must be a number, got True"),
        ({"number": "1"}, "number must be a number, got '1'"),
        ({"number": float("nan")}, "number must be finite, got nan"),
        ({"number": 10**400}, r"number must be finite, got 1000.*\.\.\."),
        ({"number": None}, "number must be a number, got None"),
        ({"pairs": 5}, r"pairs must be a list \(in Python a tuple\), got 5"),
        ({"pairs": [[1]]}, r"pairs\[0\] must be a list of 2 .*, got \[1\]"),
        (
            {"pairs": [[1, []], [2.0, []]]},
            r"pairs\[1\]\[0\] must be an integer",
        ),
        ({"pairs": [[1, [1]]]}, r"pairs\[0\]\[1\]\[0\] must be true or false, got 1"),
        ({"inner": []}, r"inner must be a record or null, got \[\]"),
        ({"inner": {"size": 0, "flag": True}}, "inner: size must be a positive int"),
        ({"inner": {"size": 10, "flag": True}}, "inner: size must be between 1 and 9"),
        ({"inner": {"size": 1}}, "inner: it has no flag"),
        ({"inner": {"size": 1, "flag": 0}}, "inner: flag must be true or false, got 0"),
        ({"record": []}, "record must be a record"),
        ({"numbre": 1}, "unknown key 'numbre': did you mean 'number'"),
        ({"x" * 200: 1}, "unknown key 'xxx.*\\.\\.\\..*xxx'$"),
        ({"here": "there"}, "unknown key 'here'"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read_record(Outer, {**WHOLE, **changes})


def test_what_is_missing_is_named():
    for name in ("word", "pairs", "inner"):
        rest = {key: value for key, value in WHOLE.items() if key != name}
        with pytest.raises(ValueError, match=f"it has no {name}"):
            read_record(Outer, rest)
    with pytest.raises(ValueError, match="it has no word"):
        read_record(Outer, {}, partial=True)


ROPE = dataclasses.asdict(polarjax.Rope(1e4))


def read_description(text):
    """What a checkpoint's config.json says, of the model and of its policy."""
    return polarjax.ModelConfig.from_json(text), Learned.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: value}, f"{name} must be")
            for name in (
                *("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim"),
                *("neurons", "context", "embed_dim"),
            )
            for value in (-1, 1.0, 2**62, 10**400, None, [], "8", float("nan"))
        ),
        *(
            ({name: value}, f"{name} must be true or false")
            for name in (
                *("gated_mlp", "qkv_bias", "out_bias", "mlp_bias", "qk_norm"),
                *("tied_embeddings", "norm_after", "final_norm", "adaptive"),
            )
            for value in ([], 1, "yes", None)
        ),
        ({"norm_eps": 1e9}, "norm_eps must be between 1e-30 and 1, got 1000000000.0"),
        ({"norm_eps": 0}, "norm_eps must be between"),
        ({"norm_eps": True}, "norm_eps must be a number"),
        ({"family": 5}, "family must be text"),
        ({"family": "x" * 65}, "family must be text of 0 to 64"),
        ({"model_hash": None}, "model_hash must be text"),
        ({"eos_ids": ["2"]}, r"eos_ids\[0\] must be an integer, got '2'"),
        ({"eos_ids": [-1]}, r"eos_ids\[0\] must be between 0 and"),
        ({"eos_ids": [331]}, r"eos_ids must be below the vocabulary's 331, got \(331"),
        ({"bos_ids": [10**30]}, r"bos_ids\[0\] must be between 0 and"),
        ({"windows": [0, 0, 0, "x"]}, r"windows\[3\] must be an integer"),
        ({"windows": [0, 0, 0, 2**60]}, "windows must be 4 numbers from 0 to 16,777"),
        ({"rotary": [1, 0, 1, 0]}, r"rotary\[0\] must be true or false"),
        ({"thresholds": ["0.5"]}, r"thresholds\[0\] must be a number"),
        ({"thresholds": [1e300]}, r"thresholds\[0\] must be between"),
        ({"budgets": [4, [], 3]}, r"budgets\[1\] must be a number"),
        ({"neuron_budgets": [[1, ["x"]]]}, r"neuron_budgets\[0\]\[1\]\[0\] must be"),
        ({"rope": {**ROPE, "theta": "1e4"}}, "rope: theta must be a number"),
        ({"rope": {**ROPE, "theta": 1e300}}, "rope: theta must be between 2 and 1e"),
        ({"rope": {**ROPE, "factor": 0}}, "rope: factor must be between 1e-06 and"),
        ({"rope": {**ROPE, "truncate": "x"}}, "rope: truncate must be true or false"),
        ({"rope": {**ROPE, "original_context": 0}}, "original_context must be a posit"),
        (
            {"rope": {**ROPE, "divisors": [1.0]}},
            "rope has 1 divisors: a head_dim",
        ),
        (
            {"rope": {**ROPE, "divisors": [None] * 8}},
            r"rope: divisors\[0\] must be",
        ),
        ({"rope": {**ROPE, "thetta": 1}}, "rope: unknown key 'thetta': did you mean"),
        (
            {"rope": {**ROPE, "kind": "yarn", "beta_slow": 64.0}},
            "rope: beta_slow 64.0 must be below beta_fast 32.0",
        ),
        ({"head": 8}, "unknown key 'head': did you mean 'heads'"),
        ({"folder": "/"}, "unknown key 'folder'"),
    ],
)
def test_a_config_is_judged_field_by_field(changes, message):
    fields = json.loads(LLAMA.to_json(Learned().numbers()))
    with pytest.raises(ValueError, match="^not a polarjax config.json: .*" + message):
        read_description(json.dumps({**fields, **changes}))


def test_a_key_that_occurs_twice_or_not_at_all():
    text = LLAMA.to_json(Learned().numbers())
    for twice in ('"heads": 8', '"budgets": []'):
        name = twice.split(":")[0].strip('"')
        with pytest.raises(ValueError, match=f"it has the key '{name}' twice"):
            read_description(f"{text[:-1]}, {twice}}}")
    for name in json.loads(text):
        fields = json.loads(text)
        del fields[name]
        with pytest.raises(ValueError, match=f"it has no {name}"):
            read_description(json.dumps(fields))


def test_python_is_held_to_the_same():
    for changes, message in (
        ({"norm_eps": 1e9}, "norm_eps must be between"),
        ({"norm_after": "x"}, "norm_after must be true or false"),
        ({"eos_ids": [2]}, r"eos_ids must be a list \(in Python a tuple\), got \[2\]"),
        ({"eos_ids": (400,)}, "eos_ids must be below"),
        ({"heads": LARGEST + 1}, "heads must be between"),
        ({"rope": {"theta": 1e4}}, "rope must be a record or null"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(LLAMA, **changes)
    with pytest.raises(ValueError, match="theta must be between"):
        polarjax.Rope(0.0)
    assert dataclasses.replace(OPT, norm_eps=np.float64(1e-6)).norm_eps == 1e-6


# As the first polarjax of this format wrote them: they must load for ever.
OLD_CONFIG = """{"format_version": 2, "family": "llama", "vocab_size": 331, "dim": 48,
"layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 16, "neurons": 80, "context": 128,
"norm": "rms", "norm_eps": 1e-05, "activation": "silu", "gated_mlp": true,
"rope": {"theta": 10000.0, "kind": "default", "factor": 1.0, "low_freq_factor": 1.0,
"high_freq_factor": 4.0, "original_context": 8192, "divisors": [], "beta_fast": 32.0,
"beta_slow": 1.0, "truncate": true, "scale": 1.0}, "qkv_bias": false,
"out_bias": false, "mlp_bias": false, "tied_embeddings": true, "embed_dim": 48,
"qk_norm": false, "windows": [], "rotary": [], "norm_after": false,
"final_norm": true, "bos_ids": [], "eos_ids": [], "budgets": [], "adaptive": false,
"neuron_budgets": [], "thresholds": [], "model_hash": ""}"""


def test_files_of_before_load():
    assert read_description(OLD_CONFIG) == (LLAMA, Learned())


def test_a_card_is_judged_when_it_is_written():
    facts = {"model_hash": "ab", "budgets": [4, 2]}
    text = card_text({**facts, "notes": {"by": "me"}, "tokens": 9})
    assert json.loads(text)["notes"] == {"by": "me"}
    for wrong, message in (
        ({"toknes": 9}, "unknown key 'toknes': did you mean 'tokens'"),
        ({"tokens": "many"}, "tokens must be an integer, got 'many'"),
        ({"budgets": None}, "budgets must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            card_text({**facts, **wrong})
