"""What both of the Triton MLP's modules load and mask by."""

import jax.numpy as jnp

from pallas_kernels._backend import pltriton


def sums(weights):
    """The matrices of the first product."""
    return tuple(name for name in ("up", "gate") if name in weights)


def activations(sums, act):
    """What the second product multiplies, from the sums of the first."""
    up = sums["up"]
    return act(sums["gate"]) * up if "gate" in sums else act(up)


def arange(size):
    """From 0 to size, int32."""
    return jnp.arange(size, dtype=jnp.int32)


def block(index, size):
    """The indices of the index-th block of a size."""
    return index * size + arange(size)


def share(total, part, parts):
    """From where to where in 0..total the part-th of equal parts goes."""
    return part * total // parts, (part + 1) * total // parts


def below(indices, limit, step):
    """A mask where indices < limit; None where steps never go beyond it."""
    return None if limit % step == 0 else indices < limit


def both(mask, other):
    """Where both masks hold; None holds everywhere."""
    if mask is None or other is None:
        return other if mask is None else mask
    return mask & other


def column(mask):
    """A mask of rows, for a tile."""
    return None if mask is None else mask[:, None]


def row(mask):
    """A mask of columns, for a tile."""
    return None if mask is None else mask[None, :]


def selected(neurons_ref, places, mask, f, padded):
    """The rows to read for these places in the selection, and where they count.

    Args:
        neurons_ref: the selection [n], or None for all f.
        places: in it.
        mask: where they are of it; None everywhere.
        f: rows of the weights.
        padded: whether numbers from f on stand for nothing.
    """
    neuron = places if neurons_ref is None else load(neurons_ref.at[places], mask)
    if padded:
        mask = both(mask, neuron < f)
    # Keeps a wrong index from reading outside of the weights.
    return jnp.clip(neuron, 0, f - 1), mask


def load(ref, mask):
    """Load, 0 where masked."""
    if mask is None:
        return pltriton.load(ref)
    return pltriton.load(ref, mask=mask, other=0)


def load_tile(ref, rows, cols, row_mask, col_mask):
    """Load ref[rows, cols], 0 where masked; cols are the same or each row's own."""
    if cols.ndim == 1:
        cols, col_mask = cols[None, :], row(col_mask)
    mask = both(column(row_mask), col_mask)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (rows.size, cols.shape[1]))
    return load(ref.at[rows[:, None], cols], mask)
