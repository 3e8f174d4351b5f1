"""Turn published checkpoints into the folder that `polarjax.load` reads."""

TYPE_CHECKING = False  # of typing, which costs time to import
if TYPE_CHECKING:
    from convert.core import convert
    from convert.source import ConversionError

__all__ = ["ConversionError", "convert"]


def __getattr__(name: str):  # PEP 562
    """The public names: what is behind them is loaded when one is used."""
    if name == "convert":
        from convert.core import convert

        return convert
    if name == "ConversionError":
        from convert.source import ConversionError

        return ConversionError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
