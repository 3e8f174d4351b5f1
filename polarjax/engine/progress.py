"""How far a call of `generate` has come: a bar, or a function of the user's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from polarjax.mesh.processes import is_main
from polarjax.storage.quoted import quoted
from polarjax.terminal.output import make_console, tokens_bar

# As progress(requests that have ended, requests, new tokens of all).
Progress = Callable[[int, int, int], None]


@contextlib.contextmanager
def following(progress: bool | Progress, total: int) -> Iterator[Progress]:
    """What is to be told of the progress of some requests.

    Args:
      progress: True for a bar on stderr, if that is a terminal; False for nothing; or
        a function, which is returned as it is.
      total: requests.

    Raises:
      TypeError: if it is none of these.
    """
    if callable(progress):
        yield progress
    elif progress is True and is_main():
        with token_bar(total) as tell:
            yield tell
    elif isinstance(progress, bool):
        yield lambda done, total, tokens: None
    else:
        raise TypeError(
            "progress must be True, False or a function of (requests done, requests, "
            f"new tokens), got {quoted(progress)}"
        )


@contextlib.contextmanager
def token_bar(total: int, done: int = 0) -> Iterator[Progress]:
    """A bar on stderr, if that is a terminal, with requests done and tokens a second.

    Args:
      total: requests.
      done: that had ended before.
    """
    with tokens_bar(make_console(stderr=True)) as bar:
        task = bar.add_task("generating", total=total, completed=done, tokens=0)

        def tell(done: int, total: int, tokens: int) -> None:
            bar.update(task, completed=done, total=total, tokens=tokens)

        yield tell
