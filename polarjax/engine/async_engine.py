"""An engine with a thread of its own, for any number of readers in event loops.

Readers never call the engine: `polarjax.engine.driver` does, in its thread. Prompts and
settings are checked where they come from, before the thread hears of them.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Sequence

from polarjax.engine.checks import Settings
from polarjax.engine.driver import Driver, Reader
from polarjax.engine.engine import Engine
from polarjax.engine.request import Piece
from polarjax.storage.quoted import quoted


class AsyncStream:
    """An asynchronous iterator of what a request gets; the last piece has a reason.

    A reader that does not read holds up nobody: its pieces wait for it, at most
    `max_new_tokens` tokens of them. A wait that is given up (`asyncio.wait_for`) loses
    no piece. As a context manager it cancels the request at the end, and so it does
    when nobody holds it any more. It is for one task at a time, of one event loop.

    Args:
      reader: that the engine's thread fills.
      served: whose it is, and which lives as long as it does.
    """

    def __init__(self, reader: Reader, served: AsyncEngine):
        self._reader, self._served = reader, served
        self._ended = self._being_read = False

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        """The next piece.

        Raises:
          RequestFailed: if the model yields NaN for the request.
          RuntimeError: if the engine was closed, or failed; or another task waits for
            the next piece already, or this one runs in another event loop than `add`
            did.
        """
        if self._ended:
            raise StopAsyncIteration
        if asyncio.get_running_loop() is not self._reader.loop:
            raise RuntimeError(
                "this stream belongs to the event loop in which it was added: read it "
                "there, or add the request in this one"
            )
        if self._being_read:
            raise RuntimeError(
                "this stream is being read already, and each of its pieces is for one "
                "reader: let one task read it, and hand on what it gets"
            )
        self._being_read = True
        try:
            item = await self._reader.items.get()
            # Closed meanwhile: nothing is wanted but that it ends.
            while self._ended and isinstance(item, Piece) and not item.finish_reason:
                item = await self._reader.items.get()
        finally:
            self._being_read = False
        if isinstance(item, Exception):
            self._ended = True
            raise item
        self._ended = self._ended or bool(item.finish_reason)
        return item

    def close(self) -> None:
        """Cancel the request, if it goes on: within one step.

        A task that waits for a piece gets the last one, whose reason is "cancelled";
        who asks for one later gets none.
        """
        if not self._ended:
            self._ended = True
            self._served._driver.cancel(self._reader)

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

    It is closed when nobody holds it nor a stream of it any more, and when the process
    ends.

    Args:
      engine: which nobody else may call from now on. It ends with this one.

    Raises:
      TypeError: if it is no `polarjax.Engine`.
      ValueError: if its mesh spans several processes, which would have to be told the
        same at the same steps.
      RuntimeError: if it is closed, another `AsyncEngine` has it, or requests of it go
        on.
    """

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be a polarjax.Engine, got {quoted(engine)}")
        if engine.mesh is not None and engine.mesh.is_multi_process:
            raise ValueError(
                "AsyncEngine takes an engine of one process, this one's mesh spans "
                "several: call its generate on all of them"
            )
        self._driver = Driver(engine)
        # Not waited for: garbage is collected in any thread, the engine's as well. When
        # the process ends, the driver sees to itself.
        weakref.finalize(self, self._driver.stop).atexit = False

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
        loop, driver = asyncio.get_running_loop(), self._driver
        driver.check_takes()  # before long work
        # A long text takes a while, which neither this loop nor the engine waits for.
        request = await loop.run_in_executor(None, driver.prepare, prompt, settings)
        taken: asyncio.Future[None] = loop.create_future()
        reader = Reader(loop, asyncio.Queue())
        driver.admit(request, reader, taken)
        stream = AsyncStream(reader, self)
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
        self._driver.close()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._driver.stop()  # also if no thread is free to wait for it
        await asyncio.get_running_loop().run_in_executor(None, self.close)
