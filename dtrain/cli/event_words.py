"""Every event of a job's history as one sentence, so that the log reads as a story."""

from typing import assert_never

from dtrain.cli.output import words_of_bytes, words_of_victims
from dtrain.coordinator.core.events import (
    AttemptSwept,
    CancelRequested,
    Cause,
    CheckpointAborted,
    CheckpointCommitted,
    CheckpointDeleted,
    CheckpointExpired,
    CheckpointMarked,
    CheckpointPinned,
    CheckpointQuarantined,
    CheckpointStarted,
    Event,
    GenerationFailed,
    GenerationStarted,
    HangCleared,
    HangFound,
    HangSuspected,
    JobCancelled,
    JobFailed,
    JobSubmitted,
    JobSucceeded,
    MembersFinished,
    PacksDeleted,
    PacksExpired,
    RunInterrupted,
    SalvageStarted,
)


def describe(event: Event) -> str:
    """One sentence, without a full stop."""
    match event:
        case JobSubmitted(spec=spec, run=run):
            return f"run {run} submitted: {' '.join((spec.script, *spec.args))}"
        case RunInterrupted(reason=reason):
            return f"run interrupted: {reason}"
        case CancelRequested():
            return "cancellation requested"
        case GenerationStarted():
            return _generation_started(event)
        case MembersFinished(generation=generation, workers=workers):
            return f"generation {generation}: every rank on {', '.join(workers)} has ended well"
        case GenerationFailed(generation=generation, reason=reason, counted=counted, victims=victims):
            uses_none = "" if counted else " (uses no restart)"
            return f"generation {generation} failed: {reason}{words_of_victims(victims)}{uses_none}"
        case HangSuspected() | HangCleared() | HangFound():
            return _hang(event)
        case SalvageStarted(generation=generation, checkpoint=checkpoint, step=step, wait_s=wait_s, reason=reason):
            return (
                f"generation {generation} is failing: {reason}; waiting up to {wait_s:.1f} s "
                f"for checkpoint {checkpoint} of step {step}, which every rank had staged"
            )
        case CheckpointStarted() | CheckpointAborted() | CheckpointCommitted() | CheckpointMarked():
            return _checkpoint_made(event)
        case CheckpointQuarantined() | CheckpointPinned() | CheckpointExpired() | CheckpointDeleted() | AttemptSwept():
            return _checkpoint_kept(event)
        case PacksExpired(keys=keys):
            return f"{_packs(len(keys))} expired: no checkpoint names them any more"
        case PacksDeleted(expired=expired):
            return f"what expired with event {expired} is deleted from storage"
        case JobSucceeded():
            return "job succeeded"
        case JobFailed(reason=reason, exit_code=exit_code):
            return f"job failed with exit code {exit_code}: {reason}"
        case JobCancelled():
            return "job cancelled"
        case _:
            assert_never(event)


def _generation_started(event: GenerationStarted) -> str:
    nodes = ", ".join(member.worker for member in event.members)
    ranks = "1 rank" if event.world_size == 1 else f"{event.world_size} ranks"
    start = (
        "from step 0"
        if event.restore is None
        else f"from checkpoint {event.restore.checkpoint} of step {event.restore.step}"
    )
    return f"generation {event.generation} started: {ranks} on {nodes}, {start}"


def _hang(event: HangSuspected | HangCleared | HangFound) -> str:
    match event:
        case HangSuspected(generation=generation, idle_s=idle_s):
            return f"generation {generation} may hang: no step for {idle_s:.0f} s; its ranks are asked where they stand"
        case HangCleared(generation=generation):
            return f"generation {generation} moves again"
        case HangFound(generation=generation, culprit=culprit) if culprit >= 0:
            return f"generation {generation} hangs: the others seem to wait for rank {culprit}"
        case HangFound(generation=generation):
            return f"generation {generation} hangs: all its ranks stand alike"
        case _:
            assert_never(event)


def _checkpoint_made(event: CheckpointStarted | CheckpointAborted | CheckpointCommitted | CheckpointMarked) -> str:
    match event:
        case CheckpointStarted(checkpoint=checkpoint, step=step, attempt=attempt):
            return f"checkpoint {checkpoint} started for step {step} (attempt {attempt})"
        case CheckpointAborted(checkpoint=checkpoint, attempt=attempt, reason=reason):
            return f"checkpoint {checkpoint} aborted (attempt {attempt}): {reason}"
        case CheckpointCommitted(checkpoint=checkpoint, step=step, shards=shards):
            size = words_of_bytes(sum(shard.state_bytes or shard.size_bytes for shard in shards))
            count = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
            packs = len({pack.key for shard in shards for pack in shard.packs})
            beside = f", of which {_packs(packs)} hold what did not change" if packs else ""
            return f"checkpoint {checkpoint} of step {step} committed: {count}, {size}{beside}"
        case CheckpointMarked(checkpoint=checkpoint):
            return f"checkpoint {checkpoint} marked in storage"
        case _:
            assert_never(event)


def _packs(count: int) -> str:
    return "1 pack" if count == 1 else f"{count} packs"


def _checkpoint_kept(
    event: CheckpointQuarantined | CheckpointPinned | CheckpointExpired | CheckpointDeleted | AttemptSwept,
) -> str:
    match event:
        case CheckpointQuarantined(checkpoint=checkpoint, key=key, reason=reason):
            return f"checkpoint {checkpoint} will not be used again: {key}: {reason}"
        case CheckpointPinned(checkpoint=checkpoint, pinned=pinned):
            return f"checkpoint {checkpoint} {'is to be kept' if pinned else 'need not be kept any more'}"
        case CheckpointExpired(checkpoint=checkpoint, reason=reason):
            return f"checkpoint {checkpoint} expired: {reason}"
        case CheckpointDeleted(checkpoint=checkpoint):
            return f"checkpoint {checkpoint} deleted from storage"
        case AttemptSwept(checkpoint=checkpoint, attempt=attempt):
            return f"what attempt {attempt} at checkpoint {checkpoint} had written is deleted from storage"
        case _:
            assert_never(event)


def describe_cause(cause: Cause) -> str:
    """The fact behind a decision, in words."""
    parts = [cause.fact.replace("_", " ")]
    if cause.worker:
        seen = f"snapshot {cause.snapshot} of {cause.worker}" if cause.snapshot else cause.worker
        parts.append(f"seen in {seen}" if cause.snapshot else f"on {seen}")
    if cause.detail:
        parts.append(cause.detail)
    return ", ".join(parts)
