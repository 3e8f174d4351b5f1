"""What the commands print with: words as they are, whatever is in them.

The text of models and users goes through no markup, no emoji codes and no
highlighting, and its control characters do nothing. Output that is no terminal's is
neither wrapped nor cut. Nothing else makes consoles, bars or columns of bars.
"""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_ENDLESS = 100_000  # columns: wider than any table
_RULE = 80  # columns of a line between texts, at most


class _Plain(Console):
    """A console to which a str is text, in tables and titles too."""

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(harmless(text), **settings)


def make_console(stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints text as it is.

    Args:
      stderr: write there. What is not a command's result, such as progress, does.
      quiet: print nothing.
    """
    shown = is_terminal(sys.stderr if stderr else sys.stdout)
    return _Plain(
        stderr=stderr,
        quiet=quiet,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=not shown,
        width=None if shown else _ENDLESS,
    )


def is_terminal(file: Any) -> bool:
    """Whether people see what is written, in lines of a limited width."""
    try:
        return bool(file.isatty())
    except (AttributeError, ValueError):  # none, or closed
        return False


def harmless(text: str) -> str:
    """Text of which no character commands a terminal: those are shown as codes.

    Args:
      text: of a model, of a user or of a file's name.
    """
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) != "Cc"
        else char.encode("unicode_escape").decode()
        for char in text
    )


def one_line(error: BaseException) -> str:
    """What an error says, as one line that commands no terminal."""
    return harmless(" ".join(str(error).split()))


def show_text(console: Console, prompt: str, text: str) -> None:
    """Print a prompt and what follows it: to a file or pipe to the letter.

    Args:
      console: of `make_console`.
      prompt: shown bold on a terminal.
      text: behind it.
    """
    if is_terminal(console.file):
        console.print(Text(harmless(prompt), "bold").append(harmless(text), "not bold"))
    else:  # rich drops some characters, and expands tabs
        print(prompt + text, file=console.file)


def rule(console: Console) -> None:
    """A line between texts."""
    console.print("─" * min(_RULE, console.width))


class _Words(TextColumn):
    """A column of a bar: text as it is."""

    def render(self, task: Task) -> Text:
        return Text(harmless(self.text_format.format(task=task)))


def counting_bar(console: Console) -> Progress:
    """A progress bar that shows how many are done; only on a terminal."""
    return Progress(
        _Words("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not is_terminal(console.file),
    )


class _Rate(ProgressColumn):
    """A column of a bar: tokens a second, of a task's field "tokens"."""

    def render(self, task: Task) -> Text:
        seconds = task.elapsed or 0.0
        rate = task.fields["tokens"] / seconds if seconds else 0.0
        return Text(f"{rate:,.0f} tokens/s")


def tokens_bar(console: Console) -> Progress:
    """A bar of requests, whose tasks have a field "tokens"; only on a terminal."""
    return Progress(
        _Words("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=console,
        disable=not is_terminal(console.file),
    )


def share_bar(console: Console) -> Progress:
    """One for work of which the units mean nothing to people; only on a terminal."""
    return Progress(
        _Words("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        _Words("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not is_terminal(console.file),
        speed_estimate_period=86_400,  # batches differ: what counts is their mean
    )


def bytes_bar(what: str, console: Console, shown: bool) -> Progress:
    """A progress bar for bytes, which names what it is at.

    Args:
      what: is done.
      console: of `make_console`.
      shown: whether at all; only on a terminal.
    """
    return Progress(
        _Words(what),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        _Words("{task.description}"),
        console=console,
        disable=not (shown and is_terminal(console.file)),
    )


def print_whatever_the_encoding() -> None:
    """Let stdout write what its encoding lacks as codes, as stderr does.

    An emoji in a model's text is no reason to lose the text.
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="backslashreplace")
