"""The leader's loop without etcd: persist first, then act; and nobody waits for an answer that cannot come."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import pytest

from dtrain.common.errors import LogDamagedError, UserError
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Term, WorkerId
from dtrain.coordinator.codec import Entry
from dtrain.coordinator.core.commands import Command
from dtrain.coordinator.core.effects import Effect
from dtrain.coordinator.core.facts import (
    AssignmentReport,
    CancelAsked,
    MarkersRead,
    ObjectsDeleted,
    QuarantineAsked,
    Registration,
    RestorePhase,
    RestoreReport,
    ShardPhase,
    SnapshotReceived,
    SubmitAsked,
    Ticked,
    WorkerRegistered,
)
from dtrain.coordinator.core.reconcile import DECISIONS_MAX
from dtrain.coordinator.core.states import JobPhase
from dtrain.coordinator.log import Deposed, EventLog
from dtrain.coordinator.loop import LeaderLoop
from tests.coordinator.support.clusters import PREFIX, Cluster, spec
from tests.coordinator.support.nodes import Node

DEADLINE_S = 30.0
W1 = Node(name=WorkerId("w1"), slots=4, journal="j", incarnation="i", number=1)


class Journal:
    """A log and an outbox in memory that note what happens, in order."""

    term = Term(7)

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.transactions: list[list[str]] = []
        self.deposed = False
        self.durable = asyncio.Event()  # an append ends only when this is set
        self.durable.set()
        self.appending = asyncio.Event()
        self.newest_revision = 100  # of the etcd

    async def revision(self) -> int:
        return self.newest_revision

    async def require_newest(self) -> None:
        if self.deposed:
            raise Deposed("another leads")

    async def append(self, entries: Sequence[Entry]) -> None:
        self.appending.set()
        await self.durable.wait()
        if self.deposed:
            raise Deposed("another leads")
        self.transactions.append([f"{entry.record.job} {entry.record.type}" for entry in entries])
        self.happened += [entry.record.type for entry in entries]

    def send(self, worker: WorkerId, commands: list[Command]) -> None:
        self.happened += [f"send {command.id}" for command in commands]

    def perform(self, effects: list[Effect]) -> None:
        self.happened += [f"perform {effect.key[0]}" for effect in effects]


def in_a_loop(body: Callable[[LeaderLoop, Journal, "asyncio.Task[None]"], Awaitable[None]]) -> None:
    async def run() -> None:
        journal = Journal()
        loop = LeaderLoop(log=cast(EventLog, journal), prefix=PREFIX, jobs={}, outbox=journal)
        running = asyncio.create_task(loop.run())
        try:
            async with asyncio.timeout(DEADLINE_S):
                await body(loop, journal, running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())


async def with_worker(loop: LeaderLoop) -> None:
    registration = Registration(worker=W1.name, journal=W1.journal, address="", slots=W1.slots)
    await loop.tell(WorkerRegistered(registration=registration))
    await loop.tell(SnapshotReceived(snapshot=W1.snapshot(Term(7)), stream=1))


def submission(name: str = "mnist") -> SubmitAsked:
    return SubmitAsked(spec=spec(name, store=""), request="r1", takes_over=False)


def test_nothing_is_sent_before_it_is_durable() -> None:
    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        await with_worker(loop)
        journal.durable.clear()
        asking = asyncio.create_task(loop.ask(submission()))
        await journal.appending.wait()
        assert not asking.done() and journal.happened == [] and loop.jobs == {}
        journal.durable.set()
        job = await asking
        assert job.phase is JobPhase.RUNNING
        assert journal.happened == ["JobSubmitted", "GenerationStarted", "send mnist/g1/start"]

    in_a_loop(body)


def test_a_leader_that_cannot_append_acts_on_nothing_and_tells_whoever_waits() -> None:
    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        await with_worker(loop)
        journal.deposed = True
        with pytest.raises(Deposed):
            await loop.ask(submission())
        with pytest.raises(Deposed):
            await running
        assert journal.happened == [] and loop.jobs == {}

    in_a_loop(body)


def test_a_request_to_a_leadership_that_is_over_is_answered_and_not_left_waiting() -> None:
    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        journal.deposed = True
        with pytest.raises(Deposed):
            await loop.ask(submission())
        await asyncio.gather(running, return_exceptions=True)
        with pytest.raises(Deposed):
            await loop.ask(submission())

    in_a_loop(body)


def test_what_is_decided_in_one_round_about_several_jobs_is_one_append() -> None:
    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        await with_worker(loop)
        journal.durable.clear()
        first = asyncio.create_task(loop.ask(submission("a")))
        await journal.appending.wait()  # the loop is busy: what comes now is the next round's
        others = [asyncio.create_task(loop.ask(submission(name))) for name in "ihgfedcb"]
        another_port = dataclasses.replace(W1.snapshot(Term(7)), number=2, rendezvous_port=30000)
        await loop.tell(SnapshotReceived(snapshot=another_port, stream=1))
        refused = asyncio.create_task(loop.ask(CancelAsked(job=JobName("nobody"))))
        await asyncio.sleep(0)
        journal.durable.set()
        await asyncio.gather(first, *others)
        with pytest.raises(UserError, match="nobody"):
            await refused
        assert journal.transactions == [
            ["a JobSubmitted", "a GenerationStarted"],
            [*(f"{name} JobSubmitted" for name in "ihgfedcb"), "b GenerationStarted"],
        ], "there are slots for one more job, which is the first by name in every process"

    in_a_loop(body)


def test_the_markers_of_a_job_are_read_before_it_starts() -> None:
    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        await with_worker(loop)
        asked = SubmitAsked(spec=spec(), request="r1", takes_over=False)
        assert (await loop.ask(asked)).phase is JobPhase.PENDING
        assert journal.happened[:2] == ["JobSubmitted", "perform audit"]
        await loop.tell(MarkersRead(job=JobName("mnist"), store=asked.spec.store, position_seq=1, key="m"))
        while loop.jobs[JobName("mnist")].phase is JobPhase.PENDING:
            await asyncio.sleep(0)
        assert "send mnist/g1/start" in journal.happened

    in_a_loop(body)


def test_a_store_whose_markers_were_not_read_is_read_before_the_next_run_starts() -> None:
    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        await with_worker(loop)
        await loop.ask(SubmitAsked(spec=spec(), request="r1", takes_over=False))
        await loop.tell(MarkersRead(job=JobName("mnist"), store="file:///store", position_seq=1, key="m"))
        elsewhere = spec(store="file:///other")
        job = await loop.ask(SubmitAsked(spec=elsewhere, request="r2", takes_over=True))
        assert (job.run, job.phase) == (2, JobPhase.PENDING), "nobody has looked into the other store yet"
        assert journal.happened[-1] == "perform audit"
        await loop.tell(MarkersRead(job=JobName("mnist"), store="file:///other", position_seq=1, key="m"))
        while loop.jobs[JobName("mnist")].phase is JobPhase.PENDING:
            await asyncio.sleep(0)

    in_a_loop(body)


def seen_by_worker(seq: int, digest: str) -> SnapshotReceived:
    """A snapshot of a worker that was told of the job's log up to here."""
    held = AssignmentReport(
        job=JobName("mnist"), generation=Generation(1), phase="training", ranks=(), shards=(),
        restore=RestoreReport(phase=RestorePhase.NONE), position_seq=seq, position_digest=digest,
    )  # fmt: skip
    snapshot = dataclasses.replace(W1.snapshot(Term(7)), number=2, assignments=(held,))
    return SnapshotReceived(snapshot=snapshot, stream=1)


def test_a_worker_that_has_seen_another_event_at_the_logs_end_shows_that_the_log_was_rewritten() -> None:
    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        await with_worker(loop)
        job = await loop.ask(submission())
        await loop.tell(seen_by_worker(job.position.seq, job.position.digest))
        await loop.tell(seen_by_worker(job.position.seq - 1, "of an event that is not the last"))
        await loop.ask(submission())  # the same again: it decides nothing, and comes behind the facts above
        assert not running.done()
        await loop.tell(seen_by_worker(job.position.seq, "0" * 64))
        with pytest.raises(LogDamagedError, match="another event than the one worker w1 has seen") as damage:
            await running
        assert damage.value.key.endswith(f"{job.position.seq:012d}")

    in_a_loop(body)


@pytest.mark.parametrize("deposed", [True, False])
def test_what_a_leader_does_not_know_is_its_successors_if_it_has_one_and_else_a_lost_end(deposed: bool) -> None:
    """A machine that stood still wakes with its clock, and so with its lease, but another may lead by then."""

    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        await with_worker(loop)
        job = await loop.ask(submission())
        journal.deposed = deposed
        seq = job.position.seq + 1
        await loop.tell(MarkersRead(job=job.name, store="file:///store", position_seq=seq, key="m"))
        with pytest.raises(Deposed if deposed else LogDamagedError):
            await running

    in_a_loop(body)


def test_a_term_is_known_to_be_of_another_etcd_only_beyond_its_newest_revision() -> None:
    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        journal.newest_revision = 12
        assert [await loop.never_was(term) for term in (0, 7, 8, 12, 13)] == [False, False, False, False, True]

    in_a_loop(body)


def test_a_checkpoint_that_is_not_there_cannot_be_quarantined() -> None:
    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        asked = QuarantineAsked(job=JobName("nobody"), checkpoint=CheckpointNumber(1), key="k", reason="bit")
        with pytest.raises(UserError, match="nobody"):
            await loop.ask(asked)
        await with_worker(loop)
        await loop.ask(submission())
        with pytest.raises(UserError, match="no checkpoint 1"):
            await loop.ask(dataclasses.replace(asked, job=JobName("mnist")))

    in_a_loop(body)


@pytest.mark.parametrize("turns", range(5))
def test_a_loop_that_is_ended_in_the_moment_in_which_a_fact_comes_ends(turns: int) -> None:
    """A leader that is deposed waits for its loop: one that forgot that it was cancelled would never stand by again."""

    async def body(loop: LeaderLoop, journal: Journal, running: "asyncio.Task[None]") -> None:
        for _ in range(5):
            await asyncio.sleep(0)  # it waits for a fact
        await loop.tell(Ticked())
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running}, timeout=DEADLINE_S / 2)
        assert running.cancelled()

    in_a_loop(body)


def test_a_worker_that_was_forgotten_is_not_shown_again_because_a_job_ran_there_once() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(store=""), step=10)
    cluster.finish()
    assert cluster.decides() == ["JobSucceeded"]

    async def run() -> None:
        journal = Journal()
        loop = LeaderLoop(log=cast(EventLog, journal), prefix=PREFIX, jobs=cluster.jobs, outbox=journal)
        running = asyncio.create_task(loop.run())
        try:
            async with asyncio.timeout(DEADLINE_S):
                job = await loop.ask(dataclasses.replace(submission(), request="r2"))
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert job.placed.keys() == {W1.name} and not loop.observed.workers

    asyncio.run(run())


def test_what_one_round_could_not_decide_about_an_ended_job_the_next_ones_do() -> None:
    count = 2 * DECISIONS_MAX + 1
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(), step=10)
    for _ in range(count):
        cluster.asks_for_checkpoint()
        cluster.shard(0, ShardPhase.FAILED, reason="disk full")
        cluster.decides()
    cluster.finish()
    assert cluster.decides() == ["JobSucceeded"]

    async def run() -> None:
        journal = Journal()
        loop = LeaderLoop(log=cast(EventLog, journal), prefix=PREFIX, jobs=cluster.jobs, outbox=journal)
        for attempt in range(1, count + 1):
            await loop.tell(ObjectsDeleted(job=JobName("mnist"), attempt=AttemptNumber(attempt)))
        running = asyncio.create_task(loop.run())
        try:
            async with asyncio.timeout(DEADLINE_S):
                while loop.jobs[JobName("mnist")].aborted:
                    await asyncio.sleep(0.01)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())
