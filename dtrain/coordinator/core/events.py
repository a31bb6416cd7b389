"""Every decision the coordinator can take, as it stands in the log for ever.

An event is past tense and holds what was decided, never how it is carried out. Fields are only ever added
with defaults, because the logs of old runs are replayed for ever.
"""

from dataclasses import dataclass
from enum import StrEnum

from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, Step, WorkerId
from dtrain.common.packs import Pack
from dtrain.common.specs import JobSpec

_NO_STEP = Step(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """The observed fact that led to a decision, so that any decision can be explained from the log alone."""

    fact: str  # snake_case name of the fact: trainer_exited, node_lost, client_request, ...
    worker: str = ""
    snapshot: int = 0  # number of the worker's snapshot that showed it; 0 if it came from elsewhere
    rank: int = -1
    exit_code: int = 0
    detail: str = ""
    traceback: str = ""  # of the exception that is the fact, if it is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node of a generation: ranks first_rank to first_rank + nproc - 1 run there."""

    worker: WorkerId
    journal: str  # the journal it had when chosen; another journal means the node's memory is gone
    node_rank: int
    first_rank: int
    nproc: int

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.nproc)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePoint:
    """The committed checkpoint that a generation starts from."""

    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    step: Step
    manifest_key: str
    manifest_digest: str
    store: str  # the run that wrote it may have used another store than this one


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One rank's blob as its worker acknowledged it."""

    rank: int
    key: str
    size_bytes: int
    digest: str
    index_key: str = ""
    index_digest: str = ""
    packs: tuple[Pack, ...] = ()  # what else the rank's state lies in
    state_bytes: int = 0  # of the whole state of the rank, packs included; 0: as much as size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSubmitted:
    spec: JobSpec
    run: int  # 1 for the first run of this name
    request: str  # the client's id of this submission; a repeated one submits nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInterrupted:
    """The run's launcher is gone and with it the run; the job may be continued by a new run."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequested:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStarted:
    generation: Generation
    members: tuple[Member, ...]
    world_size: int
    master_address: str
    master_port: int
    restore: RestorePoint | None = None  # None: step 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MembersFinished:
    """Every rank on these workers has ended well, and others go on. What becomes of their nodes costs nothing now."""

    generation: Generation
    workers: tuple[WorkerId, ...]


class FailureKind(StrEnum):
    """Who is to answer for a failure."""

    UNKNOWN = ""  # a worker refused to start it; or the log was written before kinds were told apart
    SCRIPT = "script"  # the user's code: an exception, an exit code, a crash of its own process
    CONNECTION = "connection"  # ranks lost each other, and nothing else was seen to be wrong
    KILLED = "killed"  # a signal from outside ended the trainer
    MEMORY = "memory"  # the kernel was out of memory, and killed it
    PREEMPTED = "preempted"  # its node told it to end: its worker was shut down, fenced itself or was gone for too long
    NODE = "node"  # the worker is gone
    CHECKPOINT = "checkpoint"  # what it was to start from is damaged
    HANG = "hang"  # nothing failed and nothing moved


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A rank that failed as a consequence of another's failure."""

    rank: int
    worker: WorkerId
    exit_code: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFailed:
    generation: Generation
    reason: str  # one line for people
    counted: bool  # it used one of the job's restarts
    exit_code: int = 1  # what the job would exit with if it ended now
    error: str = ""  # the failed trainer's last words
    progressed: bool = False  # some rank joined or completed a step in this generation
    kind: FailureKind = FailureKind.UNKNOWN
    step: Step = _NO_STEP  # completed by the rank that failed first; for a lost worker, by the furthest rank
    furthest_step: Step = _NO_STEP  # completed by any rank
    victims: tuple[Victim, ...] = ()  # as far as known when it was decided; bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class HangSuspected:
    """No rank completed a step for too long: every rank is asked where it stands."""

    generation: Generation
    number: int  # counts the suspicions of this generation, from 1
    steps_sum: int  # completed steps of all its ranks together: any progress changes it
    idle_s: float
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HangCleared:
    """The suspicion was wrong."""

    generation: Generation
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStack:
    """Where a rank stood."""

    rank: int
    worker: str
    step: int  # completed
    stack: str  # its main thread's newest frames, newest first; or why they are not known


@dataclass(frozen=True, slots=True, kw_only=True)
class HangFound:
    """The generation hangs. It fails next."""

    generation: Generation
    number: int
    idle_s: float
    culprit: int  # the rank that the others seem to wait for; -1: they all stand alike
    victims: tuple[int, ...]  # the other ranks; bounded
    stacks: tuple[RankStack, ...]  # of the culprit first, then of some others


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointStarted:
    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    generation: Generation
    step: Step
    base: int = 0  # the committed checkpoint whose packs and unchanged tensors it may build upon; 0 for none


@dataclass(frozen=True, slots=True, kw_only=True)
class SalvageStarted:
    """The generation has failed; what it had staged is waited for before the next one starts."""

    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    generation: Generation
    step: Step
    wait_s: float  # at most, from the time of this event
    reason: str  # why the generation failed


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointAborted:
    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    reason: str
    missed: bool = False  # a rank had already passed the step: choose further ahead next time


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommitted:
    """The commit point of a checkpoint."""

    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    generation: Generation
    step: Step
    world_size: int
    shards: tuple[ShardRecord, ...]
    store: str
    manifest_key: str
    manifest_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMarked:
    """Storage confirmed the commit marker."""

    checkpoint: CheckpointNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointQuarantined:
    checkpoint: CheckpointNumber
    key: str  # the damaged blob
    reason: str
    suspect: bool = False  # its bytes are sound; what it leads to says that its state is not


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPinned:
    """A person wants this checkpoint kept, or does not want it any more."""

    checkpoint: CheckpointNumber
    pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointExpired:
    """The checkpoint is never used again; its objects may be deleted from now on."""

    checkpoint: CheckpointNumber
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDeleted:
    """Storage confirmed that nothing of an expired checkpoint is left."""

    checkpoint: CheckpointNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptSwept:
    """Storage confirmed that nothing of an aborted attempt is left."""

    checkpoint: CheckpointNumber
    attempt: AttemptNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class PacksExpired:
    """No checkpoint names these packs, and none ever will again; they may be deleted from now on."""

    keys: tuple[str, ...]  # sorted
    store: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PacksDeleted:
    """Storage confirmed that the packs of one PacksExpired are gone."""

    expired: int  # sequence number of that event


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSucceeded:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailed:
    reason: str
    exit_code: int
    cleared: CheckpointNumber | None = None  # it was suspected, was not at fault, and may be restored from again


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCancelled:
    pass


Event = (
    JobSubmitted
    | RunInterrupted
    | CancelRequested
    | GenerationStarted
    | MembersFinished
    | GenerationFailed
    | HangSuspected
    | HangCleared
    | HangFound
    | CheckpointStarted
    | SalvageStarted
    | CheckpointAborted
    | CheckpointCommitted
    | CheckpointMarked
    | CheckpointQuarantined
    | CheckpointPinned
    | CheckpointExpired
    | CheckpointDeleted
    | AttemptSwept
    | PacksExpired
    | PacksDeleted
    | JobSucceeded
    | JobFailed
    | JobCancelled
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """An event about to be appended, with the fact it answers."""

    event: Event
    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a job's log stands."""

    seq: int  # sequence number of the last event, 0 before the first
    digest: str  # chain digest of that event's bytes; of nothing before the first


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEvent:
    """One event as it stands in the log."""

    job: str
    seq: int
    term: int
    time: float  # unix time of the decision, for people; no rule reads it across leaders but the checkpoint interval
    type: str
    event: Event
    cause: Cause
    prev: str
    key: str  # its key in etcd
    digest: str  # chain digest of its bytes

    @property
    def position(self) -> Position:
        return Position(seq=self.seq, digest=self.digest)
