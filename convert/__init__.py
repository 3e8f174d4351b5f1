"""Turn published checkpoints into the folder that `polarjax.load` reads."""

from convert.core import convert
from convert.source import ConversionError

__all__ = ["ConversionError", "convert"]
