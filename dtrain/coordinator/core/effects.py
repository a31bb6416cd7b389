"""The I/O that the coordinator itself owes, derived from desired state and facts.

Owed until a fact says it is done, so a crash before, during or after it heals by itself: both objects are
created once and hold nothing that two leaders would write differently.
"""

from dataclasses import dataclass, field

from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName
from dtrain.coordinator.core.checkpoints import acknowledged
from dtrain.coordinator.core.events import ShardRecord
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.retention import sweepable
from dtrain.coordinator.core.states import CommittedCheckpoint, InflightCheckpoint, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteManifest:
    """Owed once every rank of the attempt in flight has acknowledged; precedes the commit."""

    job: JobName
    store: str
    inflight: InflightCheckpoint
    world_size: int
    shards: tuple[ShardRecord, ...]

    @property
    def key(self) -> tuple[str, JobName, AttemptNumber]:
        return ("manifest", self.job, self.inflight.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteMarker:
    """Owed for every committed checkpoint until storage has confirmed it; follows the commit."""

    job: JobName
    store: str
    checkpoint: CommittedCheckpoint

    @property
    def key(self) -> tuple[str, JobName, CheckpointNumber]:
        return ("marker", self.job, self.checkpoint.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadMarkers:
    """Owed for each active job when a leadership begins, and every few minutes.

    A marker from beyond the log's end shows that the log lost events. One without its manifest is a deposed leader's
    late word about a checkpoint that was deleted meanwhile: it promises what is gone, and goes too.
    """

    job: JobName
    store: str
    # Checkpoints of which nothing need be read: the log says what their markers say. None are known so the first time.
    known: frozenset[CheckpointNumber] = field(default=frozenset(), compare=False)

    @property
    def key(self) -> tuple[str, JobName, int]:
        return ("audit", self.job, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteAttempt:
    """Owed for an expired checkpoint, and for an aborted attempt that may be swept."""

    job: JobName
    store: str
    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    committed: bool  # it has a marker, which goes first
    # The packs that are kept, or expire by an event of their own; what else the attempt packed, nobody ever named.
    # No part of what the effect is: they only ever become fewer, so an older list keeps too much and never too little.
    keep: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def key(self) -> tuple[str, JobName, AttemptNumber]:
        return ("delete", self.job, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletePacks:
    """Owed for packs that have expired."""

    job: JobName
    store: str
    expired: int  # sequence number of the event
    packs: tuple[str, ...]  # their keys

    @property
    def key(self) -> tuple[str, JobName, int]:
        return ("packs", self.job, self.expired)


Effect = WriteManifest | WriteMarker | ReadMarkers | DeleteAttempt | DeletePacks


def effects_owed(job: JobState, observed: Observed) -> list[Effect]:
    """What is owed for ``job`` right now."""
    owed: list[Effect] = [
        WriteMarker(job=job.name, store=checkpoint.store, checkpoint=checkpoint)
        for number, checkpoint in job.committed.items()
        if not checkpoint.marked and not checkpoint.expired and (job.name, number) not in observed.markers
    ]
    owed += _deletions(job, observed)
    owed += [
        DeletePacks(job=job.name, store=doomed.store, expired=number, packs=doomed.keys)
        for number, doomed in job.doomed.items()
        if (job.name, number) not in observed.packs_deleted
    ]
    read = (job.name, job.spec.store)
    if job.spec.store and not job.ended and (read not in observed.audited or read in observed.audits_due):
        known = frozenset(job.committed) if read in observed.audited else frozenset()
        owed.append(ReadMarkers(job=job.name, store=job.spec.store, known=known))
    inflight, generation = job.inflight, job.generation
    if inflight is not None and generation is not None and (job.name, inflight.attempt) not in observed.manifests:
        shards = acknowledged(job, generation, inflight, observed)
        if shards is not None:
            owed.append(
                WriteManifest(
                    job=job.name,
                    store=job.spec.store,
                    inflight=inflight,
                    world_size=generation.world_size,
                    shards=shards,
                )
            )
    return owed


def _deletions(job: JobState, observed: Observed) -> list[DeleteAttempt]:
    keep = frozenset(job.packs)
    doomed = [
        DeleteAttempt(job=job.name, store=c.store, checkpoint=number, attempt=c.attempt, committed=True, keep=keep)
        for number, c in job.committed.items()
        if c.expired
    ]
    doomed += [
        DeleteAttempt(job=job.name, store=a.store, checkpoint=a.checkpoint, attempt=a.attempt, committed=False)
        for a in sweepable(job)
    ]
    return [deletion for deletion in doomed if (job.name, deletion.attempt) not in observed.deleted]
