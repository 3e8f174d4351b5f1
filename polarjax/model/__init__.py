"""Dense model code: it reads like the papers and knows no routers."""

from polarjax.model.attention import Gates, Prefix
from polarjax.model.decoder import Decoder, run, weight_shapes

__all__ = ["Decoder", "Gates", "Prefix", "run", "weight_shapes"]
