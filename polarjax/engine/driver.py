"""The thread of an `AsyncEngine`, which alone calls the engine.

Commands, to take a request or to cancel one, come by a queue; the thread carries them
out between two steps, and after each step hands every event loop, in one call, what is
new for its readers. It never sleeps on news.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence

from polarjax.engine.checks import Settings
from polarjax.engine.engine import Engine
from polarjax.engine.errors import RequestFailed
from polarjax.engine.request import Piece, Request
from polarjax.engine.streams import next_piece
from polarjax.settings import default_numbers

_CLOSED = "this engine is closed: make a new one"


@dataclasses.dataclass(eq=False)
class Reader:
    """Where the thread leaves what is new.

    Attributes:
      loop: of who reads.
      items: pieces, or what ended them. Each piece but the last has a token or a
        character at least, so the request's own limit bounds them.
      request: once the engine has taken it.
    """

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Piece | Exception]
    request: Request | None = None


class Driver:
    """An engine and the thread that drives it, whenever there is something to do.

    It does not know whose it is, so that the thread keeps no `AsyncEngine` alive. The
    process ends only when the thread has: one that comes back from XLA to an
    interpreter that is gone would abort it.

    Args:
      engine: which nobody else may call from now on. It ends with this one.

    Attributes:
      thread: runs until `stop`, or until the engine fails.

    Raises:
      RuntimeError: if the engine is closed, has a thread already, or requests of it go
        on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Collecting garbage may cancel a stream amid another command of this thread.
        self._lock, self._closed = threading.RLock(), ""
        self._going = True  # of the thread, which alone knows what follows
        self._inbox: dict[Request, None] = {}
        self._readers: dict[Request, Reader] = {}
        self.thread = threading.Thread(
            target=self._run, name="polarjax engine", daemon=True
        )
        engine._lend(self.thread, self.close)
        # The last to register is called first: the backends are still there.
        atexit.register(self.close)
        self.thread.start()

    def check_takes(self) -> None:
        """Raise if a request would not be taken now, whatever it is.

        Raises:
          QueueFull: if as many wait as the engine lets wait.
          RuntimeError: if nothing is taken any more; it says why.
        """
        if self._closed:
            raise RuntimeError(self._closed)
        self._engine._check_room()

    @default_numbers
    def prepare(
        self, prompt: str | Sequence[int], settings: Settings | None
    ) -> Request:
        """Check a request, in the thread of who asks: it may take long.

        Args:
          prompt: a text, or token ids.
          settings: how it is continued.

        Raises:
          TypeError: if the prompt is neither.
          ValueError: if it or a setting is out of range; it is named.
          RuntimeError: if the engine was closed meanwhile.
        """
        try:
            return self._engine._prepare(prompt, settings)
        except Exception:
            if self._engine._ended:  # what was looked at may be gone
                raise RuntimeError(self._engine._ended) from None
            raise

    def admit(
        self, request: Request, reader: Reader, taken: asyncio.Future[None]
    ) -> None:
        """Have the engine take a request.

        Args:
          request: of `prepare`.
          reader: of it.
          taken: of the reader's loop; set once it is taken, or refused.

        Raises:
          RuntimeError: if nothing is taken any more.
        """
        if not self._put(lambda: self._admit(request, reader, taken)):
            raise RuntimeError(self._closed)

    def cancel(self, reader: Reader) -> None:
        """End a reader's request, if it goes on: within one step.

        It may be called at any moment, amid garbage collection and when the interpreter
        ends: then there is nothing left to cancel.

        Args:
          reader: of this one.
        """
        self._put(lambda: self._cancel(reader))

    def stop(self) -> None:
        """End thread and engine after the step; at any moment, as `cancel`."""
        self._put(self._stop, last=_CLOSED)

    def close(self) -> None:
        """As `stop`, and wait for it."""
        self.stop()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _put(self, command: Callable[[], None], last: str = "") -> bool:
        """Have the thread do something; what is taken here is carried out.

        Args:
          command: without arguments.
          last: why nothing is taken after it, if nothing is.

        Returns:
          Whether it is taken.
        """
        with self._lock:
            if self._closed:
                return False
            self._commands.put(command)
            if last:  # else it stays what garbage, collected right here, has made it
                self._closed = last
            return True

    # What follows is the thread's.

    def _stop(self) -> None:
        self._going = False

    def _run(self) -> None:
        failure = None
        try:
            while self._going:
                self._obey()
                if self._going and not self._engine.idle:
                    with contextlib.suppress(RequestFailed):  # they say so themselves
                        self._engine.step()
                self._deliver()
        except BaseException as error:  # what became of the arrays is not known
            failure = error
        try:
            with self._lock:
                self._closed = self._closed or f"the engine failed: {failure}"
            if failure is not None:
                self._fail(failure)
            self._engine.close()
            self._deliver()
        finally:
            while not self._commands.empty():  # of before it failed: they are refused
                self._commands.get()()
            atexit.unregister(self.close)

    def _obey(self) -> None:
        """Carry out what was asked for; wait for it where there is nothing else."""
        # No more than that: who asks without end keeps no reader from his pieces, and
        # what the last command has ended is handed over before the thread sleeps again.
        for _ in range(self._commands.qsize() or int(self._engine.idle)):
            self._commands.get()()

    def _fail(self, error: BaseException) -> None:
        """Let every reader know why there is no more."""
        for reader in self._readers.values():
            told = RuntimeError(f"the engine failed: {error}")
            told.__cause__ = error
            self._hand_over(reader.loop, [(reader, told)])
        self._readers.clear()

    def _cancel(self, reader: Reader) -> None:
        if reader.request is not None:
            self._engine.cancel(reader.request)

    def _admit(
        self, request: Request, reader: Reader, taken: asyncio.Future[None]
    ) -> None:
        error = None
        try:
            self._engine._take(request)
        except Exception as why:
            error = why
        else:
            reader.request, request.inbox = request, self._inbox
            self._readers[request] = reader

        def answer() -> None:
            if taken.done():  # who asked waits no longer
                return
            if error is None:
                taken.set_result(None)
            else:
                taken.set_exception(error)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            reader.loop.call_soon_threadsafe(answer)

    def _deliver(self) -> None:
        """Hand each event loop what is new for its readers."""
        news: dict[asyncio.AbstractEventLoop, list[_News]] = {}
        for request in self._inbox:
            reader = self._readers.get(request)
            if reader is None:
                continue
            try:
                item = next_piece(request)
            except Exception as error:  # it is this reader's, whatever it is
                item = error
                request.cancel()
            if item is not None:
                news.setdefault(reader.loop, []).append((reader, item))
            if not request.going:
                del self._readers[request]
        self._inbox.clear()
        for loop, items in news.items():
            self._hand_over(loop, items)

    def _hand_over(self, loop: asyncio.AbstractEventLoop, items: list[_News]) -> None:
        def put() -> None:
            for reader, item in items:
                reader.items.put_nowait(item)

        try:
            loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed, and its readers are gone
            for reader, _ in items:
                if reader.request is not None:
                    reader.request.cancel()


_News = tuple[Reader, Piece | Exception]
