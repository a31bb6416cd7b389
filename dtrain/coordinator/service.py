"""The coordinator process: campaign, replay, lead, and again when deposed.

Nothing survives from one leadership to the next but the etcd client and the listening port, so a deposed
leader that wins again starts from the log like anyone else.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from dataclasses import dataclass

import grpc.aio

from dtrain.common.errors import InvariantError, RetryableError, UserError
from dtrain.common.names import JobName, WorkerId
from dtrain.coordinator.core.commands import Command
from dtrain.coordinator.core.effects import Effect
from dtrain.coordinator.core.states import JobState
from dtrain.coordinator.effects import EffectRunner
from dtrain.coordinator.election import LEASE_TTL_S, LeaderRecord, Leadership, campaign, started_now, this_process
from dtrain.coordinator.log import Deposed, EventLog, replay
from dtrain.coordinator.loop import LeaderLoop
from dtrain.coordinator.rpc.agents import AgentStreams
from dtrain.coordinator.rpc.jobs import JobRequests
from dtrain.coordinator.workers import follow_registrations
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import Compacted
from dtrain.proto import MESSAGE_MAX_BYTES, agent_pb2_grpc

logger = logging.getLogger(__name__)

_REPLAY_RETRY_S = 0.5
_LOOK_S = 1.0  # between two looks at whether any worker reaches this leader
_AWAY_S = 3 * LEASE_TTL_S  # how long one that none reaches lets others lead, who ask every few seconds
_STOP_GRACE_S = 0.5  # for answers under way when the process is asked to end
_SERVER_OPTIONS = (
    # Workers ping every few seconds to notice a dead link; gRPC's server would call that abuse by default.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
    ("grpc.so_reuseport", 0),  # a second coordinator on the same port must fail, not share it
)
_ANY_HOST = ("0.0.0.0", "::", "[::]", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """What `dtrain coordinator` is told."""

    etcd: tuple[str, ...]  # host:port of each member
    listen: str  # host:port; port 0 takes a free one
    prefix: str = "/dtrain"
    identity: str = ""  # for people; host:port if empty
    advertise: str = ""  # host under which workers and people reach it; of `listen` if empty


@dataclass(slots=True, kw_only=True)
class _Outbox:
    """The loop's outbox: commands to the streams, effects to the runner."""

    streams: AgentStreams
    effects: EffectRunner | None = None

    def send(self, worker: WorkerId, commands: list[Command]) -> None:
        self.streams.send(worker, commands)

    def perform(self, effects: list[Effect]) -> None:
        assert self.effects is not None
        self.effects.perform(effects)


class Unreached(Exception):
    """No worker reaches this leader, though some are there."""


class Coordinator:
    """One coordinator process."""

    def __init__(self, config: CoordinatorConfig, client: EtcdClient) -> None:
        self._config = config
        self._client = client
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        host, _, port = config.listen.rpartition(":")
        try:
            bound = self._server.add_insecure_port(config.listen)
        except RuntimeError as error:
            raise UserError(
                f"cannot listen on {config.listen}: choose a free port with --listen {host or '127.0.0.1'}:PORT, "
                "or port 0 for any."
            ) from error
        reachable = config.advertise or (socket.gethostname() if host in _ANY_HOST else host)
        self.address = f"{reachable}:{bound or port}"
        self.identity = config.identity or self.address
        self._streams = AgentStreams(self.identity)
        self._requests = JobRequests(self.identity)
        agent_pb2_grpc.add_AgentsServicer_to_server(self._streams, self._server)
        agent_pb2_grpc.add_JobsServicer_to_server(self._requests, self._server)

    async def run(self) -> None:
        """Campaign and lead for ever. Raises LogDamagedError or InvariantError when going on would be wrong."""
        await self._server.start()
        logger.info("coordinator %s listens on %s", self.identity, self.address)
        record = LeaderRecord(id=self.identity, address=self.address, started=started_now(), process=this_process())
        while True:
            leadership = await campaign(self._client, self._config.prefix, record)
            away_s = 0.0
            try:
                await self._lead(leadership)
            except Deposed as error:
                logger.warning("deposed: %s", error)
            except Unreached:
                logger.warning(
                    "no worker reaches %s, though some are registered: another coordinator may lead. "
                    "Look at --advertise, and at what stands between them and this port",
                    self.address,
                )
                away_s = _AWAY_S
            finally:
                self._streams.follow()
                self._requests.follow()
                await leadership.resign()
            await asyncio.sleep(away_s)

    async def close(self) -> None:
        await self._server.stop(_STOP_GRACE_S)

    async def _lead(self, leadership: Leadership) -> None:
        jobs = await _replay_while_leading(self._client, self._config.prefix, leadership)
        logger.info("leading in term %d with %d jobs replayed", leadership.term, len(jobs))
        outbox = _Outbox(streams=self._streams)
        loop = LeaderLoop(log=EventLog(self._client, leadership), prefix=self._config.prefix, jobs=jobs, outbox=outbox)
        outbox.effects = EffectRunner(loop.tell, loop.owes)
        self._streams.lead(loop)
        self._requests.lead(loop)
        tasks = [
            asyncio.create_task(loop.run(), name="leader loop"),
            asyncio.create_task(leadership.lost(), name="leadership"),
            asyncio.create_task(follow_registrations(self._client, self._config.prefix, loop.tell), name="workers"),
            asyncio.create_task(_until_unreached(loop), name="reach"),
        ]
        try:
            waiting = {*tasks, outbox.effects.failed}
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what ended it
            raise Deposed(f"the lease of term {leadership.term} is over")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await outbox.effects.close()


async def _until_unreached(loop: LeaderLoop) -> None:
    """Raise Unreached once no worker reaches this leader any more."""
    while not loop.observed.unreached(time.monotonic()):
        await asyncio.sleep(_LOOK_S)
    raise Unreached


async def _replay_while_leading(client: EtcdClient, prefix: str, leadership: Leadership) -> dict[JobName, JobState]:
    """The whole log, folded. Raises Deposed as soon as the lease is gone, however far the replay is."""
    replaying = asyncio.create_task(_replay_at_last(client, prefix), name="replay")
    deposed = asyncio.create_task(leadership.lost(), name="leadership")
    try:
        await asyncio.wait({replaying, deposed}, return_when=asyncio.FIRST_COMPLETED)
        if replaying.done():
            jobs = replaying.result()  # raises what ended it
            if leadership.alive():
                return jobs
        raise Deposed(f"the lease of term {leadership.term} ended before the log was replayed")
    finally:
        for task in (replaying, deposed):
            task.cancel()
        await asyncio.gather(replaying, deposed, return_exceptions=True)


async def _replay_at_last(client: EtcdClient, prefix: str) -> dict[JobName, JobState]:
    while True:
        try:
            return await replay(client, prefix)
        except (RetryableError, Compacted) as error:  # Compacted: between two pages of what it reads
            logger.warning("replay is tried again: %s", error)
            await asyncio.sleep(_REPLAY_RETRY_S)


async def serve(config: CoordinatorConfig) -> int:
    """Run a coordinator until SIGTERM or SIGINT; return the process's exit code.

    Raises UserError for what a person can mend, LogDamagedError when a log must not be trusted.
    """
    async with EtcdClient(config.etcd) as client:
        coordinator = Coordinator(config, client)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        running = asyncio.create_task(coordinator.run(), name="coordinator")
        stopping = asyncio.create_task(stop.wait(), name="signal")
        try:
            await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
                raise InvariantError("the coordinator ended without a reason")
        finally:
            stopping.cancel()
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(running, return_exceptions=True)
            await coordinator.close()
    return 0
