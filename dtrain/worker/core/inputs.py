"""Everything that can happen to an agent, as facts. The shell makes them; the machine only reads them."""

from dataclasses import dataclass

from dtrain.common.names import AttemptNumber, Generation, JobName, Term
from dtrain.common.packs import Pack
from dtrain.worker.core.states import CheckpointRequest, ExitFact, LogPosition, TrainersSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Noop:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTrainers:
    spec: TrainersSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCheckpoint:
    request: CheckpointRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTrainers:
    grace_s: float  # 0: SIGKILL at once
    keep_arena: bool = False  # the job's next generation may start here


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeStacks:
    number: int  # >= 1


CommandBody = Noop | StartTrainers | StageCheckpoint | StopTrainers | TakeStacks


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandReceived:
    term: Term  # of the leader that sent it
    id: str
    job: JobName  # empty for Noop
    generation: Generation  # 0 for Noop
    position: LogPosition | None
    body: CommandBody


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldersReady:
    job: JobName
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldersFailed:
    """The generation cannot run here: its folders could not be made."""

    job: JobName
    generation: Generation
    exit: ExitFact


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerStarted:
    job: JobName
    generation: Generation
    rank: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerExited:
    """The trainer and its descendants are gone, and its mailbox was read for the last time before this."""

    job: JobName
    generation: Generation
    rank: int
    exit: ExitFact


@dataclass(frozen=True, slots=True, kw_only=True)
class MailboxSeen:
    """What a rank's mailbox holds now."""

    job: JobName
    generation: Generation
    rank: int
    phase: str
    completed_step: int
    until_step: int
    tracking: bool
    staged: int  # packed (attempt, step) of the newest staged state; 0: none
    staged_slot: int
    staged_bytes: int
    missed: int  # packed
    stage_failed: int  # packed
    error: str  # why the staging failed
    step_s: float
    metrics_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadDone:
    """Storage confirmed the shard."""

    job: JobName
    generation: Generation
    rank: int
    attempt: AttemptNumber
    key: str
    size_bytes: int
    digest: str
    index_key: str
    index_digest: str
    packs: tuple[Pack, ...] = ()  # what else the rank's state lies in
    state_bytes: int = 0  # of the rank's whole state


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadFailed:
    job: JobName
    generation: Generation
    rank: int
    attempt: AttemptNumber
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReady:
    """Every local rank's shard is verified and lies in its folder."""

    job: JobName
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreDamaged:
    job: JobName
    generation: Generation
    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StackTaken:
    """Where a rank stands, or why that cannot be said."""

    job: JobName
    generation: Generation
    rank: int
    number: int  # of the TakeStacks that asked
    stack: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TermSeen:
    """A leader of this term speaks to us."""

    term: Term


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSeen:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """The agent itself is to leave."""

    grace_s: float


Input = (
    CommandReceived
    | FoldersReady
    | FoldersFailed
    | TrainerStarted
    | TrainerExited
    | MailboxSeen
    | UploadDone
    | UploadFailed
    | RestoreReady
    | RestoreDamaged
    | StackTaken
    | TermSeen
    | CoordinatorSeen
    | Tick
    | StopRequested
)
