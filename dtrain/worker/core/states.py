"""What an agent knows: the node's state, and which moves in it are legal.

The tables come first. A move that they do not hold is a broken invariant: it raises, and nothing changes.
Every record is frozen; a new state is a new record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from dtrain.common.errors import InvariantError
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step, Term, WorkerId
from dtrain.common.packs import Pack

COMMANDS_MAX = 64  # commands remembered and reported: a coordinator repeats only what its newest state asks for
NO_TERM = Term(0)  # before any leader was heard of
ASSIGNMENTS_MAX = 16  # jobs remembered: those that are over are forgotten first, the oldest first


class RankStage(StrEnum):
    """The life of one rank of one generation."""

    PENDING = "pending"  # no keeper was ever started for it
    SPAWNING = "spawning"  # the intent to start its keeper is in the journal
    RUNNING = "running"  # its trainer has a process id
    EXITED = "exited"  # the trainer and all its descendants are gone


class GenerationStage(StrEnum):
    """The life of one generation of a job on this node."""

    ACCEPTED = "accepted"  # the command is in the journal, the folders are not made
    READY = "ready"  # waits for older trainers to be gone, or for free slots
    LIVE = "live"  # its trainers were spawned
    ENDING = "ending"  # its trainers were told to end
    OVER = "over"  # all its trainers are gone


class ShardStage(StrEnum):
    """The life of one rank's part in one attempt."""

    REQUESTED = "requested"
    STAGED = "staged"  # the bytes lie in shared memory and belong to the agent
    DURABLE = "durable"  # storage confirmed them, and the journal knows it
    MISSED = "missed"  # the rank had already passed the step
    FAILED = "failed"


class RestoreStage(StrEnum):
    """The life of a restore on this node."""

    NONE = "none"
    FETCHING = "fetching"
    READY = "ready"
    DAMAGED = "damaged"


class CommandStage(StrEnum):
    ACCEPTED = "accepted"
    DONE = "done"
    REFUSED = "refused"


class CommandKind(StrEnum):
    NOOP = "noop"
    START = "start trainers"
    STAGE = "stage checkpoint"
    STOP = "stop trainers"
    STACKS = "take stacks"


RANK_MOVES: Mapping[RankStage, frozenset[RankStage]] = {
    RankStage.PENDING: frozenset({RankStage.SPAWNING, RankStage.EXITED}),
    RankStage.SPAWNING: frozenset({RankStage.RUNNING, RankStage.EXITED}),
    RankStage.RUNNING: frozenset({RankStage.EXITED}),
    RankStage.EXITED: frozenset(),
}
GENERATION_MOVES: Mapping[GenerationStage, frozenset[GenerationStage]] = {
    GenerationStage.ACCEPTED: frozenset({GenerationStage.READY, GenerationStage.OVER}),
    GenerationStage.READY: frozenset({GenerationStage.LIVE, GenerationStage.OVER}),
    GenerationStage.LIVE: frozenset({GenerationStage.ENDING, GenerationStage.OVER}),
    GenerationStage.ENDING: frozenset({GenerationStage.OVER}),
    GenerationStage.OVER: frozenset(),
}
SHARD_MOVES: Mapping[ShardStage, frozenset[ShardStage]] = {
    ShardStage.REQUESTED: frozenset({ShardStage.STAGED, ShardStage.MISSED, ShardStage.FAILED}),
    ShardStage.STAGED: frozenset({ShardStage.DURABLE, ShardStage.FAILED}),
    ShardStage.DURABLE: frozenset(),
    ShardStage.MISSED: frozenset(),
    ShardStage.FAILED: frozenset(),
}
RESTORE_MOVES: Mapping[RestoreStage, frozenset[RestoreStage]] = {
    RestoreStage.NONE: frozenset(),
    RestoreStage.FETCHING: frozenset({RestoreStage.READY, RestoreStage.DAMAGED}),
    RestoreStage.READY: frozenset(),
    RestoreStage.DAMAGED: frozenset(),
}


_Stage = TypeVar("_Stage", bound=StrEnum)


def move(table: Mapping[_Stage, frozenset[_Stage]], old: _Stage, new: _Stage, of: str) -> _Stage:
    """Return ``new`` if the table allows the move; ``of`` names the entity in the error."""
    if new not in table[old]:
        raise InvariantError(f"{of}: {type(old).__name__} cannot go from {old} to {new}")
    return new


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPosition:
    """Where in a job's event log a command comes from."""

    seq: int  # sequence number of the event, >= 1
    digest: str  # chain digest of the event


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSource:
    """The committed checkpoint that a generation starts from."""

    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    step: Step
    manifest_key: str
    manifest_digest: str
    store: str  # URI of the store that it lies in; an earlier run may have used another


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainersSpec:
    """What a generation runs on this node, as commanded. Local rank i is rank first_rank + i."""

    python: str
    script: str
    args: tuple[str, ...]
    cwd: str
    env: Mapping[str, str]
    world_size: int
    nnodes: int
    node_rank: int
    first_rank: int
    nproc: int  # >= 1; each takes one slot
    master_address: str
    master_port: int
    restarts: int  # generations that failed before this one
    max_restarts: int
    store: str  # URI of the job's store
    restore: RestoreSource | None  # None: start from step 0
    no_python: bool = False  # the script is a program of its own: no interpreter is put before it
    save_last: bool = False  # trainers wait after their last step until that is staged


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIndex:
    """The index of a rank in the committed checkpoint that an attempt builds upon."""

    rank: int
    index_key: str
    index_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRequest:
    """The newest attempt asked of a generation."""

    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    step: Step
    store: str
    committed_attempt: int = 0  # of the newest checkpoint to restore from, whose bytes stay in memory; 0: none
    bases: tuple[BaseIndex, ...] = ()  # of this node's ranks; one that has none sends all


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitFact:
    """How a trainer ended."""

    code: int | None  # >= 0: exit code; < 0: minus the signal; None: nobody saw it
    at_unix_s: float
    error: str  # one line: what it said last
    traceback: str = ""  # of the exception that ended it, bounded; empty if none is known
    out_of_memory: str = ""  # what is known, if the kernel killed for want of memory just then; else empty
    ended_for: str = ""  # why this node told it to end; empty if it did not


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """One rank of the newest generation. Everything from ``phase`` to ``metrics_json`` is the trainer's word."""

    rank: int
    stage: RankStage = RankStage.PENDING
    pid: int = 0  # 0 while unknown
    phase: str = "starting"
    completed_step: int = 0
    until_step: int = 0  # 0 while unknown
    tracking: bool = False
    step_s: float = 0.0  # duration of its last step
    metrics_json: str = ""
    stack: str = ""  # where it stood when stacks were asked for last, or why that is not known
    stack_number: int = 0  # of the asking that ``stack`` answers; 0: none yet
    exit: ExitFact | None = None  # set exactly when EXITED

    @property
    def takes_slot(self) -> bool:
        return self.stage in (RankStage.SPAWNING, RankStage.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetiringRank:
    """A rank of an older generation whose exit is not a fact yet. It still takes its slot."""

    generation: Generation
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardAttempt:
    """One rank's part in the newest attempt."""

    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    step: Step
    rank: int
    stage: ShardStage = ShardStage.REQUESTED
    key: str = ""  # these seven are set once DURABLE
    size_bytes: int = 0
    digest: str = ""
    index_key: str = ""
    index_digest: str = ""
    packs: tuple[Pack, ...] = ()
    state_bytes: int = 0  # of the rank's whole state
    reason: str = ""  # set once FAILED

    @property
    def is_settled(self) -> bool:
        return self.stage in (ShardStage.DURABLE, ShardStage.MISSED, ShardStage.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreProgress:
    stage: RestoreStage = RestoreStage.NONE
    key: str = ""  # once DAMAGED: the blob that is missing or wrong
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What this node holds of one job: the newest generation it was told of, and what became of it."""

    job: JobName
    generation: Generation
    stage: GenerationStage
    spec: TrainersSpec | None  # None: a stop was all this node ever heard of the generation
    ranks: tuple[RankRun, ...] = ()  # by rank; empty exactly when spec is None
    retiring: tuple[RetiringRank, ...] = ()  # while not empty, nothing of this generation is spawned
    stopped_through: int = 0  # generations up to this one were stopped and never start again
    grace_s: float = 0.0  # of the newest stop: SIGKILL follows SIGTERM after this many seconds
    fenced: str = ""  # why the agent ended the trainers by itself; empty if it did not
    checkpoint: CheckpointRequest | None = None
    shards: tuple[ShardAttempt, ...] = ()  # one a rank while checkpoint is set, by rank
    restore: RestoreProgress = field(default_factory=RestoreProgress)
    position: LogPosition | None = None  # highest log position of the job that reached this node
    cleaned: bool = False  # its folders in shared memory are gone
    keep_arena: bool = False  # the newest stop said that the next generation may start here
    arena_gone: bool = False  # the job's stage slots were given back

    @property
    def newest(self) -> int:
        """The newest generation that this node has heard of."""
        return max(self.generation, self.stopped_through)

    @property
    def slots_used(self) -> int:
        return sum(run.takes_slot for run in self.ranks) + len(self.retiring)

    @property
    def stopped(self) -> bool:
        return self.stopped_through >= self.generation


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRecord:
    """One command and what became of it."""

    id: str
    kind: CommandKind
    job: str  # empty for Noop
    generation: int
    attempt: int  # of StageCheckpoint; the number of TakeStacks; else 0
    stage: CommandStage
    term: Term  # of the leader whose command this answers; of several copies, the newest
    reason: str = ""  # set once REFUSED


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """Everything the agent knows about its node."""

    worker: WorkerId
    slots: int  # >= 1. Invariant: the ranks that take a slot are never more
    fence_after_s: float  # without a coordinator for so long, the trainers are ended
    term: Term = NO_TERM  # highest seen; a command of a lower one is refused
    coordinator_seen_at: float = 0.0  # on the clock of ``now``
    stopping: bool = False  # the agent was asked to leave; nothing starts any more
    assignments: Mapping[JobName, Assignment] = field(default_factory=dict)
    commands: tuple[CommandRecord, ...] = ()  # latest last, at most COMMANDS_MAX

    @property
    def slots_used(self) -> int:
        return sum(assignment.slots_used for assignment in self.assignments.values())

    @property
    def is_starting(self) -> bool:
        """Whether some rank of this node has not done its first step yet, or is about to start."""
        return any(
            run.stage is not RankStage.EXITED and (run.stage is not RankStage.RUNNING or run.completed_step == 0)
            for assignment in self.assignments.values()
            for run in assignment.ranks
        )
