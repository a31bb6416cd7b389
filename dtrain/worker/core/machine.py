"""The agent's machine: one input in, the new state and what to do about it out.

``step`` reads no clock and touches nothing: ``now`` is an argument (seconds on any clock that only grows).
Entries for the journal always stand before acts; the order within each kind is the order of decision.
"""

from dataclasses import replace
from typing import assert_never

from dtrain.worker.core import checkpoints, commands, trainers
from dtrain.worker.core.actions import (
    JOURNAL_ENTRIES,
    Action,
    EndTrainers,
    FetchRestore,
    PrepareFolders,
    SendSnapshot,
    SpawnTrainer,
)
from dtrain.worker.core.inputs import (
    CommandReceived,
    CoordinatorSeen,
    FoldersFailed,
    FoldersReady,
    Input,
    MailboxSeen,
    RestoreDamaged,
    RestoreReady,
    StackTaken,
    StopRequested,
    TermSeen,
    Tick,
    TrainerExited,
    TrainerStarted,
    UploadDone,
    UploadFailed,
)
from dtrain.worker.core.states import (
    Assignment,
    CommandKind,
    CommandRecord,
    CommandStage,
    GenerationStage,
    NodeState,
    RankStage,
    RestoreStage,
)
from dtrain.worker.core.turns import Turn

# Inputs that come many times a second: their handlers ask for a snapshot only where it is worth one.
_QUIET = (MailboxSeen, UploadDone, UploadFailed, CoordinatorSeen, Tick)


def step(state: NodeState, fact: Input, now: float) -> tuple[NodeState, tuple[Action, ...]]:
    """Return the state after ``fact``, and what the shell has to do, in order."""
    turn = Turn(state, now)
    _handle(turn, fact)
    return _finish(turn, loud=not isinstance(fact, _QUIET))


def recover(state: NodeState, now: float) -> tuple[NodeState, tuple[Action, ...]]:
    """Return what an agent does first with the state that it read from its journal.

    It asks for every act again whose answer the journal does not hold. Acts are idempotent, so those that had
    happened before the crash do not happen twice.
    """
    turn = Turn(replace(state, coordinator_seen_at=now), now)
    for assignment in tuple(turn.state.assignments.values()):
        _recover_assignment(turn, assignment)
    return _finish(turn, loud=True)


def _recover_assignment(turn: Turn, assignment: Assignment) -> None:
    job, generation, spec = assignment.job, assignment.generation, assignment.spec
    for retiring in assignment.retiring:
        turn.act(SpawnTrainer(job=job, generation=retiring.generation, rank=retiring.rank, start=False))
    for older in sorted({retiring.generation for retiring in assignment.retiring}):
        turn.act(EndTrainers(job=job, generation=older, grace_s=0.0))
    if spec is None:
        return
    if assignment.stage is GenerationStage.ACCEPTED:
        turn.act(PrepareFolders(job=job, generation=generation, spec=spec))
        return
    unsettled = {shard.rank for shard in assignment.shards if not shard.is_settled}
    for run in assignment.ranks:
        if run.stage is RankStage.SPAWNING or run.rank in unsettled:
            wanted = assignment.stage is GenerationStage.LIVE and run.stage is not RankStage.EXITED
            turn.act(SpawnTrainer(job=job, generation=generation, rank=run.rank, start=wanted))
    if assignment.stage is GenerationStage.ENDING:
        turn.act(EndTrainers(job=job, generation=generation, grace_s=assignment.grace_s))
    elif assignment.stage is GenerationStage.LIVE and assignment.restore.stage is RestoreStage.FETCHING:
        turn.act(FetchRestore(job=job, generation=generation, spec=spec))


def _handle(turn: Turn, fact: Input) -> None:
    match fact:
        case CommandReceived():
            commands.command_received(turn, fact)
        case FoldersReady():
            trainers.folders_ready(turn, fact)
        case FoldersFailed():
            trainers.folders_failed(turn, fact)
        case TrainerStarted():
            trainers.trainer_started(turn, fact)
        case TrainerExited():
            trainers.trainer_exited(turn, fact)
        case MailboxSeen():
            checkpoints.mailbox_seen(turn, fact)
        case UploadDone():
            checkpoints.upload_done(turn, fact)
        case UploadFailed():
            checkpoints.upload_failed(turn, fact)
        case RestoreReady():
            checkpoints.restore_ready(turn, fact)
        case RestoreDamaged():
            checkpoints.restore_damaged(turn, fact)
        case StackTaken():
            trainers.stack_taken(turn, fact)
        case TermSeen(term=term):
            if term >= turn.state.term:  # an older leader's word does not keep the trainers from their fence
                turn.see_term(term)
                turn.see_coordinator()
        case CoordinatorSeen():
            turn.see_coordinator()
        case Tick():
            trainers.fence(turn)
        case StopRequested(grace_s=grace_s):
            turn.state = replace(turn.state, stopping=True)
            for assignment in tuple(turn.state.assignments.values()):
                if assignment.stage is not GenerationStage.OVER:
                    commands.end_generation(turn, assignment, grace_s, "its worker was shut down")
        case _ as never:
            assert_never(never)


def _finish(turn: Turn, *, loud: bool) -> tuple[NodeState, tuple[Action, ...]]:
    trainers.spawn_what_fits(turn)
    trainers.clean_what_is_over(turn)
    trainers.give_memory_back(turn)
    for record in turn.state.commands:
        if record.stage is CommandStage.ACCEPTED and _is_done(turn, record):
            turn.record(replace(record, stage=CommandStage.DONE))
            loud = True
    acts = [action for action in turn.actions if not isinstance(action, (*JOURNAL_ENTRIES, SendSnapshot))]
    entries = [action for action in turn.actions if isinstance(action, JOURNAL_ENTRIES)]
    loud = loud or any(isinstance(action, SendSnapshot) for action in turn.actions)
    return turn.state, (*entries, *acts, *((SendSnapshot(),) if loud else ()))


def _is_done(turn: Turn, record: CommandRecord) -> bool:
    """Whether what the command asks for is so now."""
    assignment = next((a for a in turn.state.assignments.values() if a.job == record.job), None)
    if assignment is None or assignment.generation > record.generation:
        return record.kind is not CommandKind.STOP or assignment is None or not assignment.retiring
    match record.kind:
        case CommandKind.NOOP:
            return True
        case CommandKind.START:
            return all(run.stage in (RankStage.RUNNING, RankStage.EXITED) for run in assignment.ranks)
        case CommandKind.STAGE:
            request = assignment.checkpoint
            overtaken = request is not None and request.attempt > record.attempt
            return overtaken or all(shard.is_settled for shard in assignment.shards)
        case CommandKind.STOP:
            return assignment.stage is GenerationStage.OVER and not assignment.retiring
        case CommandKind.STACKS:
            return all(
                run.stage is not RankStage.RUNNING or run.stack_number >= record.attempt for run in assignment.ranks
            )
        case _ as never:
            assert_never(never)
