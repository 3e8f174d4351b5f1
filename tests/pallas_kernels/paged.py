"""Prompts in a pool of pages, calls that read pieces of them, and what is right."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass
class World:
    """Sequences in a pool of pages, whose every other position is poison.

    `q[slot]`, `keys[slot]` and `values[slot]` are whole, [length, heads, d].
    """

    q: list
    keys: list
    values: list
    table: np.ndarray
    pages: int
    page: int
    dtype: str

    def pool(self, known):
        """The pools when of each slot the positions (first, end) are written."""
        k, d = self.keys[0].shape[1:]
        pools = []
        for whole in (self.keys, self.values):
            pool = np.full((self.pages, k, self.page, d), np.nan, np.float32)
            for slot, (first, end) in known.items():
                x = np.arange(first, end)
                numbers = self.table[slot, x // self.page]
                pool[numbers, :, x % self.page] = whole[slot][first:end]
            pools.append(jnp.asarray(pool, self.dtype))
        return pools

    def args(self, n, pieces, r=5, window=None):
        """Arguments of a call of n rows: pieces (slot, first, count, start)."""
        h, d = self.q[0].shape[1:]
        q = np.full((n, h, d), np.nan, np.float32)
        known = {}
        for slot, first, count, start in pieces:
            q[start : start + count] = self.q[slot][first : first + count]
            oldest = max(first - window + 1, 0) if window else 0
            seen, end = known.get(slot, (oldest, 0))
            known[slot] = min(seen, oldest), max(end, first + count)
        # No piece: its other numbers are wrong. Some stand between the others.
        lines = [*pieces, *[(-3, -9, 0, 10**6), (99, 2**31 - 1, -5000, -1)] * r][:r]
        lines = np.array(lines[-1:] + lines[:-1]).T
        slots, firsts, counts, starts = (jnp.asarray(x, jnp.int32) for x in lines)
        table = np.full((self.table.shape), 10**6)
        table[::2] = -1
        for slot, (_, end) in known.items():
            used = -(-end // self.page)
            table[slot, :used] = self.table[slot, :used]
        table = jnp.asarray(table, jnp.int32)
        q = jnp.asarray(q, self.dtype)
        return (q, *self.pool(known), table, slots, starts, counts, firsts)


def make_world(h=6, k=2, d=64, page=16, lengths=(70, 33, 1), dtype="float32", seed=0):
    rng = np.random.default_rng(seed)

    def rounded(*shape):
        return np.array(jnp.asarray(rng.normal(size=shape), dtype), np.float32)

    m = -(-max(lengths) // page) + 1
    slots = len(lengths)
    pages = slots * m + 4
    table = rng.permutation(np.arange(1, pages))[: slots * m].reshape(slots, m)
    heads = {"q": h, "keys": k, "values": k}
    wholes = {
        name: [rounded(length, count, d) for length in lengths]
        for name, count in heads.items()
    }
    # The first two share their first page.
    if slots > 1 and min(lengths[:2]) > page:
        table[1, 0] = table[0, 0]
        for name in ("keys", "values"):
            wholes[name][1][:page] = wholes[name][0][:page]
    return World(**wholes, table=table, pages=pages, page=page, dtype=dtype)


def expected(world, n, pieces, scale=None, window=None, softcap=None):
    """In float64, one row at a time."""
    h, d = world.q[0].shape[1:]
    g = h // world.keys[0].shape[1]
    out = np.zeros((n, h, d))
    for slot, first, count, start in pieces:
        for i in range(count):
            end = first + i + 1
            oldest = max(end - window, 0) if window else 0
            keys, values = (
                np.float64(x[slot][oldest:end]).repeat(g, axis=1)
                for x in (world.keys, world.values)
            )
            scores = np.einsum("hd,shd->hs", np.float64(world.q[slot][end - 1]), keys)
            scores *= d**-0.5 if scale is None else scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[start + i] = np.einsum("hs,shd->hd", weights, values)
    return out
