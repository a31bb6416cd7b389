"""What a command does: accept it, refuse it, or notice that it was done long ago.

Rules:
- a command of a term lower than the highest seen is refused: its sender is no longer the leader;
- a command for a generation older than the job's newest is refused, whatever it wants;
- a command id that was accepted does nothing again, and its status is reported again;
- a command says what should be, not what to do next: repeating it under a new id is as harmless.
"""

from dataclasses import replace
from typing import assert_never

from dtrain.common.mailbox import pack
from dtrain.worker.core.actions import (
    AskStage,
    CleanGeneration,
    DropTransfers,
    EndTrainers,
    PrepareFolders,
    TakeStack,
)
from dtrain.worker.core.inputs import (
    CommandReceived,
    Noop,
    StageCheckpoint,
    StartTrainers,
    StopTrainers,
    TakeStacks,
)
from dtrain.worker.core.states import (
    GENERATION_MOVES,
    SHARD_MOVES,
    Assignment,
    CheckpointRequest,
    CommandKind,
    CommandRecord,
    CommandStage,
    ExitFact,
    GenerationStage,
    RankRun,
    RankStage,
    RestoreProgress,
    RestoreStage,
    RetiringRank,
    ShardAttempt,
    ShardStage,
    TrainersSpec,
    move,
)
from dtrain.worker.core.turns import Turn


def command_received(turn: Turn, received: CommandReceived) -> None:
    """Handle one command."""
    if received.term < turn.state.term:
        _refuse(turn, received, f"term {received.term} is over: this worker has seen term {turn.state.term}")
        return
    turn.see_term(received.term)
    turn.see_coordinator()
    known = turn.command(received.id)
    if known is None or known.stage is CommandStage.REFUSED:
        match received.body:
            case Noop():
                turn.record(_record(received, CommandStage.DONE))
            case StartTrainers(spec=spec):
                _start(turn, received, spec)
            case StageCheckpoint(request=request):
                _stage(turn, received, request)
            case StopTrainers() as stop:
                _stop(turn, received, stop)
            case TakeStacks(number=number):
                _take_stacks(turn, received, number)
            case _ as never:
                assert_never(never)
    elif known.term < received.term:
        turn.record(replace(known, term=received.term))
    _note_position(turn, received)


def _kind(received: CommandReceived) -> CommandKind:
    match received.body:
        case Noop():
            return CommandKind.NOOP
        case StartTrainers():
            return CommandKind.START
        case StageCheckpoint():
            return CommandKind.STAGE
        case StopTrainers():
            return CommandKind.STOP
        case TakeStacks():
            return CommandKind.STACKS
        case _ as never:
            assert_never(never)


def _record(received: CommandReceived, stage: CommandStage, reason: str = "") -> CommandRecord:
    match received.body:
        case StageCheckpoint(request=request):
            attempt = int(request.attempt)
        case TakeStacks(number=number):
            attempt = number
        case _:
            attempt = 0
    return CommandRecord(
        id=received.id,
        kind=_kind(received),
        job=received.job,
        generation=received.generation,
        attempt=attempt,
        stage=stage,
        term=received.term,
        reason=reason,
    )


def _accept(turn: Turn, received: CommandReceived) -> None:
    turn.record(_record(received, CommandStage.ACCEPTED))  # the end of the turn sees whether it is done


def _refuse(turn: Turn, received: CommandReceived, reason: str) -> None:
    known = turn.command(received.id)
    if known is None or known.stage is CommandStage.REFUSED:  # a late copy must not undo what was accepted
        turn.record(_record(received, CommandStage.REFUSED, reason))


def _note_position(turn: Turn, received: CommandReceived) -> None:
    assignment = turn.assignment(received.job)
    if assignment is None or received.position is None:
        return
    if assignment.position is None or received.position.seq > assignment.position.seq:
        turn.put(replace(assignment, position=received.position), journal=True)


def _older(assignment: Assignment | None, received: CommandReceived) -> str:
    """Why the command's generation is too old; empty if it is not."""
    if assignment is not None and received.generation < assignment.newest:
        return f"generation {received.generation} is over: this worker has seen generation {assignment.newest}"
    return ""


# ---- start -----------------------------------------------------------------------------------------------


def _start(turn: Turn, received: CommandReceived, spec: TrainersSpec) -> None:
    old = turn.assignment(received.job)
    if reason := _older(old, received) or _cannot_start(turn, old, received, spec):
        _refuse(turn, received, reason)
        return
    _accept(turn, received)
    if old is not None and old.generation == received.generation and old.spec is not None:
        return  # the same decision under another id
    if old is not None:
        _retire(turn, old)
    turn.put(_fresh_assignment(received, spec, old), journal=True)
    turn.act(PrepareFolders(job=received.job, generation=received.generation, spec=spec))


def _cannot_start(turn: Turn, old: Assignment | None, received: CommandReceived, spec: TrainersSpec) -> str:
    if turn.state.stopping:
        return "this worker is shutting down"
    if old is not None and received.generation <= old.stopped_through:
        return f"generation {received.generation} was stopped"
    if spec.nproc > turn.state.slots:
        return f"{spec.nproc} trainers do not fit: this worker has {turn.state.slots} slots"
    return ""


def _retire(turn: Turn, old: Assignment) -> None:
    """A newer generation makes this one's state worthless, so its trainers get no grace."""
    turn.act(DropTransfers(job=old.job, generation=old.generation))
    if any(run.takes_slot for run in old.ranks):
        turn.act(EndTrainers(job=old.job, generation=old.generation, grace_s=0.0))
    elif not old.cleaned and old.spec is not None:
        turn.act(CleanGeneration(job=old.job, generation=old.generation))


def _fresh_assignment(received: CommandReceived, spec: TrainersSpec, old: Assignment | None) -> Assignment:
    retiring: tuple[RetiringRank, ...] = ()
    if old is not None:
        live = (RetiringRank(generation=old.generation, rank=run.rank) for run in old.ranks if run.takes_slot)
        retiring = (*old.retiring, *live)
    return Assignment(
        job=received.job,
        generation=received.generation,
        stage=GenerationStage.ACCEPTED,
        spec=spec,
        ranks=tuple(RankRun(rank=spec.first_rank + local) for local in range(spec.nproc)),
        retiring=retiring,
        stopped_through=old.stopped_through if old is not None else 0,
        restore=RestoreProgress(stage=RestoreStage.NONE if spec.restore is None else RestoreStage.FETCHING),
        position=old.position if old is not None else None,
    )


# ---- stage -----------------------------------------------------------------------------------------------


def _for_running(turn: Turn, received: CommandReceived) -> Assignment | None:
    """Accept a command for a generation that runs here and return what it is about; None: it was refused."""
    assignment = turn.assignment(received.job)
    if reason := _older(assignment, received):
        _refuse(turn, received, reason)
        return None
    if assignment is None or assignment.generation != received.generation or assignment.spec is None:
        _refuse(turn, received, f"generation {received.generation} was never started here")
        return None
    if assignment.stopped:
        _refuse(turn, received, f"generation {received.generation} was stopped")
        return None
    _accept(turn, received)
    return assignment


def _take_stacks(turn: Turn, received: CommandReceived, number: int) -> None:
    assignment = _for_running(turn, received)
    for run in assignment.ranks if assignment is not None else ():
        if run.stage is RankStage.RUNNING:
            turn.act(TakeStack(job=received.job, generation=received.generation, rank=run.rank, number=number))


def _stage(turn: Turn, received: CommandReceived, request: CheckpointRequest) -> None:
    assignment = _for_running(turn, received)
    if assignment is None:
        return
    if assignment.checkpoint is not None and request.attempt <= assignment.checkpoint.attempt:
        return
    shards = tuple(_fresh_shard(request, run) for run in assignment.ranks)
    turn.put(replace(assignment, checkpoint=request, shards=shards), journal=True)
    for run in assignment.ranks:
        if run.stage is RankStage.RUNNING:  # the others are asked when they run
            turn.act(
                AskStage(
                    job=received.job,
                    generation=received.generation,
                    rank=run.rank,
                    word=pack(request.attempt, request.step),
                    committed_attempt=request.committed_attempt,
                )
            )


def _fresh_shard(request: CheckpointRequest, run: RankRun) -> ShardAttempt:
    exited = run.stage is RankStage.EXITED
    return ShardAttempt(
        checkpoint=request.checkpoint,
        attempt=request.attempt,
        step=request.step,
        rank=run.rank,
        stage=ShardStage.FAILED if exited else ShardStage.REQUESTED,
        reason=f"rank {run.rank} has exited" if exited else "",
    )


# ---- stop ------------------------------------------------------------------------------------------------


def _stop(turn: Turn, received: CommandReceived, stop: StopTrainers) -> None:
    assignment = turn.assignment(received.job)
    if reason := _older(assignment, received):
        _refuse(turn, received, reason)
        return
    if assignment is None:
        assignment = Assignment(
            job=received.job, generation=received.generation, stage=GenerationStage.OVER, spec=None, cleaned=True
        )
    _accept(turn, received)
    assignment = replace(
        assignment,
        stopped_through=max(assignment.stopped_through, received.generation),
        grace_s=stop.grace_s,
        keep_arena=stop.keep_arena,
    )
    end_generation(turn, assignment, stop.grace_s, "stopped before it was started")


def end_generation(turn: Turn, assignment: Assignment, grace_s: float, reason: str) -> None:
    """Begin to end what runs of the assignment; ``reason`` is told of the ranks that never ran."""
    turn.act(DropTransfers(job=assignment.job, generation=assignment.generation))
    assignment = replace(assignment, shards=tuple(_given_up(shard) for shard in assignment.shards))
    of = f"{assignment.job} generation {assignment.generation}"
    match assignment.stage:
        case GenerationStage.ACCEPTED | GenerationStage.READY:
            stage = move(GENERATION_MOVES, assignment.stage, GenerationStage.OVER, of)
            assignment = replace(assignment, stage=stage, ranks=never_ran(assignment.ranks, reason))
        case GenerationStage.LIVE:
            stage = move(GENERATION_MOVES, assignment.stage, GenerationStage.ENDING, of)
            assignment = replace(assignment, stage=stage)
            turn.act(EndTrainers(job=assignment.job, generation=assignment.generation, grace_s=grace_s))
        case GenerationStage.ENDING:  # perhaps with less grace than before
            turn.act(EndTrainers(job=assignment.job, generation=assignment.generation, grace_s=grace_s))
        case GenerationStage.OVER:
            pass
        case _ as never:
            assert_never(never)
    turn.put(assignment, journal=True)


def _given_up(shard: ShardAttempt) -> ShardAttempt:
    if shard.is_settled:
        return shard
    stage = move(SHARD_MOVES, shard.stage, ShardStage.FAILED, f"shard of rank {shard.rank}")
    return replace(shard, stage=stage, reason="the generation was ended before storage confirmed it")


def never_ran(ranks: tuple[RankRun, ...], reason: str) -> tuple[RankRun, ...]:
    """The ranks as exited without ever having run."""
    fact = ExitFact(code=None, at_unix_s=0.0, error=reason)
    return tuple(replace(run, stage=RankStage.EXITED, exit=fact) for run in ranks)
