"""What people and workers may say without bringing the coordinator down."""

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from dtrain.coordinator.core.checkpoints import HORIZON_S
from dtrain.coordinator.core.events import CheckpointAborted
from dtrain.coordinator.election import read_leader
from dtrain.coordinator.history import read_history
from dtrain.coordinator.rpc.convert import rank_from_wire, snapshot_from_wire
from dtrain.proto import agent_pb2 as wire
from dtrain.proto import agent_pb2_grpc
from dtrain.storage.keys import marker_key
from tests.coordinator.support.clusters import PREFIX
from tests.coordinator.support.stages import MNIST, ONE, STEPS, Stage, on_a_stage, shard_of_rank, submit, submitted
from tests.coordinator.support.workers import DEADLINE_S
from tests.support.etcd_server import EtcdServer

ENDLESS = "x" * 2_000_000
COMMON_THREADS = min(32, (os.cpu_count() or 1) + 4)  # that a process has for whatever is given no threads of its own
ANOTHER = {"name": "another", "python": "python", "script": "/a.py", "cwd": "/", "nnodes_min": 1, "nnodes_max": 1,
           "nproc_per_node": 1}  # fmt: skip


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


@pytest.mark.parametrize("lie", ["no such blob", "another size", "no digest", "no index", "two shards of rank 0"])
def test_an_acknowledgement_that_is_not_true_aborts_the_attempt_and_training_goes_on(
    etcd: EtcdServer, tmp_path: Path, lie: str
) -> None:
    async def play(stage: Stage) -> None:
        for act, outcome in STEPS[:2]:
            await act(stage)
            await outcome(stage)
        real = stage.worker.report
        stage.worker.report = lambda: None  # type: ignore[method-assign]
        stage.worker.stores(stage.store, shard_of_rank if "rank 0" not in lie else lambda rank: shard_of_rank(0))
        shard = stage.worker.assignment.shards[1]
        match lie:
            case "no such blob":
                stage.store.delete(shard.key)
            case "another size":
                shard.size_bytes += 1
            case "no index":
                stage.store.delete(shard.index_key)
            case "no digest":
                shard.digest = "sha1:abc"
        stage.worker.report = real  # type: ignore[method-assign]
        stage.worker.report()
        await stage.until_decided("CheckpointAborted")
        if lie == "two shards of rank 0":
            (aborted,) = [
                event.event
                for event in await read_history(stage.client, PREFIX, MNIST)
                if isinstance(event.event, CheckpointAborted)
            ]
            assert aborted.reason == "the shard of rank 1 says that it is that of rank 0"
        assert "GenerationFailed" not in await stage.history()

    on_a_stage(etcd, tmp_path, play)


@pytest.mark.parametrize("length", [1_000_000, 3_000_000], ids=["below", "above gRPC's own limit of a message"])
def test_words_of_a_trainer_without_end_do_not_bring_the_coordinator_down(
    etcd: EtcdServer, tmp_path: Path, length: int
) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        await submitted(stage)
        for rank in stage.worker.assignment.ranks:
            rank.error = "\x00" * length
        stage.worker.ends(1)
        await stage.until_decided("GenerationFailed")
        assert stage.coordinator.alive()

    on_a_stage(etcd, tmp_path, play)


def test_a_worker_of_another_etcd_is_refused_in_words_and_harms_nobody(etcd: EtcdServer, tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        await submitted(stage)
        stranger = wire.Snapshot(worker="stranger", journal="j", incarnation="1", number=1, term=10**12, slots=2)
        found = await read_leader(stage.client, PREFIX)
        assert found is not None

        async def snapshots() -> AsyncIterator[wire.Snapshot]:
            yield stranger

        async with grpc.aio.insecure_channel(found[0].address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                async for _ in agent_pb2_grpc.AgentsStub(channel).Attend(snapshots()):
                    raise AssertionError("it was welcomed")
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "stranger has seen term 1000000000000, which this etcd never gave" in str(refusal.value.details())
        assert await read_leader(stage.client, PREFIX) == found, "the leader was not deposed by it"
        assert (await stage.submits()).run == 1

    on_a_stage(etcd, tmp_path, play)


@pytest.mark.parametrize("later", [{"term": 10**12}, {"worker": "w1"}], ids=["a term that never was", "another's"])
def test_what_a_stream_says_later_is_taken_as_little_on_trust(
    etcd: EtcdServer, tmp_path: Path, later: dict[str, Any]
) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        await submitted(stage)
        found = await read_leader(stage.client, PREFIX)
        assert found is not None
        first: dict[str, Any] = {"worker": "stranger", "journal": "j", "incarnation": "1", "number": 1, "slots": 2}

        async def snapshots() -> AsyncIterator[wire.Snapshot]:
            yield wire.Snapshot(**first)
            yield wire.Snapshot(**{**first, "number": 2, **later})
            await asyncio.Event().wait()

        async with grpc.aio.insecure_channel(found[0].address) as channel, asyncio.timeout(DEADLINE_S):
            async for _ in agent_pb2_grpc.AgentsStub(channel).Attend(snapshots()):
                pass  # until the coordinator ends it
        assert await read_leader(stage.client, PREFIX) == found, "the leader was not deposed by it"
        workers = (await stage.asks("Workers", wire.WorkersRequest())).workers
        assert {worker.worker: worker.connected for worker in workers} == {"stranger": False, "w1": True}

    on_a_stage(etcd, tmp_path, play)


def test_a_request_whose_number_has_no_end_is_refused(etcd: EtcdServer, tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await submit(stage)
        for method, request in (
            ("Submit", wire.SubmitRequest(spec=wire.Spec(**ANOTHER), request=ENDLESS)),
            ("Checkpoint", wire.CheckpointRequest(job=MNIST, request=ENDLESS)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stage.asks(method, request)
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "2000000 characters" in str(refusal.value.details())
        assert (await stage.asks("Status", wire.StatusRequest())).jobs, "the coordinator is none the worse for it"

    on_a_stage(etcd, tmp_path, play)


@pytest.mark.parametrize(
    "snapshot",
    [
        wire.Snapshot(worker="w1", journal=ENDLESS),
        wire.Snapshot(worker="w1", address=ENDLESS),
        wire.Snapshot(worker="w1", assignments=[wire.Assignment(job="mnist", shards=[wire.ShardReport(key=ENDLESS)])]),
        wire.Snapshot(
            worker="w1",
            assignments=[wire.Assignment(job="mnist", shards=[wire.ShardReport(packs=[wire.Pack(key=ENDLESS)])])],
        ),
        wire.Snapshot(worker="w1", assignments=[wire.Assignment(job="mnist", restore=wire.RestoreReport(key=ENDLESS))]),
    ],
    ids=["journal", "address", "shard", "pack", "restore"],
)
def test_what_a_worker_says_is_bounded_where_an_event_may_repeat_it(snapshot: wire.Snapshot) -> None:
    with pytest.raises(ValueError, match="has 2000000 characters"):
        snapshot_from_wire(snapshot)


def test_a_step_that_takes_no_time_at_all_is_still_counted_in_numbers() -> None:
    at = rank_from_wire(wire.RankReport(step_s=5e-324)).step_s
    assert at > 0 and math.isfinite(HORIZON_S / at)


@pytest.mark.parametrize("what", ["others submit", "it leaves"])
def test_a_store_that_never_answers_holds_up_nobody_else(
    etcd: EtcdServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")

    async def play(stage: Stage) -> None:
        await stage.worker.until(lambda: bool(stage.worker.received))
        reached = asyncio.Semaphore(0)

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reached.release()
            await reader.read(-1)
            writer.close()

        async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as hole:
            endpoint = f"http://127.0.0.1:{hole.sockets[0].getsockname()[1]}"
            asked = [
                asyncio.create_task(stage.submits(name=f"hung-{n}", store=f"s3://bucket/{n}?endpoint={endpoint}"))
                for n in range(COMMON_THREADS)
            ]
            for _ in asked:
                await reached.acquire()
            began_s = time.monotonic()
            if what == "others submit":
                assert (await stage.submits()).run == 1
            else:
                assert await asyncio.to_thread(stage.coordinator.terminate) == 0
            assert time.monotonic() - began_s < DEADLINE_S / 2
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    on_a_stage(etcd, tmp_path, play)
