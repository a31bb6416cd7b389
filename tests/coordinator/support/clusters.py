"""A cluster in words: a test says what happens, and reads what the coordinator decides.

It is the leader's loop without its I/O: facts go into observed state, `decides` reconciles every job until
desired state and facts agree, and each decision is encoded and folded as the real loop does. Workers here
only ever do what the test says they did.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName, Step, Term, WorkerId
from dtrain.common.packs import Pack
from dtrain.common.specs import CheckpointPolicy, JobSpec
from dtrain.coordinator import codec
from dtrain.coordinator.core import admissions
from dtrain.coordinator.core.commands import Command, commands_for
from dtrain.coordinator.core.effects import Effect, effects_owed
from dtrain.coordinator.core.events import Decision, Event, RecordedEvent
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.facts import (
    CancelAsked,
    CheckpointAsked,
    CommandReport,
    Fact,
    ManifestRefused,
    ManifestWritten,
    MarkersRead,
    MarkerWritten,
    Now,
    ObjectsDeleted,
    PacksGone,
    PinAsked,
    QuarantineAsked,
    RankReport,
    RankState,
    Registration,
    RegistrationsListed,
    RestorePhase,
    RestoreReport,
    ShardPhase,
    ShardReport,
    SnapshotReceived,
    StreamClosed,
    SubmitAsked,
    WorkerRegistered,
    WorkerUnregistered,
)
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.reconcile import decide
from dtrain.coordinator.core.states import GenerationState, InflightCheckpoint, JobState
from tests.coordinator.support.nodes import Held, Node

PREFIX = "/test"
JOB = "mnist"
WALL_START_S = 1_700_000_000.0
HEARTBEAT_S = 0.5
DIGEST = "xxh3-128:" + "0" * 32


def spec(name: str = JOB, *, every_steps: int = 0, every_seconds: float = 0.0, **changes: object) -> JobSpec:
    """A job of one node with two ranks, but for ``changes``."""
    given = JobSpec(
        name=JobName(name),
        python="python",
        script="/train.py",
        nproc_per_node=2,
        max_restarts=3,
        store="file:///store",
        checkpoints=CheckpointPolicy(every_steps=every_steps, every_seconds=every_seconds),
    )
    return replace(given, **changes)  # type: ignore[arg-type]


class Cluster:
    """One leadership over imagined workers."""

    def __init__(self, *, term: int = 7, jobs: dict[JobName, JobState] | None = None, now_s: float = 1000.0) -> None:
        self.term = Term(term)
        self.now_s = now_s
        self.jobs = dict(jobs or {})
        self.log: list[tuple[RecordedEvent, bytes]] = []
        self.observed = Observed(term=self.term, since_s=now_s)
        self.nodes: dict[str, Node] = {}
        self._streams = itertools.count(1)
        self.tells(RegistrationsListed())

    # -- time and leadership -------------------------------------------------------------------------

    @property
    def now(self) -> Now:
        return Now(wall_s=WALL_START_S + self.now_s, mono_s=self.now_s)

    def passes(self, seconds: float) -> None:
        self.now_s += seconds

    def fails_over(self) -> "Cluster":
        """Another coordinator leads: it has the log, and no facts yet but what the workers will say."""
        successor = Cluster(term=self.term + 1, jobs=self.jobs, now_s=self.now_s)
        successor.nodes = self.nodes
        successor.log = list(self.log)
        return successor

    # -- what a leader does ---------------------------------------------------------------------------

    def tells(self, fact: Fact) -> None:
        self.observed.apply(fact, self.now)

    def decides(self) -> list[str]:
        """Reconcile every job; return the names of the decided events, in order."""
        first = len(self.log)
        for name in sorted(self.jobs):
            decide(self.jobs[name], self.observed, self.jobs, self.now, self._folding(name))
        return [record.type for record, _ in self.log[first:]]

    def _folding(self, name: JobName) -> Callable[[JobState, Decision], JobState]:
        return lambda state, decision: self.fold(name, state, decision)

    def fold(self, name: JobName, state: JobState | None, decision: Decision) -> JobState:
        entry = codec.record(
            decision,
            prefix=PREFIX,
            job=name,
            seq=1 if state is None else state.position.seq + 1,
            term=self.term,
            time_s=self.now.wall_s,
            prev=codec.GENESIS_DIGEST if state is None else state.position.digest,
        )
        folded = evolve(state, entry.record)
        if state is not None and state.inflight is not None and folded.inflight != state.inflight:
            self.observed.forget(name, state.inflight.attempt)
        self.jobs[name] = folded
        self.observed.settle(folded)
        self.log.append((entry.record, entry.value))
        return folded

    def _admits(self, name: JobName, decisions: list[Decision]) -> None:
        state = self.jobs.get(name)
        for decision in decisions:
            state = self.fold(name, state, decision)

    # -- people ---------------------------------------------------------------------------------------

    def submits(self, given: JobSpec | None = None, *, request: str = "r1", takes_over: bool = False) -> None:
        asked = SubmitAsked(spec=given or spec(), request=request, takes_over=takes_over)
        self._admits(asked.spec.name, admissions.submit(asked, self.observed, self.jobs))
        self.markers_are_read(asked.spec.name)

    def cancels(self, name: str = JOB) -> None:
        self._admits(JobName(name), admissions.cancel(CancelAsked(job=JobName(name)), self.jobs))

    def asks_for_checkpoint(self, name: str = JOB) -> None:
        asked = CheckpointAsked(job=JobName(name), request="now")
        self._admits(asked.job, admissions.checkpoint(asked, self.observed, self.jobs, self.now))

    def pins(self, checkpoint: int, *, name: str = JOB, wanted: bool = True) -> None:
        asked = PinAsked(job=JobName(name), checkpoint=CheckpointNumber(checkpoint), pinned=wanted)
        self._admits(asked.job, admissions.pin(asked, self.jobs))

    def quarantines(self, checkpoint: int, *, name: str = JOB) -> None:
        number = CheckpointNumber(checkpoint)
        asked = QuarantineAsked(job=JobName(name), checkpoint=number, key="the blob", reason="bit")
        self._admits(asked.job, admissions.quarantine(asked, self.jobs))

    # -- workers --------------------------------------------------------------------------------------

    def joins(self, *workers: str, slots: int = 2) -> None:
        """New workers register and open their streams."""
        for name in workers:
            self.nodes[name] = Node(
                name=WorkerId(name), slots=slots, journal=f"journal of {name}", incarnation=f"first {name}"
            )
            self.registers(name)
            self.connects(name)

    def registers(self, worker: str) -> None:
        node = self.nodes[worker]
        registration = Registration(worker=node.name, journal=node.journal, address="", slots=node.slots)
        self.tells(WorkerRegistered(registration=registration))

    def connects(self, worker: str) -> None:
        self.nodes[worker].stream = next(self._streams)
        self.reports(worker)

    def reports(self, worker: str) -> None:
        """The worker sends its next snapshot."""
        node = self.nodes[worker]
        node.number += 1
        self.tells(SnapshotReceived(snapshot=node.snapshot(self.term), stream=node.stream))

    def reconnect(self) -> None:
        """Every worker finds the new leader, which has read the commit markers of every job."""
        for job in self.jobs:
            self.markers_are_read(job)
        for name in self.nodes:
            self.registers(name)
            self.connects(name)

    def loses(self, worker: str) -> None:
        """Its lease and its stream end."""
        node = self.nodes[worker]
        self.tells(WorkerUnregistered(worker=node.name))
        self.tells(StreamClosed(worker=node.name, stream=node.stream))

    # -- trainers -------------------------------------------------------------------------------------

    def generation(self, name: str = JOB) -> GenerationState:
        found = self.jobs[JobName(name)].generation
        assert found is not None, f"{name} has no generation"
        return found

    def inflight(self, name: str = JOB) -> InflightCheckpoint:
        found = self.jobs[JobName(name)].inflight
        assert found is not None, f"{name} has no checkpoint in flight"
        return found

    def starts(self, name: str = JOB) -> None:
        """Every member takes its start command and runs its ranks."""
        generation = self.generation(name)
        for member in generation.members:
            node = self.nodes[member.worker]
            node.held[name] = Held(
                generation=generation.number,
                ranks={
                    rank: RankReport(rank=rank, state=RankState.RUNNING, pid=100 + rank, phase="starting")
                    for rank in member.ranks
                },
            )
            self.answers(member.worker, f"{name}/g{generation.number}/start", "accepted")

    def answers(self, worker: str, command: str, state: str, *, term: int | None = None, reason: str = "") -> None:
        node = self.nodes[worker]
        node.commands = [each for each in node.commands if each.id != command]
        node.commands.append(
            CommandReport(id=command, state=state, term=self.term if term is None else term, reason=reason)
        )
        self.reports(worker)

    def trains(
        self, name: str = JOB, *, step: int, until: int = 0, step_s: float = 0.1, phase: str = "training"
    ) -> None:
        """Every rank of the job reports this progress."""
        for member in self.generation(name).members:
            for rank in member.ranks:
                self._rank(
                    name,
                    rank,
                    phase=phase,
                    completed_step=Step(step),
                    until_step=Step(until),
                    tracking=True,
                    step_s=step_s,
                )
            self.reports(member.worker)

    def says(self, rank: int, *, name: str = JOB, **changes: object) -> None:
        """One rank reports these changes."""
        self._rank(name, rank, **changes)
        self.reports(self._worker_of(name, rank))

    def stands_still(self, seconds: float) -> None:
        """Time passes, and every worker reports at each heartbeat that nothing has changed."""
        for _ in range(round(seconds / HEARTBEAT_S)):
            self.passes(HEARTBEAT_S)
            for worker in self.nodes:
                self.reports(worker)

    def exits(
        self,
        rank: int,
        code: int,
        *,
        name: str = JOB,
        error: str = "",
        at_s: float = 0.0,
        traceback: str = "",
        ended_for: str = "",
    ) -> None:
        """One rank ends and its worker reports it."""
        told = {"exit_code": code, "error": error, "exited_at": at_s, "traceback": traceback, "ended_for": ended_for}
        self._rank(name, rank, state=RankState.EXITED, **told)
        self.reports(self._worker_of(name, rank))

    def finish(self, name: str = JOB) -> None:
        """Every rank ends with code 0."""
        for rank in range(self.generation(name).world_size):
            self.exits(rank, 0, name=name)

    def _worker_of(self, name: str, rank: int) -> str:
        return next(member.worker for member in self.generation(name).members if rank in member.ranks)

    def _rank(self, name: str, rank: int, **changes: object) -> None:
        held = self.nodes[self._worker_of(name, rank)].held[name]
        held.ranks[rank] = replace(held.ranks[rank], **changes)  # type: ignore[arg-type]

    def runs(self, given: JobSpec | None = None, *, step: int = 0) -> None:
        """Submit a job, start it, and let it train if a step is given. Its workers must have joined."""
        self.submits(given)
        name = given.name if given is not None else JobName(JOB)
        assert "GenerationStarted" in self.decides()
        self.starts(name)
        if step:
            self.trains(name, step=step)

    # -- checkpoints ----------------------------------------------------------------------------------

    def shard(
        self,
        rank: int,
        phase: ShardPhase,
        *,
        name: str = JOB,
        attempt: int | None = None,
        step: int | None = None,
        reason: str = "",
        packs: tuple[Pack, ...] = (),
    ) -> None:
        """One rank's shard of the attempt in flight (or of ``attempt``) is reported."""
        inflight = self.inflight(name)
        number = inflight.attempt if attempt is None else attempt
        report = ShardReport(
            checkpoint=inflight.number,
            attempt=AttemptNumber(number),
            rank=rank,
            phase=phase,
            step=Step(inflight.step if step is None else step),
            key=f"jobs/{name}/rank-{rank}",
            size_bytes=64,
            digest=DIGEST,
            reason=reason,
            packs=packs,
        )
        worker = self._worker_of(name, rank)
        self.nodes[worker].held[name].shards[number, rank] = report
        self.reports(worker)

    def acknowledges(self, *ranks: int, name: str = JOB) -> None:
        """These ranks' shards (or all ranks') are durable."""
        for rank in ranks or range(self.generation(name).world_size):
            self.shard(rank, ShardPhase.DURABLE, name=name)

    def manifest_written(self, name: str = JOB) -> None:
        attempt = self.inflight(name).attempt
        self.tells(
            ManifestWritten(
                job=JobName(name), attempt=attempt, manifest_key=f"manifest-{attempt}", manifest_digest=DIGEST
            )
        )

    def manifest_refused(self, reason: str, name: str = JOB) -> None:
        self.tells(ManifestRefused(job=JobName(name), attempt=self.inflight(name).attempt, reason=reason))

    def marker_written(self, checkpoint: int, name: str = JOB) -> None:
        self.tells(MarkerWritten(job=JobName(name), checkpoint=CheckpointNumber(checkpoint)))

    def commits(self, name: str = JOB) -> None:
        """Take a checkpoint now, on request, from the request to the marker."""
        self.asks_for_checkpoint(name)
        self.acknowledges(name=name)
        self.manifest_written(name)
        assert self.decides() == ["CheckpointCommitted"]
        number = max(self.jobs[JobName(name)].committed)
        self.marker_written(number, name)
        assert self.decides() == ["CheckpointMarked"]

    def objects_deleted(self, attempt: int, name: str = JOB) -> None:
        self.tells(ObjectsDeleted(job=JobName(name), attempt=AttemptNumber(attempt)))

    def packs_deleted(self, expired: int, name: str = JOB) -> None:
        self.tells(PacksGone(job=JobName(name), expired=expired))

    def markers_are_read(self, name: str = JOB) -> None:
        self.tells(MarkersRead(job=JobName(name), store=self.job(name).spec.store, position_seq=0, key=""))

    def restore_is(self, phase: RestorePhase, *, worker: str, name: str = JOB, reason: str = "") -> None:
        restore = self.generation(name).restore
        number = 0 if restore is None else restore.checkpoint
        self.nodes[worker].held[name].restore = RestoreReport(
            phase=phase, checkpoint=number, key="the blob" if reason else "", reason=reason
        )
        self.reports(worker)

    # -- what to look at ------------------------------------------------------------------------------

    def job(self, name: str = JOB) -> JobState:
        return self.jobs[JobName(name)]

    def last(self, type_name: str) -> Event:
        """The newest event of this type."""
        return next(record.event for record, _ in reversed(self.log) if record.type == type_name)

    def cause(self, type_name: str) -> str:
        return next(record.cause.fact for record, _ in reversed(self.log) if record.type == type_name)

    def commands(self, worker: str, name: str = JOB) -> list[Command]:
        return commands_for(self.job(name), self.observed.view(WorkerId(worker)), self.term)

    def owes(self, name: str = JOB) -> list[Effect]:
        return effects_owed(self.job(name), self.observed)
