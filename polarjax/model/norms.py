"""The normalisation before attention, MLP and head, and of queries and keys."""

from __future__ import annotations

from flax import linen as nn

from polarjax.config import ModelConfig


def make_norm(config: ModelConfig, dtype) -> nn.Module:
    """RMSNorm (LLaMA) or LayerNorm (OPT), computed in float32, returned in `dtype`."""
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype)
    # Not the fast variance E[x^2] - E[x]^2: it loses digits.
    return nn.LayerNorm(
        epsilon=config.norm_eps,
        dtype=dtype,
        param_dtype=dtype,
        use_fast_variance=False,
    )
