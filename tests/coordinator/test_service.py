"""Real coordinator processes, a worker spoken by hand: a whole job, with the coordinator killed at any point."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName
from dtrain.coordinator.election import LEASE_TTL_S, read_leader
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

    async def until_stored(self, key: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.store.head(key) is None:
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


async def asked_for_checkpoint(stage: Stage) -> None:
    await stage.worker.until(lambda: bool(stage.worker.taken("stage_checkpoint")))


async def acknowledge(stage: Stage) -> None:
    stage.worker.trains(step=stage.worker.taken("stage_checkpoint")[-1].stage_checkpoint.step)
    stage.worker.stores(stage.store, lambda rank: b"shard of rank %d" % rank)


async def acknowledged(stage: Stage) -> None:
    await stage.until_decided("CheckpointCommitted")
    manifest = decode_manifest(stage.store.get(manifest_key(MNIST, ONE, FIRST)))
    assert [shard.size_bytes for shard in manifest.shards] == [15, 15]


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
KILLS = [None, *(f"{when} {act.__name__}" for act, _ in STEPS for when in ("before", "at"))]


@pytest.mark.parametrize("kill", KILLS)
def test_a_whole_job_goes_on_wherever_the_coordinator_is_killed(
    etcd: EtcdServer, tmp_path: Path, kill: str | None
) -> None:
    async def play(stage: Stage) -> None:
        for act, outcome in STEPS:
            if kill == f"before {act.__name__}":
                stage.coordinator.kill()
                stage.coordinator.start()
            await act(stage)
            if kill == f"at {act.__name__}":
                stage.coordinator.kill()
                stage.coordinator.start()
            await outcome(stage)
        types = await stage.history()
        assert types == [
            "JobSubmitted", "GenerationStarted", "CheckpointStarted", "CheckpointCommitted", "CheckpointMarked",
            "JobSucceeded",
        ]  # fmt: skip
        assert len(stage.worker.taken("start_trainers")) == 1
        assert len(stage.worker.taken("stage_checkpoint")) == 1

    on_a_stage(etcd, tmp_path, play)


def test_commands_carry_the_log_position_they_come_from(etcd: EtcdServer, tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        await submitted(stage)
        (command,) = stage.worker.taken("start_trainers")
        event = (await read_history(stage.client, PREFIX, MNIST))[command.position.seq - 1]
        assert (event.type, event.digest) == ("GenerationStarted", command.position.digest)

    on_a_stage(etcd, tmp_path, play)


def test_a_worker_that_answers_nothing_is_told_again_and_a_noop_shows_that_commands_arrive(
    etcd: EtcdServer, tmp_path: Path
) -> None:
    async def play(stage: Stage) -> None:
        await stage.worker.until(lambda: any(each.startswith("noop/") for _, each in stage.worker.received))
        stage.worker._obey = lambda command: None  # type: ignore[method-assign]
        stage.worker.state.ClearField("commands")
        stage.worker.commands["mnist/g1/start"] = wire.Command()  # as if known: not acknowledged
        await submit(stage)
        await stage.worker.until(lambda: [each for _, each in stage.worker.received].count("mnist/g1/start") >= 2)

    on_a_stage(etcd, tmp_path, play)


# -- leaders ------------------------------------------------------------------------------------------


def test_a_standby_takes_over_from_a_killed_leader_and_finishes_the_job(etcd: EtcdServer, tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        await submitted(stage)
        first = await read_leader(stage.client, PREFIX)
        assert first is not None and first[0].id == "coordinator"
        with CoordinatorProcess(etcd.endpoint, tmp_path, "standby") as standby:
            await until_said(standby, "listens on")
            await ask_for_checkpoint(stage)
            stage.coordinator.kill()
            await asked_for_checkpoint(stage)
            for act, outcome in STEPS[2:]:
                await act(stage)
                await outcome(stage)
            second = await read_leader(stage.client, PREFIX)
            assert second is not None and second[0].id == "standby"
            assert second[1] > first[1]
        terms = [event.term for event in await read_history(stage.client, PREFIX, MNIST)]
        assert terms == sorted(terms) and set(terms) == {first[1], second[1]}

    on_a_stage(etcd, tmp_path, play)


async def until_said(process: CoordinatorProcess, words: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while words not in process.said():
            await asyncio.sleep(RETRY_S)


def test_a_leader_that_was_paused_beyond_its_lease_appends_nothing_when_it_wakes(
    etcd: EtcdServer, tmp_path: Path
) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        await submitted(stage)
        with CoordinatorProcess(etcd.endpoint, tmp_path, "standby") as standby:
            await until_said(standby, "listens on")
            stage.coordinator.pause()
            await until_said(standby, "leading in term")
            before = await read_leader(stage.client, PREFIX)
            assert before is not None
            stage.coordinator.resume()
            await until_said(stage.coordinator, "deposed")
            for act, outcome in STEPS[1:]:
                await act(stage)
                await outcome(stage)
            terms = [event.term for event in await read_history(stage.client, PREFIX, MNIST)]
            assert terms == sorted(terms) and terms[-1] == before[1]
            assert stage.coordinator.alive(), "a deposed leader stands by"
            assert (await stage.history()).count("GenerationStarted") == 1

    on_a_stage(etcd, tmp_path, play)


def test_a_coordinator_that_is_asked_to_end_gives_its_key_back(etcd: EtcdServer, tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        assert stage.coordinator.terminate() == 0
        assert await read_leader(stage.client, PREFIX) is None, f"it is there for another {LEASE_TTL_S} s"

    on_a_stage(etcd, tmp_path, play)


# -- a log that lost its end --------------------------------------------------------------------------


def test_a_worker_that_has_seen_more_of_the_log_than_there_is_stops_the_coordinator(
    etcd: EtcdServer, tmp_path: Path
) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        await submitted(stage)
        stage.worker.assignment.position.seq = 99
        stage.worker.report()
        assert await asyncio.to_thread(stage.coordinator.wait) == 2
        last = stage.coordinator.said().splitlines()[-1]
        assert f"{PREFIX}/jobs/mnist/events/000000000003" in last and "w1" in last
        assert "Traceback" not in stage.coordinator.said()
        stage.coordinator.start()
        assert await asyncio.to_thread(stage.coordinator.wait) == 2, "it must not go on after a restart either"

    on_a_stage(etcd, tmp_path, play)


def test_a_commit_marker_from_beyond_the_logs_end_stops_the_coordinator(etcd: EtcdServer, tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        for act, outcome in STEPS[:4]:
            await act(stage)
            await outcome(stage)
        stage.coordinator.kill()
        stage.worker.state.ClearField("assignments")  # the worker's own memory of the log is gone as well
        events = await read_history(stage.client, PREFIX, MNIST)
        for event in events[3:]:
            await stage.client.delete(event.key)
        stage.coordinator.start()
        assert await asyncio.to_thread(stage.coordinator.wait) == 2
        assert events[3].key in stage.coordinator.said().splitlines()[-1]

    on_a_stage(etcd, tmp_path, play)


def test_a_damaged_event_stops_the_coordinator_before_it_decides_anything(etcd: EtcdServer, tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        await submitted(stage)
        stage.coordinator.kill()
        key = f"{PREFIX}/jobs/mnist/events/000000000001"
        found = await stage.client.get(key)
        assert found is not None
        value = json.loads(found.value)
        value["data"]["spec"]["script"] = "/other.py"
        await stage.client.delete(key)
        await stage.client.put(key, json.dumps(value, separators=(",", ":")).encode())
        stage.coordinator.start()
        assert await asyncio.to_thread(stage.coordinator.wait) == 2
        assert f"{PREFIX}/jobs/mnist/events/000000000002" in stage.coordinator.said().splitlines()[-1]
        kvs, _ = await stage.client.range_prefix(f"{PREFIX}/jobs/")
        assert len(kvs) == 2, "it appended to a log that it refused"

    on_a_stage(etcd, tmp_path, play)


# -- what must not bring it down ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../etc"}, "job name"),
        ({"nnodes_min": 4}, "nnodes 4:1"),
        ({"nproc_per_node": 3}, "slots"),
        ({"every_seconds": float("nan")}, "every-seconds"),
        ({"every_seconds": float("inf")}, "every-seconds"),
        ({"args": ["x" * 2_000_000]}, "arguments and environment take"),
        ({"store": "file:///proc/nothing"}, "cannot be used"),
        ({"store": "", "every_steps": 5}, "--store"),
    ],
)
def test_a_submission_that_cannot_be_is_refused_in_a_sentence_and_leaves_no_trace(
    etcd: EtcdServer, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    async def play(stage: Stage) -> None:
        await stage.worker.until(lambda: bool(stage.worker.received))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stage.submits(**changes)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in str(refusal.value.details())
        kvs, _ = await stage.client.range_prefix(f"{PREFIX}/jobs/")
        assert kvs == []
        assert (await stage.submits()).run == 1, "the coordinator is none the worse for it"

    on_a_stage(etcd, tmp_path, play)


def test_a_store_that_holds_a_job_of_this_name_that_the_log_does_not_know_is_refused(
    etcd: EtcdServer, tmp_path: Path
) -> None:
    async def play(stage: Stage) -> None:
        stage.store.put(marker_key(MNIST, ONE), b"of an older life")
        with pytest.raises(grpc.aio.AioRpcError, match="already holds checkpoints of a job named 'mnist'"):
            await submit(stage)

    on_a_stage(etcd, tmp_path, play)


@pytest.mark.parametrize("lie", ["no such blob", "another size", "no digest"])
def test_an_acknowledgement_that_is_not_true_aborts_the_attempt_and_training_goes_on(
    etcd: EtcdServer, tmp_path: Path, lie: str
) -> None:
    async def play(stage: Stage) -> None:
        for act, outcome in STEPS[:2]:
            await act(stage)
            await outcome(stage)
        real = stage.worker.report
        stage.worker.report = lambda: None  # type: ignore[method-assign]
        stage.worker.stores(stage.store, lambda rank: b"shard")
        shard = stage.worker.assignment.shards[1]
        match lie:
            case "no such blob":
                stage.store.delete(shard.key)
            case "another size":
                shard.size_bytes += 1
            case _:
                shard.digest = "sha1:abc"
        stage.worker.report = real  # type: ignore[method-assign]
        stage.worker.report()
        await stage.until_decided("CheckpointAborted")
        assert "GenerationFailed" not in await stage.history()

    on_a_stage(etcd, tmp_path, play)


def test_words_of_a_trainer_without_end_do_not_bring_the_coordinator_down(etcd: EtcdServer, tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        await submitted(stage)
        for rank in stage.worker.assignment.ranks:
            rank.error = "\x00" * 1_000_000
        stage.worker.ends(1)
        await stage.until_decided("GenerationFailed")
        assert stage.coordinator.alive()

    on_a_stage(etcd, tmp_path, play)
