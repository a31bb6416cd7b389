"""The workers' streams: snapshots in, commands out.

What is owed to a worker is a level, held here as "the commands of the last round that are not sent yet on this
stream". A command is sent once a stream, and again after RESEND_S if it is still owed then, so a message that
got lost costs that long and a chatty worker is not flooded.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from dtrain.common.errors import DtrainError, UserError
from dtrain.common.names import WorkerId
from dtrain.coordinator.core.commands import Command
from dtrain.coordinator.core.facts import SnapshotReceived, StreamClosed
from dtrain.coordinator.loop import LeaderLoop
from dtrain.coordinator.rpc.convert import command_to_wire, snapshot_from_wire
from dtrain.proto import agent_pb2 as wire
from dtrain.proto import agent_pb2_grpc

logger = logging.getLogger(__name__)

RESEND_S = 2.0
NOT_LEADING = "this coordinator does not lead"


class WorkerStream:
    """The sending half of one worker's stream."""

    def __init__(self, worker: WorkerId, number: int, term: int) -> None:
        self.worker = worker
        self.number = number
        self._term = term
        self._owed: list[Command] = []
        self._sent_s: dict[str, float] = {}  # command id -> monotonic time of its last sending on this stream
        self._changed = asyncio.Event()
        self.closed = False

    def owe(self, commands: list[Command]) -> None:
        self._owed = commands
        self._sent_s = {c.id: self._sent_s[c.id] for c in commands if c.id in self._sent_s}
        self._changed.set()

    def close(self) -> None:
        self.closed = True
        self._changed.set()

    async def messages(self, leader: str) -> AsyncIterator[wire.CoordinatorMessage]:
        """Yield Welcome, a Noop whose acknowledgement shows that commands arrive, then commands as they are owed."""
        yield wire.CoordinatorMessage(term=self._term, welcome=wire.Welcome(leader=leader))
        noop = wire.Command(id=f"noop/t{self._term}/s{self.number}", noop=wire.Noop())
        yield wire.CoordinatorMessage(term=self._term, command=noop)
        while not self.closed:
            for command in self._due():
                self._sent_s[command.id] = time.monotonic()
                yield wire.CoordinatorMessage(term=self._term, command=command_to_wire(command))
            self._changed.clear()
            if self._due() or self.closed:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESEND_S):
                    await self._changed.wait()

    def _due(self) -> list[Command]:
        before_s = time.monotonic() - RESEND_S
        return [command for command in self._owed if self._sent_s.get(command.id, float("-inf")) <= before_s]


class AgentStreams(agent_pb2_grpc.AgentsServicer):
    """All open streams of the present leadership; refuses workers while there is none."""

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._loop: LeaderLoop | None = None
        self._streams: dict[WorkerId, WorkerStream] = {}
        self._numbers = itertools.count(1)

    def lead(self, loop: LeaderLoop) -> None:
        """Accept workers for this leadership."""
        self._loop = loop

    def follow(self) -> None:
        """Close all streams and refuse new ones: this process does not lead any more."""
        self._loop = None
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def send(self, worker: WorkerId, commands: list[Command]) -> None:
        """Replace what is owed to this worker."""
        stream = self._streams.get(worker)
        if stream is not None:
            stream.owe(commands)

    async def Attend(
        self,
        request_iterator: AsyncIterator[wire.Snapshot],
        context: grpc.aio.ServicerContext[wire.Snapshot, wire.CoordinatorMessage],
    ) -> AsyncIterator[wire.CoordinatorMessage]:
        loop = self._loop
        if loop is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, NOT_LEADING)
            return
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return
        try:
            snapshot = snapshot_from_wire(first)
        except (ValueError, UserError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            return
        if await loop.never_was(snapshot.term):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"worker {snapshot.worker} has seen term {snapshot.term}, which this etcd never gave: its data folder "
                "belongs to another etcd, or this etcd was restored from an old backup. Use a new --data-dir, or "
                "restore the newer etcd.",
            )
            return
        stream = WorkerStream(snapshot.worker, next(self._numbers), loop.term)
        older = self._streams.get(snapshot.worker)
        if older is not None:
            older.close()
        self._streams[snapshot.worker] = stream
        await loop.tell(SnapshotReceived(snapshot=snapshot, stream=stream.number))
        reader = asyncio.create_task(self._read(loop, stream, request_iterator), name=f"stream of {snapshot.worker}")
        try:
            async for message in stream.messages(self._identity):
                yield message
        finally:
            reader.cancel()
            if self._streams.get(snapshot.worker) is stream:
                del self._streams[snapshot.worker]
            if self._loop is loop:
                await loop.tell(StreamClosed(worker=snapshot.worker, stream=stream.number))

    async def _read(self, loop: LeaderLoop, stream: WorkerStream, requests: AsyncIterator[wire.Snapshot]) -> None:
        try:
            async for message in requests:
                if stream.closed or self._loop is not loop:
                    return
                snapshot = snapshot_from_wire(message)
                if snapshot.worker != stream.worker:
                    raise ValueError(f"it is worker {snapshot.worker}'s")
                if await loop.never_was(snapshot.term):
                    raise ValueError(f"it has seen term {snapshot.term}, which this etcd never gave")
                await loop.tell(SnapshotReceived(snapshot=snapshot, stream=stream.number))
        except (ValueError, DtrainError) as error:
            logger.error("worker %s sent a snapshot that cannot be taken: %s", stream.worker, error)
        finally:
            stream.close()
