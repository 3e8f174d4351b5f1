"""Policies that users write: each gets its own program, and its mistakes are named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.evaluation.measure import measure
from polarjax.evaluation.perplexity import window_items
from polarjax.evaluation.scoring import Scorer
from polarjax.policy import Groups, Load, Pages, Reads, Rows, Threshold
from tests.models import LLAMA, random_params


@pytest.fixture(scope="module")
def params():
    return random_params(LLAMA)


def registered(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def of_group(number, asked):
    """A policy without fields that reads one group from layer 1 on."""

    @registered
    class Mine(polarjax.Policy):
        def groups(self, layer, seen, pick):
            asked.add(number)
            b = len(seen.live)
            index = jnp.full((b, 1), number % LLAMA.kv_heads, jnp.int32)
            return Groups(index, jnp.ones(b, jnp.int32)) if layer else None

    return Mine()


def test_each_class_has_its_own_program(params):
    """For jax 0.10 the trees of classes with equal fields are the same."""
    asked = set()
    found = [
        polarjax.generate(
            params, [[1, 2, 3]], max_new_tokens=5, policy=of_group(i, asked)
        ).tokens
        for i in range(12)
    ]
    assert asked == set(range(12))
    assert all(tokens == found[i % LLAMA.kv_heads] for i, tokens in enumerate(found))


def test_each_class_is_measured_by_its_own_program(params):
    asked = set()
    policies = {str(i): of_group(i, asked) for i in range(12)}
    scorer = Scorer(params, policies, mode="mask", batch=1)
    found = measure(scorer, window_items(np.arange(8), 8))
    assert asked == set(range(12))
    each = [found[str(i)].nll[0] for i in range(12)]
    assert each == [each[i % LLAMA.kv_heads] for i in range(12)]
    assert len(set(each)) == LLAMA.kv_heads


def answering(question, answer):
    @registered
    class Wrong(polarjax.Policy):
        def groups(self, layer, seen, pick):
            return answer if layer and question == "groups" else None

        def neurons(self, layer, seen, pick):
            return answer if layer and question == "neurons" else None

        def pages(self, layer, seen, pick):
            return answer if layer and question == "pages" else None

        def channels(self, layer, matrix, x, pick):
            return answer if layer and question == "channels" else None

    return Wrong()


ONE = np.ones(1, np.int32)


@pytest.mark.parametrize(
    ("question", "answer", "error"),
    [
        ("groups", (ONE, ONE), "Wrong.groups answers Groups or None, not tuple"),
        ("groups", "all", "Wrong.groups answers Groups or None, not str"),
        ("groups", Groups(ONE, ONE), r"an index of shape \[1\]; it must be \[1, n\]"),
        ("groups", Groups(ONE[None], np.ones(2, np.int32)), r"a count .*int32\[1\]"),
        ("groups", Groups(np.ones((1, 9), np.int32), ONE), "with n from 1 to 4"),
        ("groups", Groups(np.ones((1, 2)), ONE), r"that is float32\[1, 2\]"),
        ("pages", 5, "Wrong.pages answers Pages or None, not int"),
        ("pages", Pages(ONE, ONE), r"shape \[1\]; it must be \[1, 4, p\], or \[1, 1"),
        ("pages", Pages(ONE[None, None], ONE), r"a count .*int32\[1, 1\]"),
        ("channels", 5, "Wrong.channels answers Threshold or None, not int"),
        ("channels", Threshold(ONE), r"a tau of shape \[1\].*must be \[\] and \[48\]"),
        ("channels", Threshold(1.0, ONE), r"scale of shape \[1\]; they must be \[\]"),
        ("neurons", ONE, "Wrong.neurons answers Rows or None, not ndarray"),
        ("neurons", Rows(np.ones((1, 3), np.int32)), r"must be int32\[3\]"),
    ],
)
def test_a_wrong_answer_is_named(question, answer, error, params):
    with pytest.raises((TypeError, ValueError), match=error):
        polarjax.generate(
            params, [[1, 2]], max_new_tokens=3, policy=answering(question, answer)
        )


def test_layer_0_may_be_sparse_and_reads_may_name_groups_alone(params):
    @registered
    class Everywhere(polarjax.Policy):
        def groups(self, layer, seen, pick):
            b = len(seen.live)
            count = jnp.full(b, 9 if layer == 1 else 2, jnp.int32)  # 9 of 2 are 2
            return Groups(jnp.tile(jnp.arange(2, dtype=jnp.int32), (b, 1)), count)

        def reads(self, config, load: Load):
            return Reads((2.0,) * config.layers)

    prompts = [[1, 2], [3]]
    out = polarjax.generate(params, prompts, max_new_tokens=6, policy=Everywhere())
    assert out.stats.density == (0.5,) * LLAMA.layers
    assert out.stats.neuron_density == (1.0,) * LLAMA.layers


@pytest.mark.parametrize("wrong", ["dense", 5, polarjax.Dense, object()])
def test_what_is_no_policy_is_named(wrong, params):
    with pytest.raises(TypeError, match="policy must be a policy like Dense"):
        polarjax.Engine(params, policy=wrong)
    with pytest.raises(TypeError, match="policy must be a policy like Dense"):
        Scorer(params, {"it": wrong})


def test_a_policy_that_jax_does_not_know_is_named(params):
    class Plain(polarjax.Policy):
        pass

    @dataclasses.dataclass(frozen=True)
    class Unknown(polarjax.Policy):
        pass

    class Inherited(polarjax.Dense):
        pass

    for policy in (Plain(), Unknown(), Inherited()):
        name = type(policy).__name__
        with pytest.raises(TypeError, match=f"policy {name} must be a dataclass that"):
            polarjax.generate(params, [[1, 2]], policy=policy)


def test_what_a_policy_shows_of_itself_is_its_settings():
    params = random_params(LLAMA, routers=True)
    bound = polarjax.Random(0.5, seed=3).bind(params)[1]
    assert repr(polarjax.Polar(0.5).of(params.policy.learned)) == repr(
        polarjax.Polar(0.5)
    )
    assert "Array" not in repr(bound) + repr(params.policy)
