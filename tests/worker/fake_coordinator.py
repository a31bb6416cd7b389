"""A coordinator for tests of the agent: the real wire, a real leader key, and no mind of its own."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Self

import grpc
import grpc.aio

from dtrain.etcd.client import EtcdClient
from dtrain.proto import agent_pb2 as wire
from dtrain.proto.agent_pb2_grpc import AgentsServicer, add_AgentsServicer_to_server

DEADLINE_S = 30.0


class FakeCoordinator(AgentsServicer):
    """Runs in a thread of its own; keeps every snapshot that it was sent."""

    def __init__(self, endpoint: str, *, prefix: str = "/dtrain") -> None:
        self._endpoint = endpoint
        self._key = f"{prefix}/leader"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._outboxes: list[asyncio.Queue[wire.CoordinatorMessage | None]] = []
        self._server: grpc.aio.Server | None = None
        self._refusing = False
        self.snapshots: list[wire.Snapshot] = []
        self.term = 0
        self.streams = 0
        self.address = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        add_AgentsServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        await self._lead()

    async def _lead(self) -> None:
        async with EtcdClient([self._endpoint]) as etcd:
            await etcd.delete(self._key)
            value = json.dumps({"leader": "fake", "address": self.address}).encode()
            self.term = await etcd.put(self._key, value)

    async def _stop(self) -> None:
        assert self._server is not None
        await self._server.stop(0)

    def lead_again(self) -> None:
        """Win another election: a higher term."""
        self._do(self._lead())

    def drop_streams(self) -> None:
        """End every open stream, as a coordinator that stops does."""

        def end() -> None:
            for outbox in self._outboxes:
                outbox.put_nowait(None)

        self._loop.call_soon_threadsafe(end)

    def refuse_streams(self) -> None:
        self._refusing = True
        self.drop_streams()

    def accept_streams(self) -> None:
        self._refusing = False

    async def Attend(self, request_iterator: AsyncIterator[wire.Snapshot], context: Any) -> AsyncIterator[Any]:
        if self._refusing:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this coordinator does not lead")
        outbox: asyncio.Queue[wire.CoordinatorMessage | None] = asyncio.Queue()
        self._outboxes.append(outbox)
        self.streams += 1
        reader = asyncio.ensure_future(self._read(request_iterator))
        try:
            yield wire.CoordinatorMessage(term=self.term, welcome=wire.Welcome(leader="fake"))
            while (message := await outbox.get()) is not None:
                yield message
        finally:
            self._outboxes.remove(outbox)
            reader.cancel()

    async def _read(self, snapshots: AsyncIterator[wire.Snapshot]) -> None:
        async for snapshot in snapshots:
            self.snapshots.append(snapshot)

    def send(self, command: wire.Command, *, term: int | None = None) -> None:
        """Send a command on every open stream."""
        message = wire.CoordinatorMessage(term=self.term if term is None else term, command=command)

        def put() -> None:
            for outbox in self._outboxes:
                outbox.put_nowait(message)

        self._loop.call_soon_threadsafe(put)

    @property
    def connected(self) -> bool:
        return bool(self._outboxes)

    @property
    def latest(self) -> wire.Snapshot | None:
        return self.snapshots[-1] if self.snapshots else None
