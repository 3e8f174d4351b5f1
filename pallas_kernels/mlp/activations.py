"""Activations by what both of Pallas' backends can lower."""

import math

import jax.numpy as jnp


def _gelu(x):
    """The exact GELU; Pallas lowers no erf, so its formula is here."""
    # Abramowitz and Stegun 7.1.26: within 1.5e-7 of erf.
    z = jnp.abs(x) * math.sqrt(0.5)
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + coefficient
    tail = series * t * jnp.exp(-z * z)  # 1 - erf(z)
    return jnp.where(x < 0, 0.5 * x * tail, x - 0.5 * x * tail)


ACTIVATIONS = {
    "relu": lambda x: jnp.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + jnp.exp(-x)),
    "gelu": _gelu,
}
