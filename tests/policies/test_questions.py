"""All four questions in mask mode, against a model in plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.model import extend, logits, make_decoder, whole
from polarjax.policies.mean_key import MeanKey
from polarjax.policies.quest import Quest
from polarjax.policy import Groups, Policy, Rows, Threshold, Wants
from tests.models import LLAMA, OPT, empty_cache, random_params
from tests.policies.reference import Model

GQA = dataclasses.replace(LLAMA, heads=6, kv_heads=3)
LENGTHS = 41, 29


class Asked(Model):
    """The model in numpy, one position after the other, asked in four ways."""

    def __init__(self, params, groups=None, spans=None, hidden=None, inputs=None):
        super().__init__(params)
        self.groups, self.spans = groups, spans
        self.hidden, self.inputs = hidden, inputs

    def thin(self, layer, matrix, x):
        return x if self.inputs is None else self.inputs(layer, matrix, x)

    def attention(self, layer, u, cache):
        c, weights = self.config, self.weights[f"layers_{layer}"]["attention"]
        y = weights["qkv"] @ self.thin(layer, "qkv", u) + weights.get("qkv_bias", 0)
        q, k, v = np.split(y.reshape(-1, c.head_dim), [c.heads, c.heads + c.kv_heads])
        if c.rope_of(layer):
            q, k = (self._rotate(part, len(cache)) for part in (q, k))
        cache.append((k, v))
        keys, values = (np.stack(part) for part in zip(*cache, strict=True))
        out = np.zeros_like(q)
        per_group = c.heads // c.kv_heads
        for group in range(c.kv_heads):
            mine = slice(group * per_group, (group + 1) * per_group)
            read = np.ones(len(keys), bool)
            if self.spans is not None:
                read = self.spans(layer, q[mine], keys[:, group])
            for head in range(mine.start, mine.stop):
                scores = keys[read, group] @ q[head] / np.sqrt(c.head_dim)
                weight = np.exp(scores - scores.max())
                out[head] = weight / weight.sum() @ values[read, group]
            if self.groups is not None and group not in self.groups(layer):
                out[mine] = 0
        return self.thin(layer, "out", out.reshape(-1)).reshape(out.shape)

    def feed(self, layer, y):
        weights, c = self.weights[f"layers_{layer}"], self.config
        mlp = weights["mlp"]
        z = self.thin(layer, "up", self._norm(y, weights["mlp_norm"]))
        up = mlp["up"] @ z + mlp.get("up_bias", 0)
        gate = mlp["gate"] @ z + mlp.get("gate_bias", 0) if "gate" in mlp else up
        act = {
            "relu": lambda x: np.maximum(x, 0),
            "silu": lambda x: x / (1 + np.exp(-x)),
        }
        opened = act[c.activation](gate)
        hidden = opened * up if "gate" in mlp else opened
        if self.hidden is not None:
            hidden = self.hidden(layer, opened, hidden)
        hidden = self.thin(layer, "down", hidden)
        return y + hidden @ mlp["down"] + mlp.get("down_bias", 0)

    def all_logits(self, tokens):
        caches, found = [[] for _ in range(self.config.layers)], []
        for position, token in enumerate(tokens):
            x = self.embed(token, position)
            for layer in range(self.config.layers):
                u = self.layer_input(layer, x)
                heads = self.attention(layer, u, caches[layer])
                x = self.feed(layer, self.after_attention(layer, x, heads))
            found.append(self.logits(x))
        return np.array(found)


def tokens_of(config, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    return tokens.astype(np.int32)


def masked(params, policy, tokens):
    weights, bound = policy.bind(params)
    model = make_decoder(params.config.architecture, weights, bound.wants.scores)
    made = whole(model, weights, tokens, lengths=jnp.array(LENGTHS), policy=bound)
    return np.asarray(logits(model, weights, made.x))


def check(params, policy, **asked):
    tokens = tokens_of(params.config)
    found = masked(params, policy, tokens)
    for row, ids, length in zip(found, tokens, LENGTHS, strict=True):
        expected = Asked(params, **asked).all_logits(ids[:length])
        np.testing.assert_allclose(row[:length], expected, atol=2e-4, rtol=2e-4)
    return found


@pytest.mark.parametrize("config", [GQA, OPT], ids=["llama", "opt"])
def test_everything_is_the_model_itself(config):
    check(random_params(config), polarjax.Dense())


@dataclasses.dataclass(frozen=True)
class Fixed(Policy):
    """Groups, neurons and channels that are told beforehand."""

    which: tuple = ()
    rows: tuple | None = None
    scale: float | None = None
    tau: float | None = None
    matrices: tuple = ()

    def groups(self, layer, seen, pick):
        if not self.which or layer == 0:
            return None
        b = len(seen.live)
        index = jnp.broadcast_to(jnp.array(self.which, jnp.int32), (b, len(self.which)))
        return Groups(index, jnp.full(b, len(self.which)))

    def neurons(self, layer, seen, pick):
        if self.rows is None:
            return None
        index, scale = jnp.array(self.rows, jnp.int32), None
        if self.scale is not None:
            scale = jnp.full((len(seen.live), len(index)), self.scale)
        return Rows(index, jnp.int32(len(index) - 1), scale)

    def channels(self, layer, matrix, x, pick):
        if matrix not in self.matrices:
            return None
        return Threshold(jnp.float32(self.tau))


jax.tree_util.register_static(Fixed)


def test_groups():
    fixed = {"groups": lambda layer: [2, 0] if layer else [0, 1, 2]}
    check(random_params(GQA), Fixed(which=(2, 0)), **fixed)


@pytest.mark.parametrize("config", [GQA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_neurons_counted_and_scaled(config, scale):
    rows = (7, 3, 11, 30)  # the last is not counted

    def hidden(layer, opened, values):
        kept = np.zeros_like(values)
        kept[[7, 3, 11]] = values[[7, 3, 11]] * (scale or 1)
        return kept

    check(random_params(config), Fixed(rows=rows, scale=scale), hidden=hidden)


@pytest.mark.parametrize("matrix", ["qkv", "out", "up", "down"])
@pytest.mark.parametrize("config", [GQA, OPT], ids=["llama", "opt"])
def test_channels(config, matrix):
    tau = 0.3

    def inputs(layer, asked, x):
        return np.where(np.abs(x) > tau, x, 0) if asked == matrix else x

    params = random_params(config)
    policy = Fixed(tau=tau, matrices=(matrix,))
    found = check(params, policy, inputs=inputs)
    dense = masked(params, polarjax.Dense(), tokens_of(config))
    assert np.abs(found - dense).max() > 1e-2  # it does leave something out


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Gated(Policy):
    """Neurons whose gate some sequence opens: the batch reads their union."""

    least: float = 0.2

    wants = Wants(gate=True)

    def neurons(self, layer, seen, pick):
        size = jnp.where(seen.live[:, None], jnp.abs(seen.gate), 0).max(axis=0)
        return pick.rows(size, size.shape[0], least=self.least)


def test_the_gate_is_seen_before_the_rest():
    # A batch of one: the union is its own.
    params, tokens = random_params(GQA), tokens_of(GQA)[:1]
    weights, bound = Gated().bind(params)
    model = make_decoder(GQA.architecture, weights)
    made = whole(model, weights, tokens, policy=bound)

    def hidden(layer, opened, values):
        return np.where(np.abs(opened) >= 0.2, values, 0)

    expected = Asked(params, hidden=hidden).all_logits(tokens[0])
    found = np.asarray(logits(model, weights, made.x))[0]
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Below(Policy):
    """Neurons by the MLP input of the layer below; all of them in layer 0."""

    def neurons(self, layer, seen, pick):
        if seen.before is None:
            return None
        assert seen.before.before is None
        return pick.rows(jnp.abs(seen.before.z).max(axis=0), 5)


def test_the_layer_below_is_seen():
    params = random_params(GQA)
    found = masked(params, Below(), tokens_of(GQA))
    dense = masked(params, polarjax.Dense(), tokens_of(GQA))
    assert np.isfinite(found).all() and np.abs(found - dense).max() > 1e-3


def spans_of(kind, share, span, least):
    """Which keys are read, as the policies say it, in numpy."""

    def choose(layer, q, keys):
        length, d = keys.shape
        there = -(-length // span)
        if layer == 0:
            return np.ones(length, bool)
        scores = np.full(there, -np.inf)
        ends = range(length // span)
        parts = [keys[i * span : (i + 1) * span] for i in ends]
        if parts and kind is MeanKey:
            means = np.stack([part.mean(axis=0) for part in parts])
            each = np.exp(q @ means.T / np.sqrt(d))
            scores[: len(parts)] = (each / each.sum(axis=1, keepdims=True)).sum(axis=0)
        elif parts:
            high = np.stack([part.max(axis=0) for part in parts])
            low = np.stack([part.min(axis=0) for part in parts])
            bound = np.maximum(q, 0) @ high.T + np.minimum(q, 0) @ low.T
            scores[: len(parts)] = np.log(np.exp(bound / np.sqrt(d)).sum(axis=0))
        number = np.arange(there)
        scores[(number < 1) | (number >= there - 2)] = np.inf
        count = min(there, max(least, int(np.ceil(share * there))))
        best = np.argsort(-scores, kind="stable")[:count]
        return np.isin(np.arange(length) // span, best)

    return choose


@pytest.mark.parametrize("kind", [MeanKey, Quest])
@pytest.mark.parametrize(("share", "span", "least"), [(0.5, 4, 4), (0.75, 8, 1)])
def test_pages(kind, share, span, least):
    params = random_params(dataclasses.replace(GQA, rope=polarjax.Rope()), scale=0.4)
    policy = kind(share=share, span=span, least=least)
    found = check(params, policy, spans=spans_of(kind, share, span, least))
    dense = masked(params, polarjax.Dense(), tokens_of(GQA))
    assert np.abs(found - dense).max() > 1e-2
    every = masked(params, kind(share=1.0, span=span), tokens_of(GQA))
    for row, other, length in zip(every, dense, LENGTHS, strict=True):
        np.testing.assert_allclose(row[:length], other[:length], atol=1e-4)


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        (Quest(), "Quest selects pages, which no kernel"),
        (Fixed(tau=0.1, matrices=("qkv",)), "Fixed selects input channels"),
        (Fixed(tau=0.1, matrices=("up",)), "Fixed selects input channels"),
        (Fixed(rows=(1, 2)), "neurons with a count or a scale"),
    ],
)
def test_what_no_kernel_reads_is_refused_by_name(policy, what):
    params = random_params(GQA)
    model = make_decoder(GQA.architecture, params.weights)
    cache, one = empty_cache(GQA, 2, 16), jnp.ones(2, jnp.int32)
    with pytest.raises(NotImplementedError, match=what):
        extend(model, params.weights, one, one > 0, cache, policy=policy)
    with pytest.raises(NotImplementedError, match=what):
        polarjax.generate(params, [[1, 2]], policy=policy, max_new_tokens=3)
