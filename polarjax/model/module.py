"""What the model's modules have in common."""

from __future__ import annotations

from typing import Any

from flax import linen as nn


class Module(nn.Module):
    """A flax module that takes the weights it is given as they are.

    Flax would trace each initial value in every program, to compare its shape with
    that of the weight: a quarter of what tracing a decode step takes.
    `polarjax.model.check_weights` compares all of them, once.
    """

    @nn.nowrap
    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.param`, which makes the weights where none are."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return super().param(name, *args, **kwargs)
