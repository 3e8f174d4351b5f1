"""An engine with a thread of its own, for any number of readers in event loops.

Readers never call the engine. They put commands, to add a request or to cancel one,
into a queue; the thread carries them out between two steps, and after each step hands
every event loop, in one call, what is new for its readers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from polarjax.engine.checks import Settings, encode_prompt
from polarjax.engine.engine import Engine
from polarjax.engine.errors import RequestFailed
from polarjax.engine.request import Piece, Request
from polarjax.engine.streams import next_piece

_CLOSED = "this engine is closed: make a new one"


@dataclasses.dataclass(eq=False)
class _Reader:
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


class AsyncStream:
    """An asynchronous iterator of what a request gets; the last piece has a reason.

    A reader that does not read holds up nobody: its pieces wait for it, at most
    `max_new_tokens` tokens of them. A wait that is given up (`asyncio.wait_for`) loses
    no piece. As a context manager it cancels the request at the end, and so it does
    when nobody holds it any more.

    Args:
      reader: that the engine's thread fills.
      cancel: ends the reader's request.
    """

    def __init__(self, reader: _Reader, cancel: Callable[[_Reader], None]):
        self._reader, self._cancel = reader, cancel
        self._ended = False

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        """The next piece.

        Raises:
          RequestFailed: if the model yields NaN for the request.
          RuntimeError: if the engine was closed, or failed.
        """
        if self._ended:
            raise StopAsyncIteration
        item = await self._reader.items.get()
        if isinstance(item, Exception):
            self._ended = True
            raise item
        self._ended = bool(item.finish_reason)
        return item

    def close(self) -> None:
        """Cancel the request, if it goes on: within one step."""
        if not self._ended:
            self._ended = True
            self._cancel(self._reader)

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncEngine:
    """An engine that a thread of its own drives, whenever there is something to do.

    Args:
      engine: which nobody else may call from now on. It ends with this one.

    Raises:
      ValueError: if its mesh spans several processes, which would have to be told the
        same at the same steps.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.mesh is not None and engine.mesh.is_multi_process:
            raise ValueError(
                "AsyncEngine takes an engine of one process, this one's mesh spans "
                "several: call its generate on all of them"
            )
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Collecting garbage may cancel a stream amid another command of this thread.
        self._lock, self._closed = threading.RLock(), ""
        self._going = True  # of the thread, which alone knows what follows
        self._inbox: dict[Request, None] = {}
        self._readers: dict[Request, _Reader] = {}
        self._thread = threading.Thread(
            target=self._run, name="polarjax engine", daemon=True
        )
        self._thread.start()

    async def add(
        self, prompt: str | Sequence[int], settings: Settings | None = None
    ) -> AsyncStream:
        """Take a request.

        Args:
          prompt: a text, or token ids.
          settings: how it is continued.

        Returns:
          What it gets, once the engine has taken it. To be closed, or used as a context
          manager, where it may not be read to its end.

        Raises:
          TypeError: if the prompt is neither.
          ValueError: if it or a setting is out of range; it is named.
          QueueFull: if as many requests wait as the engine lets wait.
          RuntimeError: if the engine is closed.
        """
        loop, engine = asyncio.get_running_loop(), self._engine
        config = engine.params.config
        # A long text takes milliseconds, which other readers need not wait for.
        ids = await loop.run_in_executor(
            None, encode_prompt, 0, prompt, engine.tokenizer, config
        )
        taken: asyncio.Future[None] = loop.create_future()
        reader = _Reader(loop, asyncio.Queue())
        self._send(lambda: self._admit(ids, settings, reader, taken))
        stream = AsyncStream(reader, self._cancel)
        try:
            await taken
        except BaseException:
            stream.close()
            raise
        return stream

    async def stream(
        self, prompt: str | Sequence[int], settings: Settings | None = None
    ) -> AsyncIterator[Piece]:
        """As `add`, as one asynchronous generator: who leaves it cancels the request.

        Args:
          prompt: a text, or token ids.
          settings: how it is continued.

        Yields:
          Pieces, the last of which has a `finish_reason`.

        Raises:
          RequestFailed: if the model yields NaN for the request.
          RuntimeError: if the engine is closed meanwhile, or fails.
        """
        async with await self.add(prompt, settings) as pieces:
            async for piece in pieces:
                yield piece

    def close(self) -> None:
        """End the engine, once its step has ended; all streams end with an error."""
        with contextlib.suppress(RuntimeError):
            self._send(self._stop, last=_CLOSED)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def _send(self, command: Callable[[], None], last: str = "") -> None:
        """Have the thread do something; what is taken here is carried out.

        Args:
          command: without arguments.
          last: why nothing is taken after it, if nothing is.

        Raises:
          RuntimeError: if nothing is taken any more.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError(self._closed)
            self._closed = last
            self._commands.put(command)

    def _cancel(self, reader: _Reader) -> None:
        def cancel() -> None:
            if reader.request is not None:
                self._engine.cancel(reader.request)

        with contextlib.suppress(RuntimeError):  # closed: it has been cancelled
            self._send(cancel)

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
        except Exception as error:  # what became of the arrays is not known
            failure = error
        with self._lock:
            self._closed = self._closed or f"the engine failed: {failure}"
        if failure is not None:
            self._fail(failure)
        self._engine.close()
        self._deliver()
        while not self._commands.empty():  # of before it failed: they are refused
            self._commands.get()()

    def _obey(self) -> None:
        """Carry out what was asked for; wait for it where there is nothing else."""
        while self._going and (self._engine.idle or not self._commands.empty()):
            self._commands.get()()

    def _fail(self, error: Exception) -> None:
        """Let every reader know why there is no more."""
        for reader in self._readers.values():
            told = RuntimeError(f"the engine failed: {error}")
            told.__cause__ = error
            self._hand_over(reader.loop, [(reader, told)])
        self._readers.clear()

    def _admit(
        self,
        ids: list[int],
        settings: Settings | None,
        reader: _Reader,
        taken: asyncio.Future[None],
    ) -> None:
        error = None
        try:
            reader.request = request = self._engine.add(ids, settings)
        except Exception as why:
            error = why
        else:
            request.inbox = self._inbox
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
            except (RequestFailed, RuntimeError) as error:
                item = error
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


_News = tuple[_Reader, Piece | Exception]
