"""The leader's one loop: facts in, decisions appended, then and only then acted upon.

    take a batch of facts and requests -> fold them into observed state -> reconcile the jobs they touch
    -> append everything decided as one transaction -> adopt the new desired state -> answer, send, do effects

There is one writer and it never waits for a worker or for storage: those are spoken to by tasks of their own,
which bring back facts. A leader that finds itself deposed throws all of this away; its successor replays.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from dtrain.common.errors import LogDamagedError, UserError
from dtrain.common.names import JobName, Term, WorkerId
from dtrain.coordinator import codec
from dtrain.coordinator.codec import Entry
from dtrain.coordinator.core import admissions
from dtrain.coordinator.core.commands import Command, commands_for
from dtrain.coordinator.core.effects import Effect, effects_owed
from dtrain.coordinator.core.events import Decision
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.facts import (
    CancelAsked,
    CheckpointAsked,
    Fact,
    MarkersRead,
    Now,
    PinAsked,
    QuarantineAsked,
    Request,
    SnapshotReceived,
    SubmitAsked,
    Ticked,
)
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.reconcile import DECISIONS_MAX, decide
from dtrain.coordinator.core.states import JobPhase, JobState
from dtrain.coordinator.log import Deposed, EventLog

logger = logging.getLogger(__name__)

TICK_S = 0.25  # how late a rule that waits for time alone may be
FACTS_MAX = 512  # facts folded in one round: a bound on how long the oldest waits for its answer
INBOX_MAX = 4096  # facts waiting; beyond it the streams that bring them are held back
_NOT_LEADING_ANY_MORE = "this coordinator does not lead any more"


@dataclass(slots=True, kw_only=True)
class Asked:
    """A person's request with the future of its answer: the job as it stands once the decision is durable."""

    request: Request
    answer: asyncio.Future[JobState]


@dataclass(slots=True, kw_only=True)
class Round:
    """What one pass of the loop has decided so far. Nothing of it is real until it is appended."""

    now: Now
    changed: dict[JobName, JobState] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    answers: list[tuple[asyncio.Future[JobState], JobName]] = field(default_factory=list)


class Outbox(Protocol):
    """Where the loop puts what is owed. Neither call blocks or fails; what is not done stays owed."""

    def send(self, worker: WorkerId, commands: list[Command]) -> None:
        """Replace what is owed to this worker by ``commands``."""

    def perform(self, effects: list[Effect]) -> None:
        """Perform those of ``effects`` that are not under way, and bring back facts."""


class LeaderLoop:
    """Desired and observed state of one leadership, and the loop that joins them."""

    def __init__(self, *, log: EventLog, prefix: str, jobs: dict[JobName, JobState], outbox: Outbox) -> None:
        self.jobs = jobs
        self.observed = Observed(term=log.term, since_s=time.monotonic())
        self._log = log
        self._prefix = prefix
        self._outbox = outbox
        self._inbox: asyncio.Queue[Fact | Asked] = asyncio.Queue(INBOX_MAX)
        self._waiting: set[asyncio.Future[JobState]] = set()
        self._over = False  # deposed: nobody takes from the inbox any more
        self._unfinished: set[JobName] = set()  # jobs of which one round could not decide everything
        self._ticked_s = float("-inf")  # monotonic time at which all active jobs were last reconciled

    @property
    def term(self) -> Term:
        return self._log.term

    @staticmethod
    def now() -> Now:
        return Now(wall_s=time.time(), mono_s=time.monotonic())

    async def tell(self, fact: Fact) -> None:
        """Bring a fact. Waits while the inbox is full."""
        await self._inbox.put(fact)

    async def ask(self, request: Request) -> JobState:
        """Bring a request; return the job once what was decided is durable.

        Raises UserError if refused, Deposed if this leadership is over.
        """
        if self._over:
            raise Deposed(_NOT_LEADING_ANY_MORE)
        asked = Asked(request=request, answer=asyncio.get_running_loop().create_future())
        self._waiting.add(asked.answer)
        try:
            await self._inbox.put(asked)
            return await asked.answer
        finally:
            self._waiting.discard(asked.answer)

    async def never_was(self, term: int) -> bool:
        """Whether no leader of this etcd can have had ``term``: terms are revisions, and it is newer than all."""
        return term > self.term and term > await self._log.revision()

    def owes(self, effect: Effect) -> bool:
        """Whether this effect is still owed."""
        job = self.jobs.get(effect.job)
        return job is not None and effect in effects_owed(job, self.observed)

    async def run(self) -> None:
        """Run until deposed. Raises Deposed, LogDamagedError or InvariantError."""
        try:
            while True:
                await self._round(await self._take())
        finally:
            self._over = True
            for answer in self._waiting:
                if not answer.done():
                    answer.set_exception(Deposed(_NOT_LEADING_ANY_MORE))

    async def _take(self) -> list[Fact | Asked]:
        try:
            async with asyncio.timeout(TICK_S):
                batch = [await self._inbox.get()]
        except TimeoutError:
            return [Ticked()]
        while not self._inbox.empty() and len(batch) < FACTS_MAX:
            batch.append(self._inbox.get_nowait())
        return batch

    async def _round(self, batch: list[Fact | Asked]) -> None:
        now = self.now()
        this = Round(now=now)
        touched = self._due(now) | self._unfinished
        self._unfinished.clear()
        workers: set[WorkerId] = set()
        for item in batch:
            if isinstance(item, Asked):
                self._admit(this, item)
                continue
            touched |= self.observed.apply(item, now)
            try:
                if isinstance(item, MarkersRead):
                    self._check_markers(item)
                if isinstance(item, SnapshotReceived):
                    self._check_snapshot(item)
                    workers.add(item.snapshot.worker)
            except LogDamagedError:
                await self._log.require_newest()  # what it does not know may be its successor's
                raise
        for name in sorted(touched | this.changed.keys()):
            self._decide(this, name)
        if this.entries:
            await self._log.append(this.entries)  # persist, then act
            for entry in this.entries:
                logger.info("%s %s %s", entry.record.key, entry.record.type, entry.record.cause.fact)
        self._adopt(this)
        for name in this.changed:
            workers |= self.jobs[name].placed.keys()
        self._act(touched | this.changed.keys(), workers)

    def _due(self, now: Now) -> set[JobName]:
        """Jobs to look at even if no fact touches them: those that wait for workers, and at each tick all active.

        The first time, also ended ones: they may still be owed a commit marker.
        """
        if now.mono_s - self._ticked_s < TICK_S:
            return {name for name, job in self.jobs.items() if job.phase is JobPhase.PENDING}
        first = self._ticked_s == float("-inf")
        self._ticked_s = now.mono_s
        generations = [job.generation for job in self.jobs.values() if job.generation is not None]
        members = {member.worker for generation in generations for member in generation.members}
        self.observed.forget_absent(now, but=members)
        return {name for name, job in self.jobs.items() if first or not job.ended}

    # -- decide ------------------------------------------------------------------------------------

    def _job(self, this: Round, name: JobName) -> JobState | None:
        return this.changed.get(name, self.jobs.get(name))

    def _fold(self, this: Round, job: JobState | None, name: JobName, decision: Decision) -> JobState:
        entry = codec.record(
            decision,
            prefix=self._prefix,
            job=name,
            seq=1 if job is None else job.position.seq + 1,
            term=self.term,
            time_s=this.now.wall_s,
            prev=codec.GENESIS_DIGEST if job is None else job.position.digest,
        )
        state = evolve(job, entry.record)
        this.entries.append(entry)
        this.changed[name] = state
        return state

    def _decide(self, this: Round, name: JobName) -> None:
        job = self._job(this, name)
        if job is None:
            return
        everything = {**self.jobs, **this.changed}
        _, decisions = decide(
            job, self.observed, everything, this.now, lambda state, d: self._fold(this, state, name, d)
        )
        if len(decisions) == DECISIONS_MAX:
            self._unfinished.add(name)

    def _admit(self, this: Round, asked: Asked) -> None:
        everything = {**self.jobs, **this.changed}
        request = asked.request
        try:
            match request:
                case SubmitAsked():
                    name, decisions = request.spec.name, admissions.submit(request, self.observed, everything)
                case CancelAsked():
                    name, decisions = request.job, admissions.cancel(request, everything)
                case CheckpointAsked():
                    name = request.job
                    decisions = admissions.checkpoint(request, self.observed, everything, this.now)
                case PinAsked():
                    name, decisions = request.job, admissions.pin(request, everything)
                case QuarantineAsked():
                    name, decisions = request.job, admissions.quarantine(request, everything)
                case unreachable:
                    assert_never(unreachable)
        except UserError as error:
            if not asked.answer.done():
                asked.answer.set_exception(error)
            return
        job = self._job(this, name)
        for decision in decisions:
            job = self._fold(this, job, name, decision)
        this.answers.append((asked.answer, name))

    # -- act ---------------------------------------------------------------------------------------

    def _adopt(self, this: Round) -> None:
        for name, job in this.changed.items():
            before = self.jobs.get(name)
            settled = before.inflight if before is not None else None
            if settled is not None and (job.inflight is None or job.inflight.attempt != settled.attempt):
                self.observed.forget(name, settled.attempt)
            self.jobs[name] = job
            self.observed.settle(job)
        for answer, name in this.answers:
            if not answer.done():  # the client may have gone
                answer.set_result(self.jobs[name])

    def _act(self, touched: Iterable[JobName], workers: Iterable[WorkerId]) -> None:
        for name in touched:
            job = self.jobs.get(name)
            if job is not None:
                self._outbox.perform(effects_owed(job, self.observed))
        for worker in workers:
            view = self.observed.workers.get(worker)  # one that was forgotten stays so
            if view is None or not view.connected:
                continue
            names = {name for name, job in self.jobs.items() if worker in job.placed and not job.ended}
            if view.snapshot is not None:
                names |= {assignment.job for assignment in view.snapshot.assignments} & self.jobs.keys()
            owed = [c for name in sorted(names) for c in commands_for(self.jobs[name], view, self.term)]
            self._outbox.send(worker, owed)

    # -- what must never be ------------------------------------------------------------------------

    def _check_snapshot(self, fact: SnapshotReceived) -> None:
        """A worker that has seen more than this leader knows: a newer leader, or a log that lost its tail."""
        snapshot = fact.snapshot
        if snapshot.term > self.term:
            raise Deposed(f"worker {snapshot.worker} has seen term {snapshot.term}")
        for assignment in snapshot.assignments:
            job = self.jobs.get(assignment.job)
            known = 0 if job is None else job.position.seq
            if assignment.position_seq > known:
                raise LogDamagedError(
                    codec.event_key(self._prefix, assignment.job, known + 1),
                    f"missing: worker {snapshot.worker} has seen event {assignment.position_seq} of this job, "
                    "so the log has lost its end",
                )
            at_end = job is not None and 0 < assignment.position_seq == known
            if at_end and job is not None and assignment.position_digest != job.position.digest:
                raise LogDamagedError(
                    codec.event_key(self._prefix, assignment.job, known),
                    f"it is another event than the one worker {snapshot.worker} has seen there",
                )

    def _check_markers(self, fact: MarkersRead) -> None:
        job = self.jobs.get(fact.job)
        known = 0 if job is None else job.position.seq
        if fact.position_seq > known:
            raise LogDamagedError(
                codec.event_key(self._prefix, fact.job, known + 1),
                f"missing: the commit marker {fact.key} comes from event {fact.position_seq} of this job, "
                "so the log has lost its end",
            )
