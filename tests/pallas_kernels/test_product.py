"""The dense model's matrix product, and its gradients."""

import jax
import jax.numpy as jnp
from jax.test_util import check_grads

from pallas_kernels import product


def test_gradients_are_products_of_sixteen_bit_numbers():
    x, rows = jnp.ones((3, 4)), jnp.ones((5, 4))
    check_grads(product, (x, rows), order=1, modes=["rev"])

    def gradients(x, rows):
        return jax.vjp(product, x, rows)[1](jnp.ones((3, 5)))

    half = x.astype(jnp.bfloat16), rows.astype(jnp.bfloat16)
    assert [g.dtype for g in gradients(*half)] == [jnp.bfloat16] * 2
    text = str(jax.make_jaxpr(gradients)(*half))
    assert text.count("dot_general") == 3
    lowered = jax.jit(gradients).lower(*half).as_text()
    for line in lowered.splitlines():
        if "dot_general" in line:
            operands = line.rsplit(" : ", 1)[1].split("->")[0]
            assert operands.count("xbf16>") == 2, line
