"""The agent's stream to the coordinator: snapshots up, commands down, for as long as both live.

Rules:
- whatever happens to the stream, etcd or the coordinator, nothing here touches a trainer;
- every snapshot is whole, so a lost one costs nothing: changes that come faster than they can be sent are told
  by one snapshot;
- a leader whose term is lower than the highest seen, or than etcd told of it, is left: it was replaced and does not
  know it, or it was elected again and does not know that yet;
- a stream that is open but silent is no proof of life: keepalive pings end it within seconds.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

import grpc
import grpc.aio

from dtrain.common import failpoints
from dtrain.common.failpoints import Point
from dtrain.common.names import Term
from dtrain.proto import MESSAGE_MAX_BYTES
from dtrain.proto import agent_pb2 as wire
from dtrain.proto.agent_pb2_grpc import AgentsStub
from dtrain.worker.core.inputs import CommandReceived, CoordinatorSeen, TermSeen
from dtrain.worker.rpc.convert import BadCommandError, to_command
from dtrain.worker.rpc.leaders import Leader, Leaders

logger = logging.getLogger(__name__)

RECONNECT_FIRST_S = 0.05  # a coordinator that was restarted is back within tenths of a second
RECONNECT_MAX_S = 1.0
FLUSH_S = 1.0  # how long a leaving agent waits for its last snapshot to be taken
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.http2.ping_timeout_ms", 3000),  # the name that grpcio reads; a dead link is noticed in about 6 s
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # coordinators are inside the cluster
)

Emit = Callable[[TermSeen | CommandReceived | CoordinatorSeen], None]


class CoordinatorClient:
    """Keeps one stream to the newest leader."""

    def __init__(
        self,
        leaders: Leaders,
        emit: Emit,
        snapshot: Callable[[], wire.Snapshot],
        highest_term: Callable[[], Term],
        *,
        heartbeat_s: float,
    ) -> None:
        self._leaders = leaders
        self._emit = emit
        self._snapshot = snapshot
        self._highest_term = highest_term
        self._heartbeat_s = heartbeat_s
        self._changed = asyncio.Event()
        self._sent_all = asyncio.Event()
        self._attending = False

    def send_soon(self) -> None:
        """Something changed: the next snapshot need not wait for the heartbeat."""
        self._changed.set()
        self._sent_all.clear()

    async def flush(self) -> None:
        """Wait, for a bounded time, until the newest state was sent."""
        if self._attending:
            self.send_soon()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self._sent_all.wait()

    async def run(self) -> None:
        """Attend the newest leader until cancelled."""
        pause_s = RECONNECT_FIRST_S
        while True:
            leader = self._leaders.current
            self._leaders.changed.clear()
            if leader is not None and leader.term >= self._highest_term():
                welcomed = await self._until_replaced(leader)
                pause_s = RECONNECT_FIRST_S if welcomed else min(pause_s * 2, RECONNECT_MAX_S)
            with contextlib.suppress(TimeoutError):  # a new leader is tried at once
                async with asyncio.timeout(pause_s * (0.5 + random.random())):
                    await self._leaders.changed.wait()

    async def _until_replaced(self, leader: Leader) -> bool:
        """Attend ``leader`` until the stream ends or etcd tells of another; return whether it welcomed us."""
        attending = asyncio.create_task(self._attend(leader))
        replaced = asyncio.create_task(self._leaders.changed.wait())
        try:
            await asyncio.wait({attending, replaced}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            replaced.cancel()
            if not attending.done():
                attending.cancel()
            await asyncio.wait({attending})
        return not attending.cancelled() and attending.result()

    async def _attend(self, leader: Leader) -> bool:
        """Hold one stream until it ends; return whether the leader welcomed us."""
        welcomed = asyncio.Event()
        async with grpc.aio.insecure_channel(leader.address, options=CHANNEL_OPTIONS) as channel:
            stream = AgentsStub(channel).Attend()
            sending = asyncio.create_task(self._send(stream, welcomed))
            sending.add_done_callback(lambda _: stream.cancel())  # nobody listens to a worker that cannot speak
            try:
                async for message in stream:
                    if not self._take(message, leader, welcomed):
                        break
            except grpc.aio.AioRpcError as error:
                logger.info("the stream to %s ended: %s %s", leader.address, error.code().name, error.details())
            finally:
                self._attending = False
                sending.cancel()
                stream.cancel()
                with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await sending
        return welcomed.is_set()

    async def _send(
        self, stream: "grpc.aio.StreamStreamCall[wire.Snapshot, wire.CoordinatorMessage]", welcomed: asyncio.Event
    ) -> None:
        while True:
            self._changed.clear()
            snapshot = self._snapshot()
            acknowledges = any(s.state == wire.DURABLE for a in snapshot.assignments for s in a.shards)
            if acknowledges:
                failpoints.hit(Point.ACK_BEFORE)
            await stream.write(snapshot)
            if acknowledges:
                failpoints.hit(Point.ACK_AFTER)
            self._attending = True
            if not self._changed.is_set():
                self._sent_all.set()
            if welcomed.is_set():
                self._emit(CoordinatorSeen())  # pings keep telling that it lives, though it may have nothing to say
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._changed.wait()

    def _take(self, message: wire.CoordinatorMessage, leader: Leader, welcomed: asyncio.Event) -> bool:
        """Hand one message on; return False if its sender is to be left."""
        if message.WhichOneof("message") == "welcome":
            if message.term < max(leader.term, self._highest_term()):
                logger.warning("left %s: its term %d is over", message.welcome.leader, message.term)
                return False
            welcomed.set()
            self._emit(TermSeen(term=Term(message.term)))
            return True
        try:
            self._emit(to_command(message.term, message.command))
        except BadCommandError as error:
            logger.warning("a command was not understood: %s", error)
        return True
