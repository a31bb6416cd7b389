"""Observed state: the latest facts, folded. Never persisted; a new leader starts with none and asks again.

`Observed.apply` is the only writer of facts. It returns the jobs a fact touches, so that the work per fact is
proportional to what changed. What the log says by then, and who went away long ago, is dropped again.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import assert_never

from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Term, WorkerId
from dtrain.coordinator.core.facts import (
    AssignmentReport,
    Fact,
    ManifestRefused,
    ManifestWritten,
    MarkersRead,
    MarkerWritten,
    Now,
    ObjectsDeleted,
    PacksGone,
    Registration,
    RegistrationsListed,
    SnapshotReceived,
    StreamClosed,
    Ticked,
    WorkerRegistered,
    WorkerSnapshot,
    WorkerUnregistered,
)
from dtrain.coordinator.core.hearing import Hearing
from dtrain.coordinator.core.states import JobState
from dtrain.coordinator.core.step_clocks import StepClocks

# A worker counts as lost when it has neither a lease nor a stream for a while. Where this leader saw the lease end,
# the worker has had the lease's whole time to live to come back, and only a stream that is opened again is waited for,
# or a key that a late put of an earlier life took along with its own lease: its owner puts that right at once.
LOST_AFTER_S = 0.5
# Where a leader never saw the lease, the worker may not have found this leader yet.
UNSEEN_LOST_AFTER_S = 3.0
# Both are counted in time in which others reach this leader (hearing.py). While nobody does, it may be the leader that
# is cut off, and it could start nothing anyway: then only a silence of all that lasts for MUTE_AFTER_S counts.
# A stream that brings nothing for so long is none: six heartbeats. A node whose power fails closes no stream.
STREAM_SILENT_S = 3.0
# A worker that keeps its lease and tells this leader nothing for so long does not reach it, or hangs. It is not lost,
# for its ranks may well train; but nothing that is to be decided may wait for its word any longer.
MUTE_AFTER_S = 30.0
# A leader that no worker reaches for so long, though some are registered, is of no use: another may be reached.
UNREACHED_AFTER_S = 60.0
# How long what the commit markers of a store say may be old: one listing of a job's keys.
AUDIT_EVERY_S = 600.0
# A worker that has been away for so long is no longer shown: nodes come and go, each with a name of its own.
FORGET_AFTER_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """The furthest that an attempt has come, since every rank has passed its step. Times are monotonic."""

    since_s: float  # when that was first seen
    at_s: float  # when any rank was last seen further than before
    furthest: dict[int, tuple[int, int]]  # rank -> (stage, bytes sent): see checkpoints.py


@dataclass(slots=True, kw_only=True)
class WorkerView:
    """What is known about one worker."""

    worker: WorkerId
    registration: Registration | None = None  # its lease is alive
    stream: int = 0  # its open stream; 0 for none
    snapshot: WorkerSnapshot | None = None  # the newest that reached this leader
    snapshot_at_s: float = 0.0  # monotonic
    absent_since_s: float | None = None  # monotonic; since when neither lease nor stream was there
    heard_before_s: float = 0.0  # how much the leader had heard of all workers when its lease or its stream ended
    lease_ended_s: float | None = None  # monotonic; when this leader saw its lease end, with no newer one since

    @property
    def connected(self) -> bool:
        return self.stream != 0

    @property
    def journal(self) -> str:
        if self.snapshot is not None:
            return self.snapshot.journal
        return self.registration.journal if self.registration is not None else ""

    @property
    def leaving(self) -> bool:
        """Whether its agent is ending in order: what it runs is no longer its to keep."""
        return self.snapshot is not None and self.snapshot.leaving

    def assignment(self, job: JobName) -> AssignmentReport | None:
        if self.snapshot is None:
            return None
        return next((a for a in self.snapshot.assignments if a.job == job), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFact:
    """What became of the manifest of an attempt."""

    key: str = ""
    digest: str = ""
    refused: str = ""  # why it can never be written; empty if it was


@dataclass(slots=True, kw_only=True)
class Observed:
    """All observed facts of one leadership."""

    term: Term  # of this leadership
    since_s: float  # monotonic time at which this leadership began
    # Monotonic time at which this leadership first knew every registration; None: an absent lease means nothing yet.
    listed_at_s: float | None = None
    heard_before_listed_s: float = 0.0  # how much it had heard of all workers by then
    hearing: Hearing = field(init=False)
    registered_since_s: float = 0.0  # monotonic; since when there is always some worker that is registered
    workers: dict[WorkerId, WorkerView] = field(default_factory=dict)
    manifests: dict[tuple[JobName, AttemptNumber], ManifestFact] = field(default_factory=dict)
    markers: set[tuple[JobName, CheckpointNumber]] = field(default_factory=set)
    deleted: set[tuple[JobName, AttemptNumber]] = field(default_factory=set)  # confirmed by storage
    packs_deleted: set[tuple[JobName, int]] = field(default_factory=set)  # confirmed, by the event that expired them
    audited: dict[tuple[JobName, str], float] = field(default_factory=dict)  # stores whose markers were read, and when
    audits_due: set[tuple[JobName, str]] = field(default_factory=set)  # of those: read too long ago
    # Since when a run of a job could start. By run: the wait of one that was cancelled is not the next one's.
    gathers_since_s: dict[tuple[JobName, int], float] = field(default_factory=dict)
    advances: dict[tuple[JobName, AttemptNumber], Advance] = field(default_factory=dict)  # once its step is passed
    # What each upload had to go when this leader first saw it waited for: rank -> (bytes, monotonic time).
    upload_looks: dict[tuple[JobName, AttemptNumber], dict[int, tuple[int, float]]] = field(default_factory=dict)
    # When a generation's first lost connection was seen without its cause; one entry a generation that failed so.
    failing_since_s: dict[tuple[JobName, Generation], float] = field(default_factory=dict)
    clocks: dict[JobName, StepClocks] = field(default_factory=dict)  # of the newest generation that was reported
    # (generation, number of the suspicion, since when stacks are waited for)
    stacks_since_s: dict[JobName, tuple[Generation, int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hearing = Hearing(last_s=self.since_s)

    def view(self, worker: WorkerId) -> WorkerView:
        """The worker's view; one that was never seen has been absent since the leadership began."""
        if worker not in self.workers:
            self.workers[worker] = WorkerView(worker=worker, absent_since_s=self.since_s)
        return self.workers[worker]

    def lost(self, worker: WorkerId, now: Now) -> bool:
        """True once the worker has been without lease and stream for long enough, as far as etcd could say so.

        And once it was silent for so long, lease or not, that it has ended what it ran: see docs/decisions/0018.
        """
        if self.listed_at_s is None:
            return False
        view = self.view(worker)
        if view.registration is not None:
            return self.fenced(worker, now)
        if view.absent_since_s is None:  # its stream is open
            if view.lease_ended_s is None:
                return self.mute(worker, now)
            if now.mono_s - view.snapshot_at_s < STREAM_SILENT_S:
                return False
        since_s = max(view.absent_since_s or 0.0, view.lease_ended_s or 0.0, self.listed_at_s)
        patience_s = UNSEEN_LOST_AFTER_S if view.lease_ended_s is None else LOST_AFTER_S
        heard_s = self.hearing.heard_s(now.mono_s) - max(view.heard_before_s, self.heard_before_listed_s)
        silent_s = now.mono_s - max(since_s, self.hearing.last_s)
        if heard_s >= patience_s or silent_s >= MUTE_AFTER_S:
            return True
        nobody_to_hear = view.lease_ended_s is not None and not self._any_registered
        return nobody_to_hear and now.mono_s - since_s >= patience_s

    @property
    def _any_registered(self) -> bool:
        return any(view.registration is not None for view in self.workers.values())

    def unreached(self, now_s: float) -> bool:
        """True once no worker has reached this leader for so long, though some keep their leases."""
        silent_s = now_s - max(self.hearing.last_s, self.registered_since_s)
        return silent_s >= UNREACHED_AFTER_S and self._any_registered

    def mute(self, worker: WorkerId, now: Now) -> bool:
        """True once the worker has told this leader nothing for so long that nothing may wait for its word."""
        return now.mono_s - max(self.view(worker).snapshot_at_s, self.since_s) >= MUTE_AFTER_S

    def fenced(self, worker: WorkerId, now: Now) -> bool:
        """True once a worker with a lease has told this leader nothing for so long that it has ended what it ran."""
        view = self.view(worker)
        if view.registration is None or view.registration.fence_after_s <= 0:
            return False
        silent_s = now.mono_s - max(view.snapshot_at_s, self.since_s)
        return silent_s >= view.registration.fence_after_s + MUTE_AFTER_S

    def assignment(self, worker: WorkerId, job: JobName, generation: Generation) -> AssignmentReport | None:
        """The worker's report on exactly this generation of the job."""
        report = self.view(worker).assignment(job)
        return report if report is not None and report.generation == generation else None

    def apply(self, fact: Fact, now: Now) -> set[JobName]:
        """Fold one fact in and return the jobs it touches."""
        match fact:
            case WorkerRegistered(registration=registration):
                view = self.view(registration.worker)
                self.registered_since_s = self.registered_since_s if self._any_registered else now.mono_s
                view.registration = registration
                view.lease_ended_s = None
                return self._presence_changed(view, now)
            case WorkerUnregistered(worker=worker):
                view = self.view(worker)
                if view.registration is not None:
                    view.lease_ended_s, view.heard_before_s = now.mono_s, self.hearing.heard_s(now.mono_s)
                view.registration = None
                return self._presence_changed(view, now)
            case RegistrationsListed():
                if self.listed_at_s is None:
                    self.listed_at_s, self.heard_before_listed_s = now.mono_s, self.hearing.heard_s(now.mono_s)
                return set()
            case StreamClosed(worker=worker, stream=stream):
                view = self.view(worker)
                if view.stream == stream:
                    view.stream = 0
                return self._presence_changed(view, now)
            case SnapshotReceived(snapshot=snapshot, stream=stream):
                return self._snapshot(snapshot, stream, now)
            case ManifestWritten(job=job, attempt=attempt, manifest_key=key, manifest_digest=digest):
                self.manifests[job, attempt] = ManifestFact(key=key, digest=digest)
                return {job}
            case ManifestRefused(job=job, attempt=attempt, reason=reason):
                self.manifests[job, attempt] = ManifestFact(refused=reason)
                return {job}
            case MarkerWritten(job=job, checkpoint=checkpoint):
                self.markers.add((job, checkpoint))
                return {job}
            case MarkersRead(job=job, store=store):
                self.audited[job, store] = now.mono_s
                self.audits_due.discard((job, store))
                return {job}
            case ObjectsDeleted(job=job, attempt=attempt):
                self.deleted.add((job, attempt))
                return {job}
            case PacksGone(job=job, expired=expired):
                self.packs_deleted.add((job, expired))
                return {job}
            case Ticked():
                read_by_s = now.mono_s - AUDIT_EVERY_S
                self.audits_due.update(read for read, at_s in self.audited.items() if at_s <= read_by_s)
                return set()
            case unreachable:
                assert_never(unreachable)

    def _presence_changed(self, view: WorkerView, now: Now) -> set[JobName]:
        if view.registration is not None or view.connected:
            view.absent_since_s = None
        elif view.absent_since_s is None:
            view.absent_since_s, view.heard_before_s = now.mono_s, self.hearing.heard_s(now.mono_s)
        return self._jobs_of(view)

    def _snapshot(self, snapshot: WorkerSnapshot, stream: int, now: Now) -> set[JobName]:
        view = self.view(snapshot.worker)
        if stream < view.stream:
            return set()
        before = view.snapshot
        if before is not None and before.incarnation == snapshot.incarnation and before.number >= snapshot.number:
            return set()
        self.hearing.note(now.mono_s)
        touched = self._jobs_of(view)
        self._note_progress(snapshot, now.mono_s - view.snapshot_at_s if before is not None else 0.0)
        view.stream = stream
        view.snapshot = snapshot
        view.snapshot_at_s = now.mono_s
        view.absent_since_s = None
        return touched | self._jobs_of(view)

    def _note_progress(self, snapshot: WorkerSnapshot, gap_s: float) -> None:
        for report in snapshot.assignments:
            clocks = self.clocks.get(report.job)
            if clocks is None or clocks.generation < report.generation:
                clocks = self.clocks[report.job] = StepClocks(generation=report.generation)
            if clocks.generation == report.generation:
                clocks.note(report, gap_s)

    @staticmethod
    def _jobs_of(view: WorkerView) -> set[JobName]:
        return set() if view.snapshot is None else {assignment.job for assignment in view.snapshot.assignments}

    def settle(self, job: JobState) -> None:
        """Drop what the log says by now, so that memory stays bounded."""
        unmarked = {number for number, checkpoint in job.committed.items() if not checkpoint.marked}
        expired = {checkpoint.attempt for checkpoint in job.committed.values() if checkpoint.expired}
        self.markers = {(name, number) for name, number in self.markers if name != job.name or number in unmarked}
        doomed = expired | job.aborted.keys()
        self.deleted = {(name, attempt) for name, attempt in self.deleted if name != job.name or attempt in doomed}
        self.packs_deleted = {(n, number) for n, number in self.packs_deleted if n != job.name or number in job.doomed}

    def forget_absent(self, now: Now, *, but: Collection[WorkerId]) -> None:
        """Drop the workers that went away long ago. One that comes back is a worker like any other."""
        for worker, view in list(self.workers.items()):
            absent_s = now.mono_s - view.absent_since_s if view.absent_since_s is not None else 0.0
            if absent_s > FORGET_AFTER_S and worker not in but:
                del self.workers[worker]

    def forget(self, job: JobName, attempt: AttemptNumber) -> None:
        """Drop what was noted about a settled attempt, so that memory stays bounded."""
        self.manifests.pop((job, attempt), None)
        self.advances.pop((job, attempt), None)
        self.upload_looks.pop((job, attempt), None)
