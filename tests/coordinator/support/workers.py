"""A worker spoken by hand: it attends whoever leads and does with its ranks what the test says.

It keeps its promises as an agent does (a repeated command does nothing twice, its snapshots show everything),
but it has no trainers: progress, shards and exits are the test's words.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
import msgspec

from dtrain.coordinator.election import read_leader
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.registrations import keep_registered
from dtrain.proto import agent_pb2 as wire
from dtrain.proto import agent_pb2_grpc
from dtrain.storage.objects import ObjectStore
from tests.coordinator.support.clusters import PREFIX
from tests.support.checkpoints import put_shard

DEADLINE_S = 60.0
HEARTBEAT_S = 0.3
RETRY_S = 0.05
LEASE_TTL_S = 5.0


class HandWorker:
    """Enter it to register and attend; ``until`` waits for what a message must have brought."""

    def __init__(self, client: EtcdClient, name: str = "w1", *, slots: int = 2) -> None:
        self._client = client
        self.state = wire.Snapshot(
            worker=name,
            journal=f"journal of {name}",
            incarnation="1",
            role="worker",
            version="0",
            host="127.0.0.1",
            address="127.0.0.1:1",
            slots=slots,
            rendezvous_port=29500,
        )
        self.received: list[tuple[int, str]] = []  # (term, command id) of every command, repetitions too
        self.commands: dict[str, wire.Command] = {}  # by id, the first of each
        self._dirty = asyncio.Event()
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        registration = {
            "worker": self.state.worker,
            "journal": self.state.journal,
            "address": self.state.address,
            "slots": self.state.slots,
        }
        value = msgspec.json.encode(registration)
        key = f"{PREFIX}/workers/{self.state.worker}"
        self._tasks = [
            asyncio.create_task(keep_registered(self._client, key, lambda: value, LEASE_TTL_S)),
            asyncio.create_task(self._attend_for_ever()),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until(self, fact: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not fact():
                self._news.clear()
                await self._news.wait()

    def taken(self, kind: str) -> list[wire.Command]:
        """The commands of this kind (start_trainers, ...), each once, in the order of their first coming."""
        return [command for command in self.commands.values() if command.WhichOneof("command") == kind]

    # -- what the test says ---------------------------------------------------------------------------

    @property
    def assignment(self) -> wire.Assignment:
        (held,) = self.state.assignments
        return held

    def trains(self, *, step: int, until: int = 0) -> None:
        for rank in self.assignment.ranks:
            rank.phase, rank.completed_step, rank.until_step = "training", step, until
            rank.tracking, rank.step_s = True, 0.1
        self.report()

    def stores(self, store: ObjectStore, data: Callable[[int], bytes]) -> None:
        """Upload every rank's shard of the newest attempt and acknowledge it."""
        command = self.taken("stage_checkpoint")[-1]
        stage = command.stage_checkpoint
        for shard in self.assignment.shards:
            if shard.attempt == stage.attempt:
                entry = put_shard(
                    store,
                    data(shard.rank),
                    shard.rank,
                    job=command.job,
                    checkpoint=stage.checkpoint,
                    attempt=stage.attempt,
                )
                shard.key, shard.size_bytes, shard.digest = entry.key, entry.size_bytes, entry.digest
                shard.index_key, shard.index_digest = entry.index_key, entry.index_digest
                shard.state = wire.ShardState.DURABLE
        self.report()

    def ends(self, code: int) -> None:
        for rank in self.assignment.ranks:
            rank.state, rank.exit_code, rank.phase = wire.RankState.EXITED, code, "finished"
        self.report()

    def report(self) -> None:
        self.state.number += 1
        self._dirty.set()

    # -- the wire -------------------------------------------------------------------------------------

    async def _attend_for_ever(self) -> None:
        while True:
            found = await read_leader(self._client, PREFIX)
            if found is not None:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async with grpc.aio.insecure_channel(found[0].address) as channel:
                        stub = agent_pb2_grpc.AgentsStub(channel)
                        async for message in stub.Attend(self._snapshots()):
                            self._take(message)
            await asyncio.sleep(RETRY_S)

    async def _snapshots(self) -> AsyncIterator[wire.Snapshot]:
        while True:
            self._dirty.clear()
            self.state.number += 1
            snapshot = wire.Snapshot()
            snapshot.CopyFrom(self.state)
            yield snapshot
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._dirty.wait(), HEARTBEAT_S)

    def _take(self, message: wire.CoordinatorMessage) -> None:
        self.state.term = max(self.state.term, message.term)
        if message.WhichOneof("message") == "command":
            command = message.command
            self.received.append((message.term, command.id))
            if command.id not in self.commands:
                self.commands[command.id] = command
                self._obey(command)
                done = wire.CommandStatus(id=command.id, state=wire.CommandState.DONE, term=message.term)
                self.state.commands.append(done)
            self.report()
        self._news.set()

    def _obey(self, command: wire.Command) -> None:
        match command.WhichOneof("command"):
            case "start_trainers":
                start = command.start_trainers
                del self.state.assignments[:]
                held = self.state.assignments.add(job=command.job, generation=command.generation)
                for rank in range(start.first_rank, start.first_rank + start.nproc):
                    held.ranks.add(rank=rank, state=wire.RankState.RUNNING, pid=1000 + rank, phase="starting")
            case "stage_checkpoint":
                stage = command.stage_checkpoint
                for report in self.assignment.ranks:
                    self.assignment.shards.add(
                        checkpoint=stage.checkpoint,
                        attempt=stage.attempt,
                        rank=report.rank,
                        step=stage.step,
                        state=wire.ShardState.REQUESTED,
                    )
            case "stop_trainers":
                del self.state.assignments[:]
            case _:
                pass  # Noop
        if self.state.assignments and command.position.seq > self.assignment.position.seq:
            self.assignment.position.CopyFrom(command.position)
