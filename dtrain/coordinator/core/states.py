"""Desired state of one job: the fold of its events, and nothing else.

    phase         event                                   next phase
    ------------  --------------------------------------  ------------
    (none)        JobSubmitted                            PENDING
    PENDING       GenerationStarted                       RUNNING
    PENDING       JobFailed                               FAILED
    RUNNING       MembersFinished                         RUNNING
    RUNNING       GenerationFailed                        PENDING
    RUNNING       HangSuspected, then HangCleared or      RUNNING
                  HangFound, then GenerationFailed
    RUNNING       JobSucceeded                            SUCCEEDED
    PENDING,
    RUNNING       CancelRequested                         CANCELLING
    CANCELLING    JobCancelled                            CANCELLED
    PENDING, RUNNING,
    CANCELLING    RunInterrupted                          INTERRUPTED
    any ended     JobSubmitted (next run)                 PENDING

    Checkpoint events: STARTED -> ABORTED or COMMITTED; COMMITTED -> QUARANTINED; COMMITTED -> EXPIRED ->
    DELETED; ABORTED -> SWEPT. At most one is in flight, and only while RUNNING; it is settled before its
    generation ends; SalvageStarted says that a failed generation is kept for that. The newest sound one never expires.
    Packs: EXPIRED once no checkpoint names them -> DELETED.

`evolve` raises InvariantError on any other transition and changes nothing, so a log that could not have been
written by these rules is refused at replay.
"""

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum

from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step, Term, WorkerId
from dtrain.common.packs import Pack, packs_prefix
from dtrain.common.specs import JobSpec
from dtrain.coordinator.core.events import (
    FailureKind,
    HangFound,
    HangSuspected,
    Member,
    Position,
    RestorePoint,
    ShardRecord,
    Victim,
)

SIGNAL_EXIT_BASE = 128  # a shell's convention for "ended by a signal"
# A script that raises within this time of its start and never joined or completed a step cannot start at all.
CANNOT_START_WITHIN_S = 60.0
_NO_STEP = Step(0)


class JobPhase(StrEnum):
    PENDING = "pending"  # waits for workers
    RUNNING = "running"  # a generation is active
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


ENDED = frozenset({JobPhase.SUCCEEDED, JobPhase.FAILED, JobPhase.CANCELLED, JobPhase.INTERRUPTED})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationState:
    number: Generation
    members: tuple[Member, ...]  # Invariant: their ranks are 0 .. world_size-1 without gap or overlap
    world_size: int
    master_address: str
    master_port: int
    restore: RestorePoint | None
    position: Position  # of its GenerationStarted
    started_time: float  # unix time of that event
    restarts: int  # generations of this run that failed before it
    finished: tuple[WorkerId, ...] = ()  # members whose ranks have all ended well, in the order of that
    suspicions: int = 0  # how often it was suspected to hang
    suspicion: HangSuspected | None = None  # the open one
    hang: HangFound | None = None  # what the open suspicion came to


@dataclass(frozen=True, slots=True, kw_only=True)
class InflightCheckpoint:
    number: CheckpointNumber
    attempt: AttemptNumber
    generation: Generation  # Invariant: the active generation
    step: Step
    position: Position  # of its CheckpointStarted
    base: int = 0  # Invariant: committed and not expired; 0 for none
    salvage_time: float = 0.0  # unix time since when it is all that its failed generation is waited for; 0: it is not
    salvage_wait_s: float = 0.0  # how long at most

    @property
    def salvaging(self) -> bool:
        return self.salvage_time > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedCheckpoint:
    number: CheckpointNumber
    attempt: AttemptNumber
    generation: Generation
    step: Step
    world_size: int
    shards: tuple[ShardRecord, ...]
    store: str
    manifest_key: str
    manifest_digest: str
    position: Position  # of its CheckpointCommitted; carried by its commit marker
    time: float
    marked: bool = False  # storage confirmed the marker
    quarantined: str = ""  # why it is never restored from again; empty if it is sound
    pinned: bool = False  # a person wants it kept
    expired: bool = False  # decided to be deleted; Invariant: never the newest sound one

    @property
    def damaged_key(self) -> str:
        """Once quarantined: the damaged object. No key of ours holds a colon."""
        return self.quarantined.partition(": ")[0]

    @property
    def size_bytes(self) -> int:
        """Of the state that it holds."""
        return sum(shard.state_bytes or shard.size_bytes for shard in self.shards)

    def uploaded_bytes(self, job: JobName) -> int:
        """What was sent for it: its shards, and the packs that were made with it."""
        own = packs_prefix(job, self.attempt)
        fresh = sum(pack.size_bytes for pack in self.packs if pack.key.startswith(own))
        return fresh + sum(shard.size_bytes for shard in self.shards)

    @property
    def packs(self) -> frozenset[Pack]:
        """All packs that it names."""
        return frozenset(pack for shard in self.shards for pack in shard.packs)

    @property
    def restore_point(self) -> RestorePoint:
        return RestorePoint(
            checkpoint=self.number,
            attempt=self.attempt,
            step=self.step,
            manifest_key=self.manifest_key,
            manifest_digest=self.manifest_digest,
            store=self.store,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortedAttempt:
    """An attempt whose objects, if there are any, nobody will ever read."""

    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    store: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DoomedPacks:
    """Packs that have expired and are being deleted."""

    keys: tuple[str, ...]
    store: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LastFailure:
    """What the newest failed generation died of; kept to recognise a failure that repeats itself."""

    reason: str
    error: str
    exit_code: int
    progressed: bool
    age_s: float  # of the generation when it failed
    repeats: int  # errors of the script in a row that are this very one at this very place
    generation: Generation
    time: float  # unix time of the decision
    kind: FailureKind
    step: Step  # see GenerationFailed
    restored: CheckpointNumber | None  # what that generation had started from; None: from step 0
    restored_step: Step | None
    victims: tuple[Victim, ...]
    traceback: str  # of the first cause; empty if it was no exception, or none is known

    @property
    def right_after_restore(self) -> bool:
        """Whether no step was completed after the restore, or the restore itself failed."""
        return self.restored_step is not None and self.step <= self.restored_step

    def same_error(self, other: "LastFailure") -> bool:
        """Whether both died of the same. Without words only a signal says what it was."""
        said = self.error != "" or self.exit_code > SIGNAL_EXIT_BASE
        return said and (_without_addresses(self.error), self.exit_code) == (
            _without_addresses(other.error),
            other.exit_code,
        )

    @property
    def cannot_start(self) -> bool:
        """Whether it failed so early, and with words, that the script cannot have got anywhere."""
        return not self.progressed and self.error != "" and self.age_s < CANNOT_START_WITHIN_S

    @property
    def knows_place(self) -> bool:
        """Whether ``step`` says where it died. A script that counts no steps of ours may have come far by itself."""
        return self.step > 0 or self.restored is not None or self.age_s < CANNOT_START_WITHIN_S

    def same_place(self, other: "LastFailure") -> bool:
        """Whether both died at the same step from the same checkpoint: nothing was gained between them."""
        known = self.knows_place and other.knows_place
        return known and (self.step, self.restored) == (other.step, other.restored)


def _without_addresses(error: str) -> str:
    return re.sub(r"0x[0-9a-fA-F]+", "0x", error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """A checkpoint whose bytes are sound and whose state is in doubt."""

    checkpoint: CheckpointNumber
    failure: LastFailure  # what generations that started from it died of


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """Desired state of one job."""

    name: JobName
    position: Position  # of the newest event folded in
    term: Term  # of that event; never goes back
    spec: JobSpec  # of the newest run
    run: int
    request: str
    phase: JobPhase
    generation: GenerationState | None = None  # Invariant: set iff RUNNING, or CANCELLING with trainers to stop
    last_generation: int = 0  # number of the newest generation ever started
    restarts_used: int = 0  # counted failures of this run, within the spec's window at the newest failure
    restart_times: tuple[float, ...] = ()  # unix times of these; Invariant: restarts_used of them
    restarts: int = 0  # failed generations of this run, counted or not
    stalls: int = 0  # failures in a row since one that came after progress
    furthest_step: Step = _NO_STEP  # that any failed generation of this run completed, or this run began with
    last_failure: LastFailure | None = None  # of this run
    last_error: LastFailure | None = None  # newest one of the script's own, unless a later generation got further
    suspicion: Suspicion | None = None  # the one checkpoint that this run has left aside for its state
    inflight: InflightCheckpoint | None = None
    committed: dict[CheckpointNumber, CommittedCheckpoint] = field(default_factory=dict)  # until deleted
    last_checkpoint: int = 0  # newest number ever committed; numbers are not used twice
    aborted: dict[AttemptNumber, AbortedAttempt] = field(default_factory=dict)  # until swept
    packs: dict[str, str] = field(default_factory=dict)  # key -> store; named by a committed one once; until expired
    doomed: dict[int, DoomedPacks] = field(default_factory=dict)  # by the event that expired them; until deleted
    last_attempt: int = 0  # newest attempt ever started
    misses: int = 0  # attempts missed in a row
    checkpoint_time: float = 0.0  # unix time the newest attempt started, or this run was submitted
    placed: dict[WorkerId, Generation] = field(default_factory=dict)  # newest generation each worker was given
    reason: str = ""  # once ended: why
    exit_code: int = 0  # once ended

    @property
    def ended(self) -> bool:
        return self.phase in ENDED

    def got_further(self, furthest: Step) -> bool:
        """Whether the active generation, which got to ``furthest``, gained anything on those before it."""
        number = self.generation.number if self.generation is not None else 0
        committed = any(checkpoint.generation == number for checkpoint in self.committed.values())
        return committed or furthest > self.furthest_step

    @property
    def newest_restorable(self) -> CommittedCheckpoint | None:
        """The newest committed checkpoint that is neither quarantined nor expired."""
        sound = [number for number, c in self.committed.items() if not c.quarantined and not c.expired]
        return self.committed[max(sound)] if sound else None

    @property
    def next_checkpoint(self) -> CheckpointNumber:
        """An aborted attempt leaves its checkpoint's number to the next attempt."""
        return CheckpointNumber(self.last_checkpoint + 1)

    def with_checkpoint(self, checkpoint: CommittedCheckpoint) -> "JobState":
        return replace(self, committed={**self.committed, checkpoint.number: checkpoint})
