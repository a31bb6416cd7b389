"""A coordinator process, a worker spoken by hand and a store: and the steps of a whole job on them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName
from dtrain.coordinator.election import read_leader
from dtrain.coordinator.history import read_history
from dtrain.etcd.client import EtcdClient
from dtrain.proto import agent_pb2 as wire
from dtrain.proto import agent_pb2_grpc
from dtrain.storage.keys import manifest_key, marker_key
from dtrain.storage.local import LocalFolder
from dtrain.storage.manifests import decode_manifest, decode_marker
from tests.coordinator.support.clusters import PREFIX
from tests.coordinator.support.processes import CoordinatorProcess
from tests.coordinator.support.workers import DEADLINE_S, RETRY_S, HandWorker
from tests.support.checkpoints import shard_of
from tests.support.etcd_server import EtcdServer

MNIST = JobName("mnist")
ONE, FIRST = CheckpointNumber(1), AttemptNumber(1)
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a test of this file stands on."""

    client: EtcdClient
    coordinator: CoordinatorProcess
    worker: HandWorker
    store: LocalFolder

    async def asks(self, method: str, request: Any) -> Any:
        """Ask whoever leads, and again while nobody does. Other refusals are raised."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                found = await read_leader(self.client, PREFIX)
                if found is not None:
                    try:
                        async with grpc.aio.insecure_channel(found[0].address) as channel:
                            return await getattr(agent_pb2_grpc.JobsStub(channel), method)(request)
                    except grpc.aio.AioRpcError as error:
                        if error.code() not in PASSING:
                            raise
                await asyncio.sleep(RETRY_S)

    async def submits(self, **changes: Any) -> wire.SubmitReply:
        spec = {
            "name": MNIST, "python": "python", "script": "/train.py", "cwd": "/", "nnodes_min": 1, "nnodes_max": 1,
            "nproc_per_node": 2, "max_restarts": 3, "store": self.store.uri,
        }  # fmt: skip
        reply = await self.asks("Submit", wire.SubmitRequest(spec=wire.Spec(**{**spec, **changes}), request="r1"))
        assert isinstance(reply, wire.SubmitReply)
        return reply

    async def history(self) -> list[str]:
        return [event.type for event in await read_history(self.client, PREFIX, MNIST)]

    async def until_decided(self, event: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while event not in await self.history():
                await asyncio.sleep(RETRY_S)


@contextlib.asynccontextmanager
async def a_stage(etcd: EtcdServer, folder: Path) -> AsyncIterator[Stage]:
    store = LocalFolder(folder / "store")
    with CoordinatorProcess(etcd.endpoint, folder) as coordinator:
        async with EtcdClient([etcd.endpoint]) as client, HandWorker(client) as worker:
            yield Stage(client=client, coordinator=coordinator, worker=worker, store=store)


def on_a_stage(etcd: EtcdServer, folder: Path, play: Callable[[Stage], Awaitable[None]]) -> None:
    async def run() -> None:
        async with a_stage(etcd, folder) as stage:
            await play(stage)

    asyncio.run(run())


# -- a whole job --------------------------------------------------------------------------------------


async def submit(stage: Stage) -> None:
    await stage.submits()


async def submitted(stage: Stage) -> None:
    await stage.worker.until(lambda: bool(stage.worker.taken("start_trainers")))
    (command,) = stage.worker.taken("start_trainers")
    assert (command.id, command.start_trainers.world_size) == ("mnist/g1/start", 2)
    assert not command.start_trainers.HasField("restore")


async def ask_for_checkpoint(stage: Stage) -> None:
    stage.worker.trains(step=10)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                reply = await stage.asks("Checkpoint", wire.CheckpointRequest(job=MNIST, request="c1"))
                break
            except grpc.aio.AioRpcError as refusal:  # until the snapshot above has arrived
                assert "cannot be checkpointed right now" in str(refusal.details())
                await asyncio.sleep(RETRY_S)
    assert reply.step > 10


def shard_of_rank(rank: int) -> bytes:
    return shard_of(b"state of rank %d" % rank, rank=rank, world_size=2, step=11)


async def asked_for_checkpoint(stage: Stage) -> None:
    await stage.worker.until(lambda: bool(stage.worker.taken("stage_checkpoint")))


async def acknowledge(stage: Stage) -> None:
    stage.worker.trains(step=stage.worker.taken("stage_checkpoint")[-1].stage_checkpoint.step)
    stage.worker.stores(stage.store, shard_of_rank)


async def acknowledged(stage: Stage) -> None:
    await stage.until_decided("CheckpointCommitted")
    manifest = decode_manifest(stage.store.get(manifest_key(MNIST, ONE, FIRST)))
    assert [shard.size_bytes for shard in manifest.shards] == [len(shard_of_rank(rank)) for rank in (0, 1)]


async def wait_for_nothing(stage: Stage) -> None:
    pass


async def marked(stage: Stage) -> None:
    await stage.until_decided("CheckpointMarked")
    marker = decode_marker(stage.store.get(marker_key(MNIST, ONE)))
    events = await read_history(stage.client, PREFIX, MNIST)
    assert events[marker.position_seq - 1].type == "CheckpointCommitted"
    assert events[marker.position_seq - 1].digest == marker.position_digest


async def finish(stage: Stage) -> None:
    stage.worker.ends(0)


async def finished(stage: Stage) -> None:
    await stage.until_decided("JobSucceeded")
    await stage.worker.until(lambda: bool(stage.worker.taken("stop_trainers")))


# Each step: what the test does, and what must come of it.
STEPS = [
    (submit, submitted),
    (ask_for_checkpoint, asked_for_checkpoint),
    (acknowledge, acknowledged),
    (wait_for_nothing, marked),
    (finish, finished),
]
