"""What the parsers share: numbers, help that leaves out what says nothing, checks."""

from __future__ import annotations

import argparse
import fractions
from collections.abc import Callable
from typing import Any

Fill = Callable[[argparse.ArgumentParser], None]


class Formatter(argparse.HelpFormatter):
    """Help with the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        nothing = default is None or default is False or default in ("", [], ())
        if nothing or default == argparse.SUPPRESS or not action.option_strings:
            return text
        if "default" in text:
            return text
        many = isinstance(default, list | tuple)
        shown = " ".join(map(_shown, default if many else [default]))
        return f"{text} (default: {shown.replace('%', '%%')})"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Parser(argparse.ArgumentParser):
    """A parser that is told its arguments when it is asked to parse.

    One of many commands is wanted at a time, and its own parser may cost imports.

    Args:
      fill: adds the arguments; None if they are added from outside.
      settings: of `argparse.ArgumentParser`.
    """

    def __init__(self, fill: Fill | None = None, **settings: Any) -> None:
        super().__init__(formatter_class=Formatter, **settings)
        self._fill = fill

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As the base class, of the arguments that `fill` adds."""
        fill, self._fill = self._fill, None
        if fill:
            fill(self)
            self.set_defaults(parser=self)
        return super().parse_known_args(args, namespace)


def refuse(args: argparse.Namespace, names: str, why: str) -> None:
    """Raise if an option was given that changes nothing.

    A value that is the default's asks for nothing, and passes.

    Args:
      args: that a `Parser` made.
      names: of options, with spaces between them.
      why: it has no effect.

    Raises:
      ValueError: naming the option.
    """
    for name in names.split():
        value = getattr(args, name.replace("-", "_"), None)
        if value != args.parser.get_default(name.replace("-", "_")):
            raise ValueError(f"--{name} has no effect {why}: leave it out")


def fraction(text: str) -> float:
    """A number such as 0.5 or 2/3."""
    try:
        return float(fractions.Fraction(text))
    except (ValueError, ZeroDivisionError):
        message = f"{text!r} is no number such as 0.5 or 2/3"
        raise argparse.ArgumentTypeError(message) from None


def percentage(text: str) -> float:
    """1% or 0.01."""
    if text.endswith("%"):
        return fraction(text[:-1]) / 100
    return fraction(text)


def add_checkpoint(add: Callable[..., Any]) -> None:
    """The model that a command loads."""
    add("checkpoint", help="folder that convert wrote, or id of the hub")


def add_any_model(add: Callable[..., Any]) -> None:
    """The option that goes with --adapter."""
    add(
        "--any-model",
        action="store_true",
        help="take the adapter although it was learned on other weights, such as "
        "another quantisation or fine-tune, if its shapes are right",
    )


def add_mesh_arguments(add: Callable[..., Any], shared: str) -> None:
    """The options that say over which devices a model is cut.

    Args:
      add: of a parser.
      shared: what copies of the model have parts of.
    """
    add(
        "--tp",
        type=int,
        metavar="N",
        help="devices that share the model, each with its heads and neurons; alone, "
        "there is one copy",
    )
    add(
        "--dp",
        type=int,
        metavar="M",
        help=f"copies of the model, which share the {shared}; alone, each is over as "
        "many devices as there are for it. Without both: all GPUs",
    )
