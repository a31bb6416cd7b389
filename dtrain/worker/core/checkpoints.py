"""The worker's part in checkpoints: from the mailbox's word to storage's word, and the way back at a restore.

Rules:
- a word of another attempt than the newest asked changes nothing;
- a shard is DURABLE only after storage confirmed it, and it is in the journal before any snapshot tells it;
- a damaged checkpoint is only reported: choosing another one is the coordinator's decision.
"""

from dataclasses import replace

from dtrain.common.mailbox import pack
from dtrain.worker.core.actions import JournalShard, OpenRestore, RemoveRestore, SendSnapshot, Upload
from dtrain.worker.core.inputs import MailboxSeen, RestoreDamaged, RestoreReady, UploadDone, UploadFailed
from dtrain.worker.core.states import (
    RESTORE_MOVES,
    SHARD_MOVES,
    Assignment,
    RankStage,
    RestoreProgress,
    RestoreStage,
    ShardAttempt,
    ShardStage,
    move,
)
from dtrain.worker.core.turns import Turn

# Phases in which a rank has read what it starts from.
_RESTORED = ("training", "checkpointing", "holding", "left", "finished")


def mailbox_seen(turn: Turn, seen: MailboxSeen) -> None:
    assignment = turn.assignment(seen.job)
    if assignment is None or assignment.generation != seen.generation:
        return
    run = next((run for run in assignment.ranks if run.rank == seen.rank), None)
    if run is None:
        return
    told = replace(
        run,
        phase=seen.phase,
        completed_step=seen.completed_step,
        until_step=seen.until_step,
        tracking=seen.tracking,
        step_s=seen.step_s,
        metrics_json=seen.metrics_json,
    )
    assignment = turn.put_rank(assignment, told)
    turn.put(assignment)
    if (told.phase, told.tracking, told.until_step) != (run.phase, run.tracking, run.until_step):
        turn.act(SendSnapshot())  # mere progress waits for the heartbeat
    if assignment.restore.stage is RestoreStage.READY and told.phase in _RESTORED and run.phase not in _RESTORED:
        turn.act(RemoveRestore(job=seen.job, generation=seen.generation, rank=seen.rank))
    shard = next((shard for shard in assignment.shards if shard.rank == seen.rank), None)
    if shard is not None and shard.stage is ShardStage.REQUESTED:
        _read_answer(turn, assignment, shard, seen)


def _read_answer(turn: Turn, assignment: Assignment, shard: ShardAttempt, seen: MailboxSeen) -> None:
    word = pack(shard.attempt, shard.step)
    if seen.staged == word and assignment.checkpoint is not None:
        _settle(turn, assignment, shard, ShardStage.STAGED)
        turn.act(
            Upload(
                job=seen.job,
                generation=seen.generation,
                rank=seen.rank,
                request=assignment.checkpoint,
                slot=seen.staged_slot,
                size_bytes=seen.staged_bytes,
            )
        )
    elif seen.missed == word:
        _settle(turn, assignment, shard, ShardStage.MISSED)
    elif seen.stage_failed == word:
        _settle(turn, assignment, shard, ShardStage.FAILED, seen.error or "the state could not be staged")


def _settle(turn: Turn, assignment: Assignment, shard: ShardAttempt, stage: ShardStage, reason: str = "") -> None:
    moved = move(SHARD_MOVES, shard.stage, stage, f"{assignment.job} shard of rank {shard.rank}")
    turn.put(turn.put_shard(assignment, replace(shard, stage=moved, reason=reason)))
    turn.act(SendSnapshot())


def _staged(turn: Turn, answer: UploadDone | UploadFailed) -> tuple[Assignment, ShardAttempt] | None:
    """The shard that this answer is about, if it is still waited for."""
    assignment = turn.assignment(answer.job)
    if assignment is None or assignment.generation != answer.generation or assignment.stopped:
        return None
    for shard in assignment.shards:
        if (shard.rank, shard.attempt, shard.stage) == (answer.rank, answer.attempt, ShardStage.STAGED):
            return assignment, shard
    return None


def upload_done(turn: Turn, done: UploadDone) -> None:
    found = _staged(turn, done)
    if found is None:
        return
    assignment, shard = found
    stage = move(SHARD_MOVES, shard.stage, ShardStage.DURABLE, f"{done.job} shard of rank {done.rank}")
    durable = replace(
        shard,
        stage=stage,
        key=done.key,
        size_bytes=done.size_bytes,
        digest=done.digest,
        index_key=done.index_key,
        index_digest=done.index_digest,
        packs=done.packs,
        state_bytes=done.state_bytes,
    )
    turn.put(turn.put_shard(assignment, durable))
    turn.act(JournalShard(job=done.job, generation=done.generation, shard=durable))
    turn.act(SendSnapshot())


def upload_failed(turn: Turn, failed: UploadFailed) -> None:
    found = _staged(turn, failed)
    if found is not None:
        _settle(turn, *found, ShardStage.FAILED, failed.reason)


def restore_ready(turn: Turn, ready: RestoreReady) -> None:
    assignment = turn.assignment(ready.job)
    if assignment is None or assignment.generation != ready.generation:
        return
    if assignment.restore.stage is not RestoreStage.FETCHING:
        return
    stage = move(RESTORE_MOVES, assignment.restore.stage, RestoreStage.READY, f"{ready.job} restore")
    turn.put(replace(assignment, restore=RestoreProgress(stage=stage)), journal=True)
    for run in assignment.ranks:
        if run.stage is RankStage.RUNNING:  # the others are told when they run
            turn.act(OpenRestore(job=ready.job, generation=ready.generation, rank=run.rank))
        if run.phase in _RESTORED:  # it had everything at hand, and did not wait
            turn.act(RemoveRestore(job=ready.job, generation=ready.generation, rank=run.rank))


def restore_damaged(turn: Turn, damaged: RestoreDamaged) -> None:
    assignment = turn.assignment(damaged.job)
    if assignment is None or assignment.generation != damaged.generation:
        return
    if assignment.restore.stage is not RestoreStage.FETCHING:
        return
    stage = move(RESTORE_MOVES, assignment.restore.stage, RestoreStage.DAMAGED, f"{damaged.job} restore")
    restore = RestoreProgress(stage=stage, key=damaged.key, reason=damaged.reason)
    turn.put(replace(assignment, restore=restore), journal=True)
