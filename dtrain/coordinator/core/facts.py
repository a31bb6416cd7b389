"""Everything the coordinator can observe. Facts are the only input of its decisions besides its own log."""

from dataclasses import dataclass
from enum import StrEnum

from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step, Term, WorkerId
from dtrain.common.packs import Pack
from dtrain.common.specs import JobSpec

_NO_STEP = Step(0)


class RankState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    EXITED = "exited"


class ShardPhase(StrEnum):
    REQUESTED = "requested"
    STAGED = "staged"
    DURABLE = "durable"
    MISSED = "missed"
    FAILED = "failed"


class RestorePhase(StrEnum):
    NONE = "none"
    FETCHING = "fetching"
    READY = "ready"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How far an upload or a restore is. Shown to people; two rules read it: paces.py, checkpoints.py."""

    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    rank: int
    state: RankState
    pid: int = 0
    phase: str = ""  # the trainer's own word
    completed_step: Step = _NO_STEP
    until_step: Step = _NO_STEP  # 0 while unknown
    tracking: bool = False  # the script can be checkpointed
    step_s: float = 0.0  # duration of its last step; 0 before the first
    metrics_json: str = ""
    exit_code: int = 0  # once exited; below 0: minus the signal
    exit_unknown: bool = False  # nobody saw the exit
    error: str = ""
    exited_at: float = 0.0  # unix time
    traceback: str = ""  # of the exception that ended it; empty if none is known
    out_of_memory: str = ""  # what is known of the kernel's kill for want of memory; empty: it counted none just then
    ended_for: str = ""  # why its own node told it to end; empty if it did not
    stack: str = ""  # where it stands, newest frame first; or why that is not known
    stack_number: int = 0  # of the suspicion that ``stack`` answers; 0: none yet
    upload: Transfer | None = None  # of its staged state, while it is under way

    @property
    def failed(self) -> bool:
        return self.state is RankState.EXITED and (self.exit_unknown or self.exit_code != 0)

    @property
    def succeeded(self) -> bool:
        return self.state is RankState.EXITED and not self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    rank: int
    phase: ShardPhase
    step: Step
    key: str = ""
    size_bytes: int = 0
    digest: str = ""
    reason: str = ""
    index_key: str = ""
    index_digest: str = ""
    packs: tuple[Pack, ...] = ()
    state_bytes: int = 0  # of the rank's whole state


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    phase: RestorePhase
    checkpoint: int = 0
    key: str = ""  # the damaged blob
    reason: str = ""
    transfer: Transfer | None = None  # of what all ranks of the node need, while it is under way


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentReport:
    """What a worker holds of one job."""

    job: JobName
    generation: Generation
    phase: str
    ranks: tuple[RankReport, ...]
    shards: tuple[ShardReport, ...]
    restore: RestoreReport
    position_seq: int  # highest log position of the job that reached the worker
    position_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandReport:
    id: str
    state: str  # accepted, done, refused
    term: int  # of the leader whose command this answers
    reason: str = ""

    def taken_from(self, term: int) -> bool:
        """True if the worker needs this command no more from a leader of ``term``."""
        return self.state != "refused" or self.term >= term

    def refused_by(self, term: int) -> bool:
        """True if the worker refused it although it came from a leader of ``term`` or newer."""
        return self.state == "refused" and self.term >= term


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    worker: WorkerId
    journal: str
    incarnation: str
    number: int
    term: Term  # highest term the worker has seen
    version: str
    host: str
    address: str  # host:port
    slots: int
    rendezvous_port: int
    phase: str
    assignments: tuple[AssignmentReport, ...]
    commands: tuple[CommandReport, ...]
    leaving: bool = False  # its agent was asked to end: it ends what it runs, and starts nothing any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A worker's key in etcd; present while its lease lives."""

    worker: WorkerId
    journal: str
    address: str
    slots: int
    fence_after_s: float = 0.0  # without a coordinator for so long, it ends what it runs; 0: it does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRegistered:
    registration: Registration


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUnregistered:
    worker: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamClosed:
    worker: WorkerId
    stream: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotReceived:
    snapshot: WorkerSnapshot
    stream: int  # grows with each stream the leader accepts; an older stream's snapshot says nothing new


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitAsked:
    spec: JobSpec
    request: str
    takes_over: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAsked:
    job: JobName


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointAsked:
    job: JobName
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestWritten:
    job: JobName
    attempt: AttemptNumber
    manifest_key: str
    manifest_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRefused:
    job: JobName
    attempt: AttemptNumber
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkerWritten:
    job: JobName
    checkpoint: CheckpointNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsDeleted:
    """Storage confirmed that nothing of this attempt is left."""

    job: JobName
    attempt: AttemptNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class PacksGone:
    """Storage confirmed that no pack is left of those that expired with an event."""

    job: JobName
    expired: int  # sequence number of the event


@dataclass(frozen=True, slots=True, kw_only=True)
class PinAsked:
    job: JobName
    checkpoint: CheckpointNumber
    pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineAsked:
    """A person's verification found a checkpoint damaged."""

    job: JobName
    checkpoint: CheckpointNumber
    key: str  # the damaged blob
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkersRead:
    """What the commit markers of a job in its store say about how long its log once was."""

    job: JobName
    store: str
    position_seq: int  # highest log position of any marker; 0 if there is none
    key: str  # of that marker


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationsListed:
    """All workers that are registered now have been told of. Of the others, none has a lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time passed."""


Request = SubmitAsked | CancelAsked | CheckpointAsked | PinAsked | QuarantineAsked

Fact = (
    WorkerRegistered
    | WorkerUnregistered
    | RegistrationsListed
    | StreamClosed
    | SnapshotReceived
    | ManifestWritten
    | ManifestRefused
    | MarkerWritten
    | MarkersRead
    | ObjectsDeleted
    | PacksGone
    | Ticked
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """The time, as an argument."""

    wall_s: float  # unix time; goes into events for people, and times the checkpoint interval
    mono_s: float  # of this leader's own clock; measures how long something has been observed
