"""What is forgotten of what is over, and what never is."""

import asyncio
import threading
from dataclasses import replace

import pytest

from dtrain.common.names import JobName, WorkerId
from dtrain.common.specs import RetentionPolicy
from dtrain.coordinator import effects as performing
from dtrain.coordinator.core.effects import ReadMarkers
from dtrain.coordinator.core.facts import Fact, RankReport, RankState, Registration, SnapshotReceived, WorkerRegistered
from dtrain.coordinator.core.observed import FORGET_AFTER_S
from dtrain.coordinator.effects import DESKS_MAX, EffectRunner
from dtrain.coordinator.rpc.convert import snapshot_from_wire
from dtrain.worker.core.inputs import Input, StartTrainers
from dtrain.worker.core.machine import step
from dtrain.worker.core.snapshots import project
from dtrain.worker.core.states import ASSIGNMENTS_MAX, COMMANDS_MAX, NodeState
from dtrain.worker.rpc.convert import Identity, to_snapshot
from dtrain.worker.transfers import Transfers
from tests.coordinator.support.clusters import JOB, Cluster, spec
from tests.coordinator.support.nodes import Held
from tests.support.memory_store import MemoryStore
from tests.worker import facts_of_trainers as say

W1 = Identity(worker=WorkerId("w1"), journal="journal of w1", incarnation="1", version="0", host="w1", address="w1:1")


class OneRealWorker:
    """A cluster in which w1 is a real worker's core with 8 slots, and w2 is imagined."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.state: NodeState = replace(say.node_state(slots=8), worker=W1.worker)
        self.number = 0
        registration = Registration(worker=W1.worker, journal=W1.journal, address="", slots=8)
        self.cluster.tells(WorkerRegistered(registration=registration))
        self.hears()

    def hears(self, *inputs: Input) -> None:
        """Its core takes the inputs; then its snapshot reaches the coordinator."""
        for each in inputs:
            self.state, _ = step(self.state, each, 0.0)
        self.number += 1
        message = to_snapshot(
            project(self.state), W1, number=self.number, rendezvous_port=20000 + self.number,
            transfers=Transfers(uploads={}, restores={}),
        )  # fmt: skip
        self.cluster.tells(SnapshotReceived(snapshot=snapshot_from_wire(message), stream=1))

    def starts(self, name: str) -> int:
        """It is told to start its rank of this job, and does; return the rank."""
        (owed,) = [each for each in self.cluster.commands("w1", name) if each.id.endswith("/start")]
        generation, rank = int(owed.generation.number), owed.member.first_rank
        body = StartTrainers(spec=replace(say.spec(nproc=1), first_rank=rank))
        told = say.command(body, id=owed.id, job=name, generation=generation, term=7)
        self.hears(told, say.ready(job=name, generation=generation), say.started(rank, job=name, generation=generation))
        return int(rank)

    def does_another(self, name: str) -> None:
        """A job of one rank runs on it from beginning to end."""
        self.cluster.submits(spec(name, nproc_per_node=1))
        self.cluster.decides()
        self.starts(name)
        self.hears(say.exited(0, job=name))
        assert "JobSucceeded" in self.cluster.decides()
        (owed,) = self.cluster.commands("w1", name)
        self.hears(say.stop(id=owed.id, job=name, generation=int(owed.generation), term=7))


def test_a_worker_remembers_ranks_that_ended_well_for_as_long_as_their_generation_runs() -> None:
    here = OneRealWorker()
    cluster = here.cluster
    cluster.joins("w2", slots=1)
    cluster.submits(spec(nnodes_min=2, nnodes_max=2, nproc_per_node=1))
    assert cluster.decides() == ["GenerationStarted"]
    rank = here.starts(JOB)
    here.hears(say.exited(rank, job=JOB))  # it is done early: the other node's goes on, with an evaluation or an export
    for number in range(max(ASSIGNMENTS_MAX, COMMANDS_MAX) + 1):
        here.does_another(f"short-{number:03d}")
    assert cluster.commands("w1", JOB) == [], "ranks that had ended well are started a second time"
    assert len(here.state.assignments) <= ASSIGNMENTS_MAX
    ended = RankReport(rank=1 - rank, state=RankState.EXITED, exit_code=0)
    cluster.nodes["w2"].held[JOB] = Held(generation=1, ranks={1 - rank: ended})
    cluster.reports("w2")
    assert cluster.decides() == ["JobSucceeded"]


def test_what_the_log_says_is_not_kept_as_a_fact_too() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(retention=RetentionPolicy(keep_last=1)), step=10)
    for number in range(1, 31):
        cluster.asks_for_checkpoint()
        cluster.acknowledges()
        cluster.manifest_written()
        cluster.decides()
        cluster.marker_written(number)
        cluster.decides()
        for checkpoint in [c for c in cluster.job().committed.values() if c.expired]:
            cluster.objects_deleted(checkpoint.attempt)
        cluster.decides()
        cluster.trains(step=10 + 30 * number)
    assert list(cluster.job().committed) == [30]
    assert not cluster.observed.markers and not cluster.observed.deleted


def test_workers_that_went_away_long_ago_are_not_shown_for_ever() -> None:
    cluster = Cluster()
    cluster.joins("stays", "goes")
    cluster.loses("goes")
    cluster.passes(FORGET_AFTER_S)
    cluster.observed.forget_absent(cluster.now, but=())
    assert set(cluster.observed.workers) == {"stays", "goes"}
    cluster.passes(1.0)
    cluster.observed.forget_absent(cluster.now, but={WorkerId("goes")})
    assert set(cluster.observed.workers) == {"stays", "goes"}, "a generation that runs counts upon what it said"
    cluster.observed.forget_absent(cluster.now, but=())
    assert set(cluster.observed.workers) == {"stays"}


def test_stores_of_jobs_that_are_over_keep_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performing, "open_store", lambda uri: MemoryStore())
    before = threading.active_count()

    async def body() -> int:
        told: asyncio.Queue[Fact] = asyncio.Queue()
        runner = EffectRunner(told.put, lambda effect: True)
        try:
            async with asyncio.timeout(60.0):
                for number in range(10 * DESKS_MAX):
                    runner.perform([ReadMarkers(job=JobName(f"job-{number}"), store=f"s3://bucket/job-{number}")])
                    await told.get()
                while threading.active_count() - before > 2 * DESKS_MAX:  # those that were let go are on their way out
                    await asyncio.sleep(0.01)
            return threading.active_count() - before
        finally:
            await runner.close()

    assert asyncio.run(body()) <= 2 * DESKS_MAX
