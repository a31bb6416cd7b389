"""What a coordinator is told: the node's state as a plain record, with the phases that people read."""

from dataclasses import dataclass
from enum import StrEnum

from dtrain.common.names import Generation, JobName, Term
from dtrain.worker.core.states import (
    Assignment,
    CommandRecord,
    GenerationStage,
    LogPosition,
    NodeState,
    RankRun,
    RankStage,
    RestoreProgress,
    RestoreStage,
    ShardAttempt,
    ShardStage,
)


class Phase(StrEnum):
    IDLE = "idle"
    STARTING = "starting"
    RESTORING = "restoring"
    TRAINING = "training"
    CHECKPOINTING = "checkpointing"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentSnapshot:
    job: JobName
    generation: Generation
    phase: Phase
    ranks: tuple[RankRun, ...]
    shards: tuple[ShardAttempt, ...]
    restore: RestoreProgress
    restore_checkpoint: int  # number of the checkpoint that it starts from; 0 for none
    position: LogPosition | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSnapshot:
    term: Term
    phase: Phase
    leaving: bool  # the agent was asked to end
    slots: int
    assignments: tuple[AssignmentSnapshot, ...]
    commands: tuple[CommandRecord, ...]


def phase_of(assignment: Assignment) -> Phase:
    """What the job does on this node, in one word."""
    match assignment.stage:
        case GenerationStage.OVER:
            return Phase.STOPPING if assignment.retiring else Phase.IDLE
        case GenerationStage.ENDING:
            return Phase.STOPPING
        case GenerationStage.ACCEPTED | GenerationStage.READY:
            return Phase.STARTING
        case GenerationStage.LIVE:
            return _phase_of_live(assignment)


def _phase_of_live(assignment: Assignment) -> Phase:
    said = {run.phase for run in assignment.ranks if run.stage is not RankStage.EXITED}
    if "checkpointing" in said or any(shard.stage is ShardStage.STAGED for shard in assignment.shards):
        return Phase.CHECKPOINTING
    if said & {"training", "holding", "paused", "left", "finished"}:
        return Phase.TRAINING
    if "restoring" in said or assignment.restore.stage is RestoreStage.FETCHING:
        return Phase.RESTORING
    return Phase.STARTING


def project(state: NodeState) -> NodeSnapshot:
    """Return the report about ``state``."""
    assignments = tuple(
        AssignmentSnapshot(
            job=assignment.job,
            generation=assignment.generation,
            phase=phase_of(assignment),
            ranks=assignment.ranks,
            shards=assignment.shards,
            restore=assignment.restore,
            restore_checkpoint=assignment.spec.restore.checkpoint if assignment.spec and assignment.spec.restore else 0,
            position=assignment.position,
        )
        for assignment in state.assignments.values()
    )
    busy = [assignment.phase for assignment in assignments if assignment.phase is not Phase.IDLE]
    return NodeSnapshot(
        term=state.term,
        phase=Phase.STOPPING if state.stopping else (busy[0] if busy else Phase.IDLE),
        leaving=state.stopping,
        slots=state.slots,
        assignments=assignments,
        commands=state.commands,
    )
