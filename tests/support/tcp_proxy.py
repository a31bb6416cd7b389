"""A link between a client and a server that a test can cut, freeze, slow down, half-open, corrupt, or rob of answers.

It lives in a thread of its own, so that tests with and without an event loop can use it, and other processes
can connect to it.
"""

import asyncio
import threading
from collections.abc import Callable
from enum import Enum
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 64 * 1024
_GARBAGE = b"\xff" * 9  # over the beginning of a chunk: no protocol here takes it for a header of its own


class Link(Enum):
    """What the link does with bytes."""

    FORWARD = "forward"
    FROZEN = "frozen"  # nothing moves either way; bytes wait, as behind a dead switch, and go on afterwards
    SWALLOW_ANSWERS = "swallow answers"  # requests arrive, answers are lost; those connections end afterwards
    CUT = "cut"  # all connections are reset, new ones are refused by closing
    SLOW = "slow"  # every chunk is late
    HALF_OPEN = "half open"  # the server's ends are reset, the client's stay open and nobody hears them
    CORRUPT = "corrupt"  # the beginning of every chunk is overwritten, both ways


class TcpProxy:
    """Listens on ``listen``, by default a free port of 127.0.0.1, and passes everything to ``target`` ("host:port")."""

    def __init__(self, target: str, *, listen: str = "127.0.0.1:0") -> None:
        self._listen = listen
        self._delay_s = 0.0
        self._whole = asyncio.Event()  # set unless half open
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._link = Link.FORWARD
        self._loop = asyncio.new_event_loop()
        self._moving = asyncio.Event()  # set unless frozen
        self._writers: set[asyncio.StreamWriter] = set()
        self._lossy: set[asyncio.StreamWriter] = set()  # of connections that have lost an answer
        self._onward: set[asyncio.StreamWriter] = set()  # towards the server
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp proxy", daemon=True)
        self.endpoint = ""
        self.chunks_corrupted = 0
        self.answers_lost = 0  # bytes swallowed; what a test asserts to know that its fault really struck

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def forward(self) -> None:
        self._set(Link.FORWARD)

    def freeze(self) -> None:
        self._set(Link.FROZEN)

    def swallow_answers(self) -> None:
        self._set(Link.SWALLOW_ANSWERS)

    def cut(self) -> None:
        self._set(Link.CUT)

    def slow_down(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._set(Link.SLOW)

    def half_open(self) -> None:
        self._set(Link.HALF_OPEN)

    def corrupt(self) -> None:
        self._set(Link.CORRUPT)

    def reset_connections(self) -> None:
        """Break the connections of this moment; new ones pass."""
        self._run(lambda: self._abort(self._writers))

    # -- inside the proxy's thread -------------------------------------------------------------------

    def _run(self, action: Callable[[], None]) -> None:
        async def act() -> None:
            action()

        asyncio.run_coroutine_threadsafe(act(), self._loop).result()

    def _set(self, link: Link) -> None:
        self._run(lambda: self._switch(link))

    def _switch(self, link: Link) -> None:
        self._link = link
        if link is not Link.SWALLOW_ANSWERS:
            self._abort(self._lossy)  # a stream with a hole in it must not go on
        if link is Link.HALF_OPEN:
            self._whole.clear()
            self._abort(self._onward)
        else:
            self._whole.set()
        if link is Link.CUT:
            self._abort(self._writers)
        if link is Link.FROZEN:
            self._moving.clear()
        else:
            self._moving.set()

    def _abort(self, writers: set[asyncio.StreamWriter]) -> None:
        for writer in list(writers):
            writer.transport.abort()

    async def _open(self) -> None:
        self._moving.set()
        self._whole.set()
        host, _, port = self._listen.rpartition(":")
        self._server = await asyncio.start_server(self._accept, host, int(port))
        self.endpoint = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        self._whole.set()
        self._abort(self._writers)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        onward: asyncio.StreamWriter | None = None
        try:
            if self._link is Link.CUT:
                return
            await self._moving.wait()
            if self._link is Link.HALF_OPEN:
                return
            answers, onward = await asyncio.open_connection(*self._target)
            self._writers.add(onward)
            self._onward.add(onward)
            await asyncio.gather(
                self._pump(reader, onward, is_answer=False), self._pump(answers, writer, is_answer=True)
            )
        except OSError:
            pass  # one side has ended the connection: so does the other, below
        except asyncio.CancelledError:
            pass  # the proxy closes, and asyncio would log each connection that it had
        finally:
            if onward is not None:
                self._end(onward)
            try:
                await self._whole.wait()
            finally:
                self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        for known in (self._writers, self._lossy, self._onward):
            known.discard(writer)
        writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            await self._moving.wait()
            if is_answer and self._link is Link.SWALLOW_ANSWERS:
                self.answers_lost += len(chunk)
                self._lossy.add(writer)
                continue
            if self._link is Link.SLOW:
                await asyncio.sleep(self._delay_s)
            if self._link is Link.CORRUPT:
                chunk = (_GARBAGE + chunk[len(_GARBAGE) :])[: len(chunk)]
                self.chunks_corrupted += 1
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError("one side has closed")
