"""What happens to trainers: folders made, started, exited, spawned when there is room, fenced.

Rules:
- nothing of a generation is spawned while a trainer of an older one may live, or without free slots;
- the worker reports exits and decides no restart: a rank that ended with 0 while others run is only told;
- a generation's folders go when its last trainer is gone and no upload reads from them;
- the stage slots belong to the job: they outlive its generations, and go when the job has left this node.
"""

from dataclasses import replace

from dtrain.common.mailbox import pack
from dtrain.worker.core.actions import (
    AskStage,
    CleanGeneration,
    FetchRestore,
    JournalRetired,
    OpenRestore,
    RemoveArena,
    SendSnapshot,
    SpawnTrainer,
)
from dtrain.worker.core.commands import end_generation
from dtrain.worker.core.inputs import FoldersFailed, FoldersReady, StackTaken, TrainerExited, TrainerStarted
from dtrain.worker.core.states import (
    GENERATION_MOVES,
    RANK_MOVES,
    SHARD_MOVES,
    Assignment,
    ExitFact,
    GenerationStage,
    RankRun,
    RankStage,
    RestoreStage,
    RetiringRank,
    ShardStage,
    move,
)
from dtrain.worker.core.turns import Turn

LEAVING = "its worker is being shut down"


def folders_ready(turn: Turn, ready: FoldersReady) -> None:
    assignment = turn.assignment(ready.job)
    if assignment is None or assignment.generation != ready.generation:
        turn.act(CleanGeneration(job=ready.job, generation=ready.generation))  # overtaken while they were made
        return
    if assignment.stage is not GenerationStage.ACCEPTED or assignment.spec is None:
        return
    stage = move(GENERATION_MOVES, assignment.stage, GenerationStage.READY, assignment.job)
    turn.put(replace(assignment, stage=stage))
    if assignment.restore.stage is RestoreStage.FETCHING:  # downloads while older trainers leave and new ones start
        turn.act(FetchRestore(job=ready.job, generation=ready.generation, spec=assignment.spec))


def folders_failed(turn: Turn, failed: FoldersFailed) -> None:
    assignment = turn.assignment(failed.job)
    if assignment is None or assignment.generation != failed.generation:
        return
    if assignment.stage is not GenerationStage.ACCEPTED:
        return
    ranks = tuple(replace(run, stage=RankStage.EXITED, exit=failed.exit) for run in assignment.ranks)
    turn.put(replace(assignment, stage=GenerationStage.OVER, ranks=ranks), journal=True)


def trainer_started(turn: Turn, started: TrainerStarted) -> None:
    assignment, run = _find(turn, started.job, started.generation, started.rank)
    if assignment is None or run is None or run.stage is not RankStage.SPAWNING:
        return
    stage = move(RANK_MOVES, run.stage, RankStage.RUNNING, f"{started.job} rank {started.rank}")
    turn.put(turn.put_rank(assignment, replace(run, stage=stage, pid=started.pid)))
    if assignment.restore.stage is RestoreStage.READY:
        turn.act(OpenRestore(job=started.job, generation=started.generation, rank=started.rank))
    request = assignment.checkpoint
    if request is not None and not all(shard.is_settled for shard in assignment.shards if shard.rank == run.rank):
        turn.act(
            AskStage(
                job=started.job,
                generation=started.generation,
                rank=started.rank,
                word=pack(request.attempt, request.step),
                committed_attempt=request.committed_attempt,
            )
        )


def stack_taken(turn: Turn, taken: StackTaken) -> None:
    assignment, run = _find(turn, taken.job, taken.generation, taken.rank)
    if assignment is not None and run is not None and taken.number > run.stack_number:
        turn.put(turn.put_rank(assignment, replace(run, stack=taken.stack, stack_number=taken.number)))


def trainer_exited(turn: Turn, exited: TrainerExited) -> None:
    assignment, run = _find(turn, exited.job, exited.generation, exited.rank)
    if assignment is None:
        return
    if run is None:
        _retired(turn, assignment, exited)
        return
    if run.stage is not RankStage.EXITED:
        fact = replace(exited.exit, ended_for=_order(turn, assignment, exited.exit))
        stage = move(RANK_MOVES, run.stage, RankStage.EXITED, f"{exited.job} rank {exited.rank}")
        assignment = turn.put_rank(assignment, replace(run, stage=stage, exit=fact))
        if all(other.stage is RankStage.EXITED for other in assignment.ranks):
            over = move(GENERATION_MOVES, assignment.stage, GenerationStage.OVER, str(exited.job))
            assignment = replace(assignment, stage=over)
        turn.put(assignment, journal=True)
    _fail_unstaged(turn, assignment, exited.rank)


def _order(turn: Turn, assignment: Assignment, fact: ExitFact) -> str:
    """Why it was told to end. Empty if it ended by itself, be it a moment before the order would have reached it."""
    if not fact.ended_for and fact.code is not None:
        return ""
    return assignment.fenced or (LEAVING if turn.state.stopping else fact.ended_for)


def _retired(turn: Turn, assignment: Assignment, exited: TrainerExited) -> None:
    gone = RetiringRank(generation=exited.generation, rank=exited.rank)
    if gone not in assignment.retiring:
        return
    retiring = tuple(rank for rank in assignment.retiring if rank != gone)
    turn.put(replace(assignment, retiring=retiring))
    turn.act(JournalRetired(job=exited.job, generation=exited.generation, rank=exited.rank))
    if not any(rank.generation == exited.generation for rank in retiring):
        turn.act(CleanGeneration(job=exited.job, generation=exited.generation))


def _fail_unstaged(turn: Turn, assignment: Assignment, rank: int) -> None:
    """Bytes staged before the exit are still uploaded; what was not staged will never be."""
    for shard in assignment.shards:
        if shard.rank == rank and shard.stage is ShardStage.REQUESTED:
            stage = move(SHARD_MOVES, shard.stage, ShardStage.FAILED, f"{assignment.job} shard of rank {rank}")
            failed = replace(shard, stage=stage, reason=f"rank {rank} exited before it staged step {shard.step}")
            turn.put(turn.put_shard(assignment, failed))


def _find(turn: Turn, job: str, generation: int, rank: int) -> tuple[Assignment | None, RankRun | None]:
    """The job's assignment, and the rank if it belongs to its newest generation."""
    assignment = next((a for a in turn.state.assignments.values() if a.job == job), None)
    if assignment is None or assignment.generation != generation:
        return assignment, None
    return assignment, next((run for run in assignment.ranks if run.rank == rank), None)


# ---- what is looked at in every turn ---------------------------------------------------------------------


def spawn_what_fits(turn: Turn) -> None:
    """Spawn every ready generation that has room. The intent goes into the journal before any keeper starts."""
    for assignment in tuple(turn.state.assignments.values()):
        spec = assignment.spec
        if assignment.stage is not GenerationStage.READY or spec is None or assignment.retiring:
            continue
        if turn.state.slots_used + spec.nproc > turn.state.slots:
            continue
        of = f"{assignment.job} generation {assignment.generation}"
        ranks = tuple(
            replace(run, stage=move(RANK_MOVES, run.stage, RankStage.SPAWNING, of)) for run in assignment.ranks
        )
        stage = move(GENERATION_MOVES, assignment.stage, GenerationStage.LIVE, of)
        turn.put(replace(assignment, stage=stage, ranks=ranks), journal=True)
        for run in ranks:
            port = spec.master_port if run.rank == 0 else 0
            spawn = SpawnTrainer(
                job=assignment.job, generation=assignment.generation, rank=run.rank, rendezvous_port=port
            )
            turn.act(spawn)


def clean_what_is_over(turn: Turn) -> None:
    for assignment in tuple(turn.state.assignments.values()):
        if assignment.stage is not GenerationStage.OVER or assignment.cleaned:
            continue
        if not assignment.stopped and not all(shard.is_settled for shard in assignment.shards):
            continue  # an upload still reads the staged bytes
        turn.put(replace(assignment, cleaned=True))
        turn.act(CleanGeneration(job=assignment.job, generation=assignment.generation))


def give_memory_back(turn: Turn) -> None:
    """Remove the stage slots of every job that has left this node."""
    for assignment in tuple(turn.state.assignments.values()):
        left = assignment.stage is GenerationStage.OVER and assignment.stopped and not assignment.retiring
        if left and not assignment.keep_arena and not assignment.arena_gone:
            turn.put(replace(assignment, arena_gone=True))
            turn.act(RemoveArena(job=assignment.job))


def fence(turn: Turn) -> None:
    """End everything when no coordinator was seen for too long: somebody else may have been given the work."""
    silent_s = turn.now - turn.state.coordinator_seen_at
    if silent_s <= turn.state.fence_after_s:
        return
    for assignment in tuple(turn.state.assignments.values()):
        if assignment.stage in (GenerationStage.OVER, GenerationStage.ENDING):
            continue
        reason = f"its worker saw no coordinator for {silent_s:.0f} s"
        end_generation(turn, replace(assignment, fenced=reason), 0.0, reason)
        turn.act(SendSnapshot())
