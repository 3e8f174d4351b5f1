"""Masked dense decoding in plain numpy, float64: what sparse decoding must equal.

Nothing here is shared with the package. A selected KV group computes its attention,
an unselected one has its head outputs set to zero before the output projection, an
unselected neuron has its activation set to zero: arithmetic saved is not the point.
"""

import dataclasses

import numpy as np

import polarjax


@dataclasses.dataclass
class Selection:
    """What a policy may do.

    Attributes:
      groups: [layers][b], KV groups that each request reads.
      by: "router" scores, true output "norms", or a given "ranking" [layers][b][k].
      neurons: per layer, neurons that the batch reads; None for all.
    """

    groups: list[list[int]]
    by: str = "router"
    ranking: np.ndarray | None = None
    neurons: list[int | None] | None = None


@dataclasses.dataclass
class Result:
    """What a batch drew greedily.

    Attributes:
      tokens: per request, without the stop token.
      logprobs: of each.
      margin: the smallest distance between the best logit and the second.
      choice_margin: the smallest distance between the worst score that was selected
        and the best that was not.
      reads: [layers], groups read over all decode steps and live requests.
      kv_rows: keys read over all decode steps, layers and groups.
      groups_used: {(layer, request): set of groups read at some step}.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    margin: float = np.inf
    choice_margin: float = np.inf
    reads: np.ndarray | None = None
    kv_rows: int = 0
    groups_used: dict = dataclasses.field(default_factory=dict)


def uniform(config, densities, **others) -> Selection:
    """Layer 0 dense, the rest at one density per request."""
    k = config.kv_heads
    counts = [max(1, int(np.floor(d * k + 1e-4))) for d in densities]
    first = [[k] * len(counts)]
    return Selection(first + [counts] * (config.layers - 1), **others)


class Model:
    """One set of parameters as float64, and how a sequence runs through it."""

    def __init__(self, params: polarjax.Params):
        self.config = params.config
        self.weights = _float64(params.weights)
        self.routers = _float64(params.routers)

    def embed(self, token: int, position: int) -> np.ndarray:
        table = self.weights["embed"]
        x = table["tokens"][token]
        if "project_in" in table:
            x = table["project_in"] @ x
        if self.config.rope is None:
            x = x + table["positions"][position + 2]
        return x

    def logits(self, x: np.ndarray) -> np.ndarray:
        table = self.weights["embed"]
        if "final_norm" in self.weights:
            x = self._norm(x, self.weights["final_norm"])
        if "project_out" in table:
            x = table["project_out"] @ x
        return table["tokens" if self.config.tied_embeddings else "head"] @ x

    def layer_input(self, layer: int, x: np.ndarray) -> np.ndarray:
        if self.config.norm_after:
            return x
        return self._norm(x, self.weights[f"layers_{layer}"]["attention_norm"])

    def head_outputs(self, layer, u, cache) -> np.ndarray:
        """[h, d] of the newest token; its keys and values join the cache [(k, v)]."""
        c, attention = self.config, self.weights[f"layers_{layer}"]["attention"]
        y = attention["qkv"] @ u + attention.get("qkv_bias", 0)
        q, k, v = np.split(y.reshape(-1, c.head_dim), [c.heads, c.heads + c.kv_heads])
        if c.qk_norm:
            q, k = (
                np.stack([self._norm(head, attention[name]) for head in part])
                for part, name in ((q, "q_norm"), (k, "k_norm"))
            )
        if c.rope_of(layer):
            q, k = (self._rotate(part, len(cache)) for part in (q, k))
        cache.append((k, v))
        seen = cache[-(c.window(layer) or 0) :]
        keys, values = (np.stack(part) for part in zip(*seen, strict=True))
        out = np.zeros_like(q)
        for head in range(c.heads):
            group = head // (c.heads // c.kv_heads)
            scores = keys[:, group] @ q[head] / np.sqrt(c.head_dim)
            weights = np.exp(scores - scores.max())
            out[head] = weights / weights.sum() @ values[:, group]
        return out

    def after_attention(self, layer, x, heads) -> np.ndarray:
        weights = self.weights[f"layers_{layer}"]
        out, bias = weights["attention"]["out"], weights["attention"].get("out_bias", 0)
        y = x + heads.reshape(-1) @ out + bias
        return self._norm(y, weights["attention_norm"]) if self.config.norm_after else y

    def after_mlp(self, layer, y, neurons=None) -> np.ndarray:
        weights = self.weights[f"layers_{layer}"]
        mlp, act = weights["mlp"], _ACTIVATIONS[self.config.activation]
        z = y if self.config.norm_after else self._norm(y, weights["mlp_norm"])
        up = mlp["up"] @ z + mlp.get("up_bias", 0)
        hidden = act(up)
        if "gate" in mlp:
            hidden = act(mlp["gate"] @ z + mlp.get("gate_bias", 0)) * up
        if neurons is not None:
            hidden = np.where(np.isin(np.arange(len(hidden)), neurons), hidden, 0)
        y = y + hidden @ mlp["down"] + mlp.get("down_bias", 0)
        return self._norm(y, weights["mlp_norm"]) if self.config.norm_after else y

    def head_scores(self, layer, u) -> np.ndarray:
        router = self.routers[f"layers_{layer}"]["heads"]
        scores = router["weight"] @ u + router["bias"]
        if "down" in router:
            scores = scores + router["up"] @ (router["down"] @ u) ** 2
        return scores

    def neuron_scores(self, layer, u) -> np.ndarray:
        router = self.routers[f"layers_{layer}"]["neurons"]
        return np.logaddexp(0, router["up"] @ (router["down"] @ u))

    def _norm(self, x, weights) -> np.ndarray:
        if self.config.norm == "rms":
            scale = np.sqrt((x**2).mean() + self.config.norm_eps)
            return x / scale * weights["scale"]
        deviation = np.sqrt(x.var() + self.config.norm_eps)
        return (x - x.mean()) / deviation * weights["scale"] + weights["bias"]

    def _rotate(self, x, position) -> np.ndarray:
        d = x.shape[-1]
        turn = position * self.config.rope.theta ** (-np.arange(0, d, 2) / d)
        pairs = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * np.exp(1j * turn)
        return np.concatenate([pairs.real, pairs.imag], axis=1)


def decode(params, prompts, limits, selection=None, stop_ids=()) -> Result:
    """Continue prompts greedily, all requests in step; None selects everything.

    Prompts are read dense, the tokens drawn are read with the selection.
    """
    model, config, b = Model(params), params.config, len(prompts)
    layers = range(config.layers)
    result = Result([[] for _ in prompts], [[] for _ in prompts])
    result.reads = np.zeros(config.layers, int)
    caches = [[[] for _ in layers] for _ in prompts]
    live = [True] * b

    def draw(i: int, x: np.ndarray) -> None:
        logits = model.logits(x)
        token, order = int(logits.argmax()), np.sort(logits)
        result.margin = min(result.margin, order[-1] - order[-2])
        if token in stop_ids:
            live[i] = False
            return
        result.tokens[i].append(token)
        shifted = logits - logits.max()
        result.logprobs[i].append(shifted[token] - np.log(np.exp(shifted).sum()))
        live[i] = len(result.tokens[i]) < limits[i]

    for i, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            x = model.embed(token, position)
            for layer in layers:
                u = model.layer_input(layer, x)
                heads = model.head_outputs(layer, u, caches[i][layer])
                x = model.after_mlp(layer, model.after_attention(layer, x, heads))
        draw(i, x)

    while any(live):
        rows = [i for i in range(b) if live[i]]
        xs = {i: model.embed(result.tokens[i][-1], len(caches[i][0])) for i in rows}
        for layer in layers:
            us = {i: model.layer_input(layer, xs[i]) for i in rows}
            neurons = None
            if selection and selection.neurons and selection.neurons[layer]:
                total = sum(model.neuron_scores(layer, us[i]) for i in rows)
                neurons = _best(total, selection.neurons[layer], result)
            for i in rows:
                heads = model.head_outputs(layer, us[i], caches[i][layer])
                groups = _groups(model, layer, i, us[i], heads, selection, result)
                heads = heads.reshape(config.kv_heads, -1)
                mask = np.isin(np.arange(config.kv_heads), groups)[:, None]
                heads = np.where(mask, heads, 0)
                result.reads[layer] += len(groups)
                seen = min(
                    len(caches[i][layer]), config.window(layer) or config.context
                )
                result.kv_rows += len(groups) * seen
                used = result.groups_used.setdefault((layer, i), set())
                used.update(groups.tolist())
                y = model.after_attention(layer, xs[i], heads)
                xs[i] = model.after_mlp(layer, y, neurons)
        for i in rows:
            draw(i, xs[i])
    return result


def _groups(model, layer, i, u, heads, selection, result) -> np.ndarray:
    k = model.config.kv_heads
    n = selection.groups[layer][i] if selection else k
    if n == k:
        return np.arange(k)
    if selection.by == "router":
        scores = model.head_scores(layer, u)
    elif selection.by == "norms":
        scores = np.linalg.norm(heads.reshape(k, -1), axis=1)
    else:
        scores = selection.ranking[layer][i]
    return _best(scores, n, result)


def _best(scores: np.ndarray, n: int, result: Result) -> np.ndarray:
    order = np.argsort(-scores, kind="stable")
    if n < len(order):
        gap = scores[order[n - 1]] - scores[order[n]]
        result.choice_margin = min(result.choice_margin, gap)
    return order[:n]


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)


_ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def random_prompts(config, lengths, seed=0) -> list[list[int]]:
    """Prompts of the given lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(config.vocab_size, size=n).tolist() for n in lengths]


def assert_same(out: polarjax.Output, expected: Result, config) -> None:
    """Tokens equal, log-probabilities close, the bytes and densities counted right."""
    # Else float32 might decide otherwise than float64, and the case proves nothing.
    assert expected.margin > 1e-3, expected.margin
    assert expected.choice_margin > 1e-5, expected.choice_margin
    assert out.tokens == expected.tokens
    for ours, theirs in zip(out.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    float32_bytes = 4
    row = 2 * config.head_dim * float32_bytes  # one key and one value
    assert out.stats.kv_bytes == expected.kv_rows * row
    everything = expected.reads[0]  # layer 0 is dense
    if everything:
        np.testing.assert_allclose(out.stats.density, expected.reads / everything)
    else:  # the only token came from prefill
        assert out.stats.density == ()
