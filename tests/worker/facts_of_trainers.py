"""Short ways to say what happens to an agent's machine."""

from typing import Any

from dtrain.common.mailbox import pack
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step, Term, WorkerId
from dtrain.worker.core.actions import JOURNAL_ENTRIES, Action, SendSnapshot
from dtrain.worker.core.inputs import (
    CommandBody,
    CommandReceived,
    FoldersReady,
    Input,
    MailboxSeen,
    Noop,
    StageCheckpoint,
    StartTrainers,
    StopTrainers,
    TrainerExited,
    TrainerStarted,
    UploadDone,
)
from dtrain.worker.core.machine import step
from dtrain.worker.core.states import (
    CheckpointRequest,
    CommandStage,
    ExitFact,
    LogPosition,
    NodeState,
    RestoreSource,
    TrainersSpec,
)

JOB = JobName("digits")


def node_state(*, slots: int = 4, fence_after_s: float = 100.0) -> NodeState:
    return NodeState(worker=WorkerId("w1"), slots=slots, fence_after_s=fence_after_s)


def spec(*, nproc: int = 2, restore: bool = False) -> TrainersSpec:
    source = RestoreSource(
        checkpoint=CheckpointNumber(1),
        attempt=AttemptNumber(1),
        step=Step(5),
        manifest_key="m",
        manifest_digest="d",
        store="file:///store",
    )
    return TrainersSpec(
        python="python",
        script="/train.py",
        args=(),
        cwd="/",
        env={},
        world_size=nproc,
        nnodes=1,
        node_rank=0,
        first_rank=0,
        nproc=nproc,
        master_address="127.0.0.1",
        master_port=4000,
        restarts=0,
        max_restarts=3,
        store="file:///store",
        restore=source if restore else None,
    )


def command(
    body: CommandBody, *, id: str, job: str = JOB, generation: int = 1, term: int = 1, seq: int = 1
) -> CommandReceived:
    position = None if isinstance(body, Noop) else LogPosition(seq=seq, digest=f"digest of {seq}")
    return CommandReceived(
        term=Term(term),
        id=id,
        job=JobName("" if isinstance(body, Noop) else job),
        generation=Generation(0 if isinstance(body, Noop) else generation),
        position=position,
        body=body,
    )


def start(*, id: str = "start", nproc: int = 2, restore: bool = False, **where: Any) -> CommandReceived:
    return command(StartTrainers(spec=spec(nproc=nproc, restore=restore)), id=id, **where)


def stop(*, id: str = "stop", grace_s: float = 5.0, keep: bool = False, **where: Any) -> CommandReceived:
    return command(StopTrainers(grace_s=grace_s, keep_arena=keep), id=id, **where)


def stage(attempt: int = 1, at_step: int = 10, *, id: str = "", **where: Any) -> CommandReceived:
    request = CheckpointRequest(
        checkpoint=CheckpointNumber(attempt),
        attempt=AttemptNumber(attempt),
        step=Step(at_step),
        store="file:///store",
    )
    return command(StageCheckpoint(request=request), id=id or f"stage {attempt}", **where)


def ready(*, job: str = JOB, generation: int = 1) -> FoldersReady:
    return FoldersReady(job=JobName(job), generation=Generation(generation))


def started(rank: int, *, job: str = JOB, generation: int = 1) -> TrainerStarted:
    return TrainerStarted(job=JobName(job), generation=Generation(generation), rank=rank, pid=1000 + rank)


def exited(
    rank: int, *, code: int | None = 0, job: str = JOB, generation: int = 1, ended_for: str = ""
) -> TrainerExited:
    fact = ExitFact(code=code, at_unix_s=1.0, error="", ended_for=ended_for)
    return TrainerExited(job=JobName(job), generation=Generation(generation), rank=rank, exit=fact)


def mailbox(rank: int, *, job: str = JOB, generation: int = 1, **words: Any) -> MailboxSeen:
    seen: dict[str, Any] = {
        "phase": "training",
        "completed_step": 1,
        "until_step": 100,
        "tracking": True,
        "staged": 0,
        "staged_slot": 0,
        "staged_bytes": 0,
        "missed": 0,
        "stage_failed": 0,
        "error": "",
        "step_s": 0.1,
        "metrics_json": "",
        **words,
    }
    return MailboxSeen(job=JobName(job), generation=Generation(generation), rank=rank, **seen)


def staged(rank: int, attempt: int = 1, at_step: int = 10, **where: Any) -> MailboxSeen:
    return mailbox(rank, staged=pack(attempt, at_step), staged_slot=1, staged_bytes=100, **where)


def uploaded(rank: int, attempt: int = 1, *, job: str = JOB, generation: int = 1) -> UploadDone:
    return UploadDone(
        job=JobName(job),
        generation=Generation(generation),
        rank=rank,
        attempt=AttemptNumber(attempt),
        key=f"key of {rank}",
        size_bytes=100,
        digest=f"digest of {rank}",
        index_key=f"index key of {rank}",
        index_digest=f"index digest of {rank}",
    )


def run(state: NodeState, *facts: Input, now: float = 0.0) -> tuple[NodeState, list[Action]]:
    """Step through the facts; return the last state and all actions."""
    actions: list[Action] = []
    for fact in facts:
        state, more = step(state, fact, now)
        actions += more
    return state, actions


def training(*, slots: int = 4) -> NodeState:
    """Two ranks of generation 1 run."""
    state, _ = run(node_state(slots=slots), start(), ready(), started(0), started(1))
    return state


def status(state: NodeState, command_id: str) -> tuple[CommandStage, str]:
    record = next(record for record in state.commands if record.id == command_id)
    return record.stage, record.reason


def of_kinds(actions: list[Action], *kinds: type) -> list[Any]:
    return [action for action in actions if isinstance(action, kinds)]


def acts(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, (*JOURNAL_ENTRIES, SendSnapshot))]
