"""Real coordinator processes, a worker spoken by hand: a whole job, with the coordinator killed at any point."""

import asyncio
import json
from pathlib import Path

import pytest

from dtrain.coordinator.election import LEASE_TTL_S, read_leader
from dtrain.coordinator.history import read_history
from dtrain.proto import agent_pb2 as wire
from tests.coordinator.support.clusters import PREFIX
from tests.coordinator.support.processes import CoordinatorProcess
from tests.coordinator.support.stages import (
    MNIST,
    STEPS,
    Stage,
    ask_for_checkpoint,
    asked_for_checkpoint,
    on_a_stage,
    submit,
    submitted,
)
from tests.coordinator.support.workers import DEADLINE_S, RETRY_S
from tests.support.etcd_server import EtcdServer

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
