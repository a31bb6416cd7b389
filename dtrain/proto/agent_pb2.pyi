from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IDLE: _ClassVar[WorkerPhase]
    STARTING: _ClassVar[WorkerPhase]
    RESTORING: _ClassVar[WorkerPhase]
    TRAINING: _ClassVar[WorkerPhase]
    CHECKPOINTING: _ClassVar[WorkerPhase]
    STOPPING: _ClassVar[WorkerPhase]

class RankState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PENDING: _ClassVar[RankState]
    RUNNING: _ClassVar[RankState]
    EXITED: _ClassVar[RankState]

class ShardState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUESTED: _ClassVar[ShardState]
    STAGED: _ClassVar[ShardState]
    DURABLE: _ClassVar[ShardState]
    MISSED: _ClassVar[ShardState]
    FAILED: _ClassVar[ShardState]

class RestoreState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[RestoreState]
    FETCHING: _ClassVar[RestoreState]
    READY: _ClassVar[RestoreState]
    DAMAGED: _ClassVar[RestoreState]

class CommandState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACCEPTED: _ClassVar[CommandState]
    DONE: _ClassVar[CommandState]
    REFUSED: _ClassVar[CommandState]
IDLE: WorkerPhase
STARTING: WorkerPhase
RESTORING: WorkerPhase
TRAINING: WorkerPhase
CHECKPOINTING: WorkerPhase
STOPPING: WorkerPhase
PENDING: RankState
RUNNING: RankState
EXITED: RankState
REQUESTED: ShardState
STAGED: ShardState
DURABLE: ShardState
MISSED: ShardState
FAILED: ShardState
NONE: RestoreState
FETCHING: RestoreState
READY: RestoreState
DAMAGED: RestoreState
ACCEPTED: CommandState
DONE: CommandState
REFUSED: CommandState

class LogPosition(_message.Message):
    __slots__ = ("seq", "digest")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    seq: int
    digest: str
    def __init__(self, seq: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("worker", "journal", "incarnation", "number", "term", "role", "version", "host", "address", "slots", "rendezvous_port", "phase", "assignments", "commands", "leaving")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_PORT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    worker: str
    journal: str
    incarnation: str
    number: int
    term: int
    role: str
    version: str
    host: str
    address: str
    slots: int
    rendezvous_port: int
    phase: WorkerPhase
    assignments: _containers.RepeatedCompositeFieldContainer[Assignment]
    commands: _containers.RepeatedCompositeFieldContainer[CommandStatus]
    leaving: bool
    def __init__(self, worker: _Optional[str] = ..., journal: _Optional[str] = ..., incarnation: _Optional[str] = ..., number: _Optional[int] = ..., term: _Optional[int] = ..., role: _Optional[str] = ..., version: _Optional[str] = ..., host: _Optional[str] = ..., address: _Optional[str] = ..., slots: _Optional[int] = ..., rendezvous_port: _Optional[int] = ..., phase: _Optional[_Union[WorkerPhase, str]] = ..., assignments: _Optional[_Iterable[_Union[Assignment, _Mapping]]] = ..., commands: _Optional[_Iterable[_Union[CommandStatus, _Mapping]]] = ..., leaving: _Optional[bool] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("job", "generation", "phase", "ranks", "shards", "restore", "position")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    phase: WorkerPhase
    ranks: _containers.RepeatedCompositeFieldContainer[RankReport]
    shards: _containers.RepeatedCompositeFieldContainer[ShardReport]
    restore: RestoreReport
    position: LogPosition
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., phase: _Optional[_Union[WorkerPhase, str]] = ..., ranks: _Optional[_Iterable[_Union[RankReport, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[ShardReport, _Mapping]]] = ..., restore: _Optional[_Union[RestoreReport, _Mapping]] = ..., position: _Optional[_Union[LogPosition, _Mapping]] = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("rank", "state", "pid", "phase", "completed_step", "until_step", "tracking", "step_s", "metrics_json", "exit_code", "exit_unknown", "error", "exited_at", "traceback", "stack", "stack_number", "out_of_memory", "ended_for", "upload")
    RANK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEP_FIELD_NUMBER: _ClassVar[int]
    UNTIL_STEP_FIELD_NUMBER: _ClassVar[int]
    TRACKING_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    METRICS_JSON_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    EXIT_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    EXITED_AT_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    STACK_FIELD_NUMBER: _ClassVar[int]
    STACK_NUMBER_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_MEMORY_FIELD_NUMBER: _ClassVar[int]
    ENDED_FOR_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    rank: int
    state: RankState
    pid: int
    phase: str
    completed_step: int
    until_step: int
    tracking: bool
    step_s: float
    metrics_json: str
    exit_code: int
    exit_unknown: bool
    error: str
    exited_at: float
    traceback: str
    stack: str
    stack_number: int
    out_of_memory: str
    ended_for: str
    upload: Transfer
    def __init__(self, rank: _Optional[int] = ..., state: _Optional[_Union[RankState, str]] = ..., pid: _Optional[int] = ..., phase: _Optional[str] = ..., completed_step: _Optional[int] = ..., until_step: _Optional[int] = ..., tracking: _Optional[bool] = ..., step_s: _Optional[float] = ..., metrics_json: _Optional[str] = ..., exit_code: _Optional[int] = ..., exit_unknown: _Optional[bool] = ..., error: _Optional[str] = ..., exited_at: _Optional[float] = ..., traceback: _Optional[str] = ..., stack: _Optional[str] = ..., stack_number: _Optional[int] = ..., out_of_memory: _Optional[str] = ..., ended_for: _Optional[str] = ..., upload: _Optional[_Union[Transfer, _Mapping]] = ...) -> None: ...

class Transfer(_message.Message):
    __slots__ = ("bytes_done", "bytes_total")
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    bytes_done: int
    bytes_total: int
    def __init__(self, bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ...) -> None: ...

class ShardReport(_message.Message):
    __slots__ = ("checkpoint", "attempt", "rank", "state", "step", "key", "size_bytes", "digest", "reason", "index_key", "index_digest", "packs", "state_bytes")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    INDEX_KEY_FIELD_NUMBER: _ClassVar[int]
    INDEX_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PACKS_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    checkpoint: int
    attempt: int
    rank: int
    state: ShardState
    step: int
    key: str
    size_bytes: int
    digest: str
    reason: str
    index_key: str
    index_digest: str
    packs: _containers.RepeatedCompositeFieldContainer[Pack]
    state_bytes: int
    def __init__(self, checkpoint: _Optional[int] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., state: _Optional[_Union[ShardState, str]] = ..., step: _Optional[int] = ..., key: _Optional[str] = ..., size_bytes: _Optional[int] = ..., digest: _Optional[str] = ..., reason: _Optional[str] = ..., index_key: _Optional[str] = ..., index_digest: _Optional[str] = ..., packs: _Optional[_Iterable[_Union[Pack, _Mapping]]] = ..., state_bytes: _Optional[int] = ...) -> None: ...

class Pack(_message.Message):
    __slots__ = ("key", "size_bytes", "digest")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    key: str
    size_bytes: int
    digest: str
    def __init__(self, key: _Optional[str] = ..., size_bytes: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class RestoreReport(_message.Message):
    __slots__ = ("state", "checkpoint", "key", "reason", "transfer")
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    state: RestoreState
    checkpoint: int
    key: str
    reason: str
    transfer: Transfer
    def __init__(self, state: _Optional[_Union[RestoreState, str]] = ..., checkpoint: _Optional[int] = ..., key: _Optional[str] = ..., reason: _Optional[str] = ..., transfer: _Optional[_Union[Transfer, _Mapping]] = ...) -> None: ...

class CommandStatus(_message.Message):
    __slots__ = ("id", "state", "reason", "term")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: CommandState
    reason: str
    term: int
    def __init__(self, id: _Optional[str] = ..., state: _Optional[_Union[CommandState, str]] = ..., reason: _Optional[str] = ..., term: _Optional[int] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("term", "welcome", "command")
    TERM_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    term: int
    welcome: Welcome
    command: Command
    def __init__(self, term: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., command: _Optional[_Union[Command, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("leader",)
    LEADER_FIELD_NUMBER: _ClassVar[int]
    leader: str
    def __init__(self, leader: _Optional[str] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("id", "job", "generation", "position", "noop", "start_trainers", "stage_checkpoint", "stop_trainers", "take_stacks")
    ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    NOOP_FIELD_NUMBER: _ClassVar[int]
    START_TRAINERS_FIELD_NUMBER: _ClassVar[int]
    STAGE_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    STOP_TRAINERS_FIELD_NUMBER: _ClassVar[int]
    TAKE_STACKS_FIELD_NUMBER: _ClassVar[int]
    id: str
    job: str
    generation: int
    position: LogPosition
    noop: Noop
    start_trainers: StartTrainers
    stage_checkpoint: StageCheckpoint
    stop_trainers: StopTrainers
    take_stacks: TakeStacks
    def __init__(self, id: _Optional[str] = ..., job: _Optional[str] = ..., generation: _Optional[int] = ..., position: _Optional[_Union[LogPosition, _Mapping]] = ..., noop: _Optional[_Union[Noop, _Mapping]] = ..., start_trainers: _Optional[_Union[StartTrainers, _Mapping]] = ..., stage_checkpoint: _Optional[_Union[StageCheckpoint, _Mapping]] = ..., stop_trainers: _Optional[_Union[StopTrainers, _Mapping]] = ..., take_stacks: _Optional[_Union[TakeStacks, _Mapping]] = ...) -> None: ...

class Noop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StartTrainers(_message.Message):
    __slots__ = ("python", "script", "args", "cwd", "env", "world_size", "nnodes", "node_rank", "first_rank", "nproc", "master_address", "master_port", "restarts", "max_restarts", "store", "restore", "no_python", "save_last")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    SCRIPT_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    CWD_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NNODES_FIELD_NUMBER: _ClassVar[int]
    NODE_RANK_FIELD_NUMBER: _ClassVar[int]
    FIRST_RANK_FIELD_NUMBER: _ClassVar[int]
    NPROC_FIELD_NUMBER: _ClassVar[int]
    MASTER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    MAX_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    NO_PYTHON_FIELD_NUMBER: _ClassVar[int]
    SAVE_LAST_FIELD_NUMBER: _ClassVar[int]
    python: str
    script: str
    args: _containers.RepeatedScalarFieldContainer[str]
    cwd: str
    env: _containers.ScalarMap[str, str]
    world_size: int
    nnodes: int
    node_rank: int
    first_rank: int
    nproc: int
    master_address: str
    master_port: int
    restarts: int
    max_restarts: int
    store: str
    restore: Restore
    no_python: bool
    save_last: bool
    def __init__(self, python: _Optional[str] = ..., script: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., cwd: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ..., world_size: _Optional[int] = ..., nnodes: _Optional[int] = ..., node_rank: _Optional[int] = ..., first_rank: _Optional[int] = ..., nproc: _Optional[int] = ..., master_address: _Optional[str] = ..., master_port: _Optional[int] = ..., restarts: _Optional[int] = ..., max_restarts: _Optional[int] = ..., store: _Optional[str] = ..., restore: _Optional[_Union[Restore, _Mapping]] = ..., no_python: _Optional[bool] = ..., save_last: _Optional[bool] = ...) -> None: ...

class Restore(_message.Message):
    __slots__ = ("checkpoint", "attempt", "step", "manifest_key", "manifest_digest", "store")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_KEY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    checkpoint: int
    attempt: int
    step: int
    manifest_key: str
    manifest_digest: str
    store: str
    def __init__(self, checkpoint: _Optional[int] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., manifest_key: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., store: _Optional[str] = ...) -> None: ...

class StageCheckpoint(_message.Message):
    __slots__ = ("checkpoint", "attempt", "step", "store", "committed_attempt", "bases")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BASES_FIELD_NUMBER: _ClassVar[int]
    checkpoint: int
    attempt: int
    step: int
    store: str
    committed_attempt: int
    bases: _containers.RepeatedCompositeFieldContainer[BaseIndex]
    def __init__(self, checkpoint: _Optional[int] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., store: _Optional[str] = ..., committed_attempt: _Optional[int] = ..., bases: _Optional[_Iterable[_Union[BaseIndex, _Mapping]]] = ...) -> None: ...

class BaseIndex(_message.Message):
    __slots__ = ("rank", "index_key", "index_digest")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INDEX_KEY_FIELD_NUMBER: _ClassVar[int]
    INDEX_DIGEST_FIELD_NUMBER: _ClassVar[int]
    rank: int
    index_key: str
    index_digest: str
    def __init__(self, rank: _Optional[int] = ..., index_key: _Optional[str] = ..., index_digest: _Optional[str] = ...) -> None: ...

class StopTrainers(_message.Message):
    __slots__ = ("grace_s", "keep_arena")
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    KEEP_ARENA_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    keep_arena: bool
    def __init__(self, grace_s: _Optional[float] = ..., keep_arena: _Optional[bool] = ...) -> None: ...

class TakeStacks(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Spec(_message.Message):
    __slots__ = ("name", "python", "script", "args", "cwd", "env", "nnodes_min", "nnodes_max", "nproc_per_node", "max_restarts", "store", "every_steps", "every_seconds", "keep_last", "keep_every_steps", "keep_every_seconds", "hang_timeout_s", "no_python", "restart_window_s")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    SCRIPT_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    CWD_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    NNODES_MIN_FIELD_NUMBER: _ClassVar[int]
    NNODES_MAX_FIELD_NUMBER: _ClassVar[int]
    NPROC_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    MAX_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    EVERY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KEEP_LAST_FIELD_NUMBER: _ClassVar[int]
    KEEP_EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    KEEP_EVERY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HANG_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    NO_PYTHON_FIELD_NUMBER: _ClassVar[int]
    RESTART_WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    python: str
    script: str
    args: _containers.RepeatedScalarFieldContainer[str]
    cwd: str
    env: _containers.ScalarMap[str, str]
    nnodes_min: int
    nnodes_max: int
    nproc_per_node: int
    max_restarts: int
    store: str
    every_steps: int
    every_seconds: float
    keep_last: int
    keep_every_steps: int
    keep_every_seconds: float
    hang_timeout_s: float
    no_python: bool
    restart_window_s: float
    def __init__(self, name: _Optional[str] = ..., python: _Optional[str] = ..., script: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., cwd: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ..., nnodes_min: _Optional[int] = ..., nnodes_max: _Optional[int] = ..., nproc_per_node: _Optional[int] = ..., max_restarts: _Optional[int] = ..., store: _Optional[str] = ..., every_steps: _Optional[int] = ..., every_seconds: _Optional[float] = ..., keep_last: _Optional[int] = ..., keep_every_steps: _Optional[int] = ..., keep_every_seconds: _Optional[float] = ..., hang_timeout_s: _Optional[float] = ..., no_python: _Optional[bool] = ..., restart_window_s: _Optional[float] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("spec", "request", "takes_over")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TAKES_OVER_FIELD_NUMBER: _ClassVar[int]
    spec: Spec
    request: str
    takes_over: bool
    def __init__(self, spec: _Optional[_Union[Spec, _Mapping]] = ..., request: _Optional[str] = ..., takes_over: _Optional[bool] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("run", "resumes_step")
    RUN_FIELD_NUMBER: _ClassVar[int]
    RESUMES_STEP_FIELD_NUMBER: _ClassVar[int]
    run: int
    resumes_step: int
    def __init__(self, run: _Optional[int] = ..., resumes_step: _Optional[int] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ("job", "request")
    JOB_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    job: str
    request: str
    def __init__(self, job: _Optional[str] = ..., request: _Optional[str] = ...) -> None: ...

class CheckpointReply(_message.Message):
    __slots__ = ("checkpoint", "attempt", "step")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    checkpoint: int
    attempt: int
    step: int
    def __init__(self, checkpoint: _Optional[int] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("job", "checkpoint", "pinned")
    JOB_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    job: str
    checkpoint: int
    pinned: bool
    def __init__(self, job: _Optional[str] = ..., checkpoint: _Optional[int] = ..., pinned: _Optional[bool] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class QuarantineRequest(_message.Message):
    __slots__ = ("job", "checkpoint", "key", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    checkpoint: int
    key: str
    reason: str
    def __init__(self, job: _Optional[str] = ..., checkpoint: _Optional[int] = ..., key: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class QuarantineReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("term", "leader", "jobs")
    TERM_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    term: int
    leader: str
    jobs: _containers.RepeatedCompositeFieldContainer[JobStatus]
    def __init__(self, term: _Optional[int] = ..., leader: _Optional[str] = ..., jobs: _Optional[_Iterable[_Union[JobStatus, _Mapping]]] = ...) -> None: ...

class JobStatus(_message.Message):
    __slots__ = ("job", "phase", "waiting_for", "run", "generation", "world_size", "restarts", "max_restarts", "committed_checkpoint", "committed_step", "checkpoints", "reason", "exit_code", "ranks", "store", "last_failure", "restarts_used", "restores")
    JOB_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    MAX_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_STEP_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_USED_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FIELD_NUMBER: _ClassVar[int]
    job: str
    phase: str
    waiting_for: str
    run: int
    generation: int
    world_size: int
    restarts: int
    max_restarts: int
    committed_checkpoint: int
    committed_step: int
    checkpoints: int
    reason: str
    exit_code: int
    ranks: _containers.RepeatedCompositeFieldContainer[JobRank]
    store: str
    last_failure: Failure
    restarts_used: int
    restores: _containers.RepeatedCompositeFieldContainer[JobRestore]
    def __init__(self, job: _Optional[str] = ..., phase: _Optional[str] = ..., waiting_for: _Optional[str] = ..., run: _Optional[int] = ..., generation: _Optional[int] = ..., world_size: _Optional[int] = ..., restarts: _Optional[int] = ..., max_restarts: _Optional[int] = ..., committed_checkpoint: _Optional[int] = ..., committed_step: _Optional[int] = ..., checkpoints: _Optional[int] = ..., reason: _Optional[str] = ..., exit_code: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[JobRank, _Mapping]]] = ..., store: _Optional[str] = ..., last_failure: _Optional[_Union[Failure, _Mapping]] = ..., restarts_used: _Optional[int] = ..., restores: _Optional[_Iterable[_Union[JobRestore, _Mapping]]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("generation", "reason", "kind", "traceback", "victims", "time")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    VICTIMS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    generation: int
    reason: str
    kind: str
    traceback: str
    victims: _containers.RepeatedCompositeFieldContainer[Victim]
    time: float
    def __init__(self, generation: _Optional[int] = ..., reason: _Optional[str] = ..., kind: _Optional[str] = ..., traceback: _Optional[str] = ..., victims: _Optional[_Iterable[_Union[Victim, _Mapping]]] = ..., time: _Optional[float] = ...) -> None: ...

class Victim(_message.Message):
    __slots__ = ("rank", "worker", "exit_code", "error")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    rank: int
    worker: str
    exit_code: int
    error: str
    def __init__(self, rank: _Optional[int] = ..., worker: _Optional[str] = ..., exit_code: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class JobRestore(_message.Message):
    __slots__ = ("worker", "transfer")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    transfer: Transfer
    def __init__(self, worker: _Optional[str] = ..., transfer: _Optional[_Union[Transfer, _Mapping]] = ...) -> None: ...

class JobRank(_message.Message):
    __slots__ = ("worker", "report")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    worker: str
    report: RankReport
    def __init__(self, worker: _Optional[str] = ..., report: _Optional[_Union[RankReport, _Mapping]] = ...) -> None: ...

class WorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkersReply(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "host", "address", "slots", "slots_used", "registered", "connected", "phase", "version")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    worker: str
    host: str
    address: str
    slots: int
    slots_used: int
    registered: bool
    connected: bool
    phase: str
    version: str
    def __init__(self, worker: _Optional[str] = ..., host: _Optional[str] = ..., address: _Optional[str] = ..., slots: _Optional[int] = ..., slots_used: _Optional[int] = ..., registered: _Optional[bool] = ..., connected: _Optional[bool] = ..., phase: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class TailRequest(_message.Message):
    __slots__ = ("job", "all_ranks", "rank", "follow")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ALL_RANKS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    job: str
    all_ranks: bool
    rank: int
    follow: bool
    def __init__(self, job: _Optional[str] = ..., all_ranks: _Optional[bool] = ..., rank: _Optional[int] = ..., follow: _Optional[bool] = ..., **kwargs) -> None: ...

class LogOffset(_message.Message):
    __slots__ = ("generation", "rank", "offset")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    generation: int
    rank: int
    offset: int
    def __init__(self, generation: _Optional[int] = ..., rank: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class LogChunk(_message.Message):
    __slots__ = ("generation", "rank", "offset", "data")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    generation: int
    rank: int
    offset: int
    data: bytes
    def __init__(self, generation: _Optional[int] = ..., rank: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
