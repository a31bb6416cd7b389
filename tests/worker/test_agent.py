"""The agent as a real process, against a real etcd and a coordinator that speaks the real wire."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dtrain.common.digests import blob_digest
from dtrain.common.names import Generation, JobName
from dtrain.etcd.client import EtcdClient
from dtrain.proto import agent_pb2 as wire
from dtrain.proto.agent_pb2_grpc import LogsStub
from dtrain.worker.rank_dirs import RankDirs, RankId, read_started
from tests.support.facts import wait_for
from tests.worker.nodes import JOB, Node, alive
from tests.worker.scripts import agent_process
from tests.worker.scripts.mailbox_trainer import staged_bytes


def _shards(snapshot: wire.Snapshot, attempt: int) -> list[wire.ShardReport]:
    return [shard for a in snapshot.assignments for shard in a.shards if shard.attempt == attempt]


def _checkpoint(node: Node, attempt: int, *, ahead: int = 50) -> tuple[str, int]:
    step = max(node.steps().values()) + ahead
    stage = wire.StageCheckpoint(checkpoint=attempt, attempt=attempt, step=step, store=node.store)
    return node.command(stage_checkpoint=stage), step


def test_a_noop_is_accepted_and_done_at_once(node: Node) -> None:
    node.start()
    status = node.wait_done(node.command(noop=wire.Noop()))
    assert status.term == node.coordinator.term


def test_trainers_start_stage_and_their_shards_are_acknowledged_once_stored(node: Node) -> None:
    node.start()
    node.wait_done(node.start_trainers())
    node.wait_training()
    command, step = _checkpoint(node, 1)
    node.wait_done(command)
    shards = _shards(node.coordinator.snapshots[-1], 1)
    assert [(shard.rank, shard.state, shard.step) for shard in shards] == [
        (0, wire.DURABLE, step),
        (1, wire.DURABLE, step),
    ]
    for shard in shards:
        stored = (node.folder / "store" / shard.key).read_bytes()
        assert stored == staged_bytes(shard.rank, step)
        assert (shard.size_bytes, shard.digest) == (len(stored), blob_digest(stored))


def test_a_step_that_has_passed_is_reported_as_missed(node: Node) -> None:
    node.start()
    node.start_trainers()
    node.wait_training()
    node.wait("some steps are done", lambda snapshot: min(node.steps().values()) > 10)
    stage = wire.StageCheckpoint(checkpoint=1, attempt=1, step=2, store=node.store)
    node.wait_done(node.command(stage_checkpoint=stage))
    assert {shard.state for shard in _shards(node.coordinator.snapshots[-1], 1)} == {wire.MISSED}


def test_an_agent_killed_in_training_comes_back_to_the_same_trainers(node: Node) -> None:
    node.start()
    node.start_trainers()
    before = node.wait_training()
    journal = node.coordinator.snapshots[-1].journal
    node.kill()
    node.start()
    assert node.wait_training() == before
    steps = node.steps()
    node.wait("they go on", lambda snapshot: all(node.steps()[rank] > steps[rank] + 5 for rank in (0, 1)))
    after = node.coordinator.snapshots[-1]
    assert after.journal == journal
    assert after.incarnation != node.coordinator.snapshots[0].incarnation
    command, _ = _checkpoint(node, 1)
    node.wait_done(command)
    assert {shard.state for shard in _shards(node.coordinator.snapshots[-1], 1)} == {wire.DURABLE}
    node.end_file.touch()
    node.wait("both have ended well", lambda snapshot: _exits(snapshot) == [(0, False), (0, False)])


def _exits(snapshot: wire.Snapshot) -> list[tuple[int, bool]]:
    ranks = [rank for assignment in snapshot.assignments for rank in assignment.ranks]
    return [(rank.exit_code, rank.exit_unknown) for rank in ranks if rank.state == wire.EXITED]


def test_trainers_whose_agent_does_not_come_back_end_themselves_and_the_next_agent_says_why(node: Node) -> None:
    node.start(orphan_after_s=1.0)
    node.start_trainers()
    pids = node.wait_training()
    node.kill()
    wait_for("the trainers' end", lambda: not any(alive(pid) for pid in pids.values()), deadline_s=10)
    assert all("ended, because its worker was gone for 1 s" in node.log(rank) for rank in pids)
    node.start()

    def look(snapshot: wire.Snapshot) -> bool:
        ranks = [rank for assignment in snapshot.assignments for rank in assignment.ranks]
        return [(rank.state, rank.exit_code) for rank in ranks] == [(wire.EXITED, -signal.SIGKILL)] * 2

    node.wait("both exits", look)


def test_an_agent_that_comes_back_in_time_finds_trainers_that_stay(node: Node) -> None:
    node.start(orphan_after_s=3.0)
    node.start_trainers()
    before = node.wait_training()
    node.kill()
    node.start()
    assert node.wait_training() == before
    furthest = max(node.steps().values())
    node.wait("steps for longer than the trainers would wait", lambda _: min(node.steps().values()) > furthest + 400)
    assert node.wait_training() == before


def test_an_agent_killed_before_storage_confirmed_acknowledges_after_its_return(node: Node) -> None:
    node.start()
    node.start_trainers()
    before = node.wait_training()
    in_the_way = node.folder / "store"  # a file where the folder should be: no upload can succeed
    in_the_way.write_text("not a folder yet")
    command, step = _checkpoint(node, 1, ahead=100)
    node.wait_done(command, wire.ACCEPTED)
    node.kill()
    mailboxes = list((node.folder / "shm").glob("dtrain-*/*/rank*"))
    wait_for("both have staged", lambda: all((path / "slot0").exists() for path in mailboxes), deadline_s=20)
    in_the_way.unlink()
    node.start()
    node.wait_done(command)
    shards = _shards(node.coordinator.snapshots[-1], 1)
    assert {(shard.state, shard.step) for shard in shards} == {(wire.DURABLE, step)}
    assert node.wait_training() == before


def test_a_trainer_that_ended_while_the_agent_was_dead_is_reported_with_its_code(node: Node) -> None:
    node.start()
    node.start_trainers(
        script=str(
            _script(
                node,
                "import time, sys, pathlib\n"
                "while not pathlib.Path('go').exists(): time.sleep(0.01)\nprint('out of luck'); sys.exit(7)",
            )
        )
    )
    node.wait("both run", lambda s: [r.state for a in s.assignments for r in a.ranks] == [wire.RUNNING] * 2)
    node.kill()
    (node.folder / "go").touch()
    folders = list((node.folder / "shm").glob("dtrain-*/*/rank*"))
    wait_for("both have ended", lambda: all((path / "exited.json").exists() for path in folders), deadline_s=20)
    node.start()
    node.wait("the exits are told", lambda snapshot: _exits(snapshot) == [(7, False), (7, False)])
    ranks = [rank for assignment in node.coordinator.snapshots[-1].assignments for rank in assignment.ranks]
    assert {rank.error for rank in ranks} == {"out of luck"}


def _script(node: Node, text: str) -> Path:
    path = node.folder / "script.py"
    path.write_text(text)
    return path


def test_a_command_of_an_older_term_is_refused_and_names_both_terms(node: Node) -> None:
    node.start()
    node.wait_done(node.command(noop=wire.Noop()))
    old = node.coordinator.term
    node.coordinator.lead_again()
    node.wait("the new term is seen", lambda snapshot: snapshot.term == node.coordinator.term)
    node.coordinator.send(wire.Command(id="late", noop=wire.Noop()), term=old)
    status = node.wait_done("late", wire.REFUSED)
    assert str(old) in status.reason
    assert str(node.coordinator.term) in status.reason


def test_a_newer_generation_ends_the_older_one_before_it_starts(node: Node) -> None:
    node.start()
    node.start_trainers()
    before = node.wait_training()
    node.wait_done(node.start_trainers(generation=2))
    after = node.wait_training()
    assert not set(before.values()) & set(after.values())
    assert not any(alive(pid) for pid in before.values())
    assert not list((node.folder / "shm").glob("dtrain-*/*.g1"))
    refused = node.wait_done(node.start_trainers(generation=1), wire.REFUSED)
    assert "generation 1" in refused.reason


def test_a_stop_ends_the_trainers_and_removes_their_folders(node: Node) -> None:
    node.start()
    node.start_trainers()
    pids = node.wait_training().values()
    node.wait_done(node.command(stop_trainers=wire.StopTrainers(grace_s=5)))
    assert _exits(node.coordinator.snapshots[-1]) == [(-15, False), (-15, False)]
    assert not any(alive(pid) for pid in pids)
    assert not list((node.folder / "shm").glob("dtrain-*/*/"))


def test_an_agent_that_is_asked_to_leave_ends_its_trainers_and_leaves_nothing(node: Node) -> None:
    node.start()
    node.start_trainers()
    pids = node.wait_training().values()
    assert node.terminate() == 0
    assert not any(alive(pid) for pid in pids)
    assert not list((node.folder / "shm").iterdir())
    assert _exits(node.coordinator.snapshots[-1]) == [(-15, False), (-15, False)]


def test_a_second_agent_on_the_same_data_folder_is_told_who_uses_it(node: Node) -> None:
    node.start()
    assert node.process is not None
    second = subprocess.run(
        [sys.executable, agent_process.__file__, json.dumps(node.settings)], capture_output=True, text=True, timeout=30
    )
    assert second.returncode == 2
    assert f"in use by another process (pid {node.process.pid})" in second.stderr
    assert alive(node.process.pid)


def test_a_coordinator_that_is_gone_for_a_while_costs_nothing(node: Node) -> None:
    node.start()
    node.start_trainers()
    before = node.wait_training()
    streams = node.coordinator.streams
    node.coordinator.drop_streams()
    wait_for("the agent is back", lambda: node.coordinator.streams > streams, deadline_s=20)
    assert node.wait_training() == before


def test_etcd_may_be_away_while_trainers_train_and_the_node_registers_again(node: Node) -> None:
    node.start()
    node.start_trainers()
    before = node.wait_training()
    node.etcd.kill()
    steps = node.steps()
    node.wait("training goes on", lambda snapshot: min(node.steps().values()) > max(steps.values()) + 50)
    asyncio.run(node.etcd.up())
    assert node.wait_training() == before
    registration = wait_for("the registration is back", lambda: asyncio.run(_registration(node)), deadline_s=20)
    assert registration["journal"] == node.coordinator.snapshots[-1].journal
    assert node.process is not None
    assert registration["pid"] == node.process.pid


async def _registration(node: Node) -> dict[str, Any] | None:
    async with EtcdClient([node.etcd.endpoint]) as etcd:
        found = await etcd.get("/dtrain/workers/w1")
        return json.loads(found.value) if found is not None else None


def test_an_agent_that_leaves_takes_its_registration_with_it(node: Node) -> None:
    node.start()
    wait_for("it is registered", lambda: asyncio.run(_registration(node)), deadline_s=20)
    assert node.terminate() == 0
    assert asyncio.run(_registration(node)) is None


def test_a_keeper_killed_with_9_is_reported_as_an_exit_that_nobody_saw(node: Node) -> None:
    node.start()
    node.start_trainers()
    pids = node.wait_training()
    folder = next((node.folder / "shm").glob("dtrain-*/*/rank1"))
    started = read_started(folder)
    assert started is not None
    os.kill(started.keeper_pid, signal.SIGKILL)
    node.wait("the exit is told", lambda snapshot: _exits(snapshot) == [(0, True)])
    assert not alive(pids[1])
    assert node.steps()[0] > 0


def test_an_agent_killed_in_mid_upload_acknowledges_after_its_return(node: Node) -> None:
    node.start()
    node.start_trainers()
    before = node.wait_training()
    with silent_server() as address:  # it takes connections and never answers: the upload hangs
        store = f"s3://bucket/prefix?endpoint=http://{address}&region=us-east-1"
        stage = wire.StageCheckpoint(checkpoint=1, attempt=1, step=max(node.steps().values()) + 50, store=store)
        node.wait_done(node.command(stage_checkpoint=stage), wire.ACCEPTED)
        node.wait("both hang", lambda s: [shard.state for shard in _shards(s, 1)] == [wire.STAGED, wire.STAGED])
        node.kill()
    journal = sqlite3.connect(node.folder / "node" / "journal.sqlite")
    with journal:  # the same store, but one that answers
        journal.execute("UPDATE generations SET checkpoint = replace(checkpoint, ?, ?)", (store, node.store))
    journal.close()
    node.start()
    node.wait("the ack", lambda s: {shard.state for shard in _shards(s, 1)} == {wire.DURABLE})
    assert node.wait_training() == before


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "{}:{}".format(*server.getsockname())


def test_logs_are_served_from_the_beginning_and_followed(node: Node) -> None:
    node.start()
    script = (
        "import os, time, pathlib\nprint('hello from', os.environ['RANK'])\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.01)\nprint('bye')\n"
    )
    node.start_trainers(script=str(_script(node, script)))
    wait_for("both said hello", lambda: all("hello" in _log(node, rank) for rank in (0, 1)), deadline_s=20)
    assert node.coordinator.latest is not None
    with grpc.insecure_channel(node.coordinator.latest.address) as channel:
        logs = LogsStub(channel)
        chunks = list(logs.Tail(wire.TailRequest(job=JOB, all_ranks=True), timeout=10))
        assert {(c.generation, c.rank, c.data) for c in chunks} == {
            (1, r, f"hello from {r}\n".encode()) for r in (0, 1)
        }
        rest = wire.TailRequest(job=JOB, rank=1, follow=True)
        getattr(rest, "from").append(wire.LogOffset(generation=1, rank=1, offset=len("hello ")))
        stream = logs.Tail(rest, timeout=20)
        assert next(stream).data == b"from 1\n"
        (node.folder / "go").touch()
        chunk = next(stream)
        assert (chunk.offset, chunk.data) == (len("hello from 1\n"), b"bye\n")
        stream.cancel()
        with pytest.raises(grpc.RpcError, match="not valid"):
            list(logs.Tail(wire.TailRequest(job="../../etc"), timeout=10))


def _log(node: Node, rank: int) -> str:
    try:
        return node.log(rank)
    except FileNotFoundError:
        return ""


def test_without_any_coordinator_for_too_long_the_agent_ends_its_trainers(node: Node) -> None:
    node.start(fence_after_s=1.0)
    node.start_trainers()
    pids = node.wait_training().values()
    node.coordinator.refuse_streams()
    wait_for("they are ended", lambda: not any(alive(pid) for pid in pids), deadline_s=20)
    node.coordinator.accept_streams()
    node.wait("it is said why", lambda snapshot: _errors(snapshot) and "no coordinator" in _errors(snapshot)[0])


def _errors(snapshot: wire.Snapshot) -> list[str]:
    return [rank.error for a in snapshot.assignments for rank in a.ranks if rank.state == wire.EXITED]


def test_what_an_agent_left_whose_data_folder_is_gone_is_removed_by_the_next_one(node: Node) -> None:
    shm = node.folder / "shm"
    abandoned, kept, held = (shm / name for name in ("dtrain-0000aaaa", "dtrain-0000bbbb", "dtrain-0000cccc"))
    for root, owner in ((abandoned, node.folder / "gone"), (kept, node.folder), (held, node.folder / "gone")):
        (root / "job.g1" / "rank0").mkdir(parents=True)
        (root / "owner").write_text(str(owner))
    of = RankId(job=JobName("job"), generation=Generation(1), rank=0)
    other = RankDirs(shm, node.folder / "elsewhere", "0000cccc")
    other.sweep(
        [(of.job, of.generation)]
    )  # as an agent in another container begins, whose data folder is not seen here
    node.start()
    assert not abandoned.exists()
    assert kept.exists()
    assert held.exists(), "an agent lives that uses it"
    del other
