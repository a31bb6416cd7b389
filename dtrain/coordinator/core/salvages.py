"""What becomes of a checkpoint in flight when its generation fails.

The staged bytes lie in shared memory and belong to the workers, so the death of a trainer does not touch them. If every
rank had staged when the generation failed, the checkpoint can still be committed, and the next generation starts from
it instead of doing its steps again:

    SalvageStarted       the generation has failed; nothing is stopped while its checkpoint is waited for
    CheckpointCommitted  in time: the next generation starts from it
    CheckpointAborted    too late, or a rank's bytes are lost: the next generation starts from the one before
    GenerationFailed     follows either at once

How long the wait may be: as long as the steps at stake would take again. How fast storage will be nobody knows, but
by this rule the wait never costs more than was to be saved, and the whole never more than twice the best. It ends
sooner where the uploads show that they cannot arrive in time (paces.py).

Until it is over the generation stays active. So no worker is told to stop, and none gives an upload up.
"""

from enum import Enum
from typing import assert_never

from dtrain.common.names import WorkerId
from dtrain.coordinator.core import paces
from dtrain.coordinator.core.checkpoints import acknowledged
from dtrain.coordinator.core.events import Cause, CheckpointAborted, Decision, GenerationFailed, SalvageStarted
from dtrain.coordinator.core.facts import Now, ShardPhase, ShardReport
from dtrain.coordinator.core.failures import reports
from dtrain.coordinator.core.observed import MUTE_AFTER_S, Observed
from dtrain.coordinator.core.states import GenerationState, InflightCheckpoint, JobState

WAIT_MAX_S = 60.0  # storage that takes longer may well be down
# Less than this is not worth a wait: one round trip to storage takes as long.
WAIT_MIN_S = 0.2
# For the manifest alone, when every shard is stored: a small object, always worth it.
MANIFEST_WAIT_S = 2.0
# A wait is timed by the clocks of two leaders when they change in the middle; they may differ by so much.
CLOCKS_DIFFER_S = 5.0


class _Hope(Enum):
    STORED = "every shard is stored"
    STAGED = "every shard is stored, or staged on a worker that lives"
    UNKNOWN = "not every worker has said what it has"
    NONE = "a rank's bytes are lost, or never were"


def before_failure(
    job: JobState,
    generation: GenerationState,
    inflight: InflightCheckpoint,
    observed: Observed,
    now: Now,
    failed: Decision,
) -> Decision | None:
    """What precedes the end of a generation with a checkpoint in flight; None while that is waited for."""
    hope, lost = _hope(job, generation, inflight, observed, now)
    if inflight.salvaging:
        if hope is _Hope.NONE:
            return _abort(inflight, f"and what it had staged is lost: {lost}", failed)
        if not _in_time(inflight, now):
            reason = f"and what it had staged was not stored within {inflight.salvage_wait_s:.1f} s"
            return _abort(inflight, reason, failed)
        if slow := paces.too_slow(job, generation, inflight, observed, now):
            reason = f"and what it had staged cannot be stored within {inflight.salvage_wait_s:.1f} s: {slow}"
            return _abort(inflight, reason, failed)
        return None
    match hope:
        case _Hope.UNKNOWN:
            return None  # a new leader: each worker reports in a moment, or is lost or mute after a while
        case _Hope.NONE:
            return _abort(inflight, f"and {lost}", failed)
        case _Hope.STORED | _Hope.STAGED:
            steps, again_s = _at_stake(job, generation, inflight, observed)
            wait_s = min(again_s, WAIT_MAX_S)
            if hope is _Hope.STORED:
                wait_s = max(wait_s, MANIFEST_WAIT_S)
            if wait_s < WAIT_MIN_S:
                return _abort(
                    inflight, f"and its {steps} steps take {again_s:.3f} s again: no wait is worth it", failed
                )
            assert isinstance(failed.event, GenerationFailed)
            event = SalvageStarted(
                checkpoint=inflight.number,
                attempt=inflight.attempt,
                generation=inflight.generation,
                step=inflight.step,
                wait_s=round(wait_s, 3),
                reason=failed.event.reason,
            )
            return Decision(event=event, cause=failed.cause)


def _abort(inflight: InflightCheckpoint, why: str, failed: Decision) -> Decision:
    reason = f"generation {inflight.generation} failed, {why}"
    event = CheckpointAborted(checkpoint=inflight.number, attempt=inflight.attempt, reason=reason)
    return Decision(event=event, cause=Cause(fact=failed.cause.fact, worker=failed.cause.worker))


def _in_time(inflight: InflightCheckpoint, now: Now) -> bool:
    return -CLOCKS_DIFFER_S <= now.wall_s - inflight.salvage_time < inflight.salvage_wait_s


def _at_stake(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed
) -> tuple[int, float]:
    """The steps between the newest checkpoint and this one, and the seconds that they would take again."""
    newest = job.newest_restorable
    steps = inflight.step - (newest.step if newest is not None else 0)
    times = [
        rank.step_s for _, report in reports(job, generation, observed) for rank in report.ranks if rank.step_s > 0
    ]
    return steps, steps * min(times, default=0.0)


def _hope(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed, now: Now
) -> tuple[_Hope, str]:
    """What may still become of the attempt; where nothing may, why."""
    if acknowledged(job, generation, inflight, observed) is not None:
        return _Hope.STORED, ""
    unknown = False
    for member in generation.members:
        view = observed.view(member.worker)
        report = observed.assignment(member.worker, job.name, generation.number)
        if report is None:
            if view.snapshot is not None or observed.lost(member.worker, now):
                return _Hope.NONE, f"{member.worker} has nothing of it"
            if observed.mute(member.worker, now):
                return _Hope.NONE, f"{member.worker} has not said what it has for {MUTE_AFTER_S:.0f} s"
            unknown = True
            continue
        shards = {shard.rank: shard for shard in report.shards if shard.attempt == inflight.attempt}
        uploads = not _gone(observed, member.worker, member.journal, now, patient=inflight.salvaging)
        for rank in member.ranks:
            if why := _why_lost(shards.get(rank), inflight, uploads=uploads):
                return _Hope.NONE, f"rank {rank} on {member.worker} {why}"
    return (_Hope.UNKNOWN if unknown else _Hope.STAGED), ""


def _why_lost(shard: ShardReport | None, inflight: InflightCheckpoint, *, uploads: bool) -> str:
    """Why this rank's bytes will never be stored; empty if they are, or are on their way."""
    if shard is None or shard.step != inflight.step or shard.phase is ShardPhase.REQUESTED:
        return "had not staged it"
    match shard.phase:
        case ShardPhase.DURABLE:
            return ""
        case ShardPhase.STAGED:
            return "" if uploads else "had staged it, and will not upload it"
        case ShardPhase.MISSED | ShardPhase.FAILED:
            return f"could not store it: {shard.reason or shard.phase}"
        case unreachable:
            assert_never(unreachable)


def _gone(observed: Observed, worker: WorkerId, journal: str, now: Now, *, patient: bool) -> bool:
    """Whether this worker will not finish its uploads; ``patient``: a broken stream may be a worker that restarts."""
    view = observed.view(worker)
    if view.snapshot is None or view.journal != journal or view.leaving:
        return True
    return observed.lost(worker, now) if patient else not view.connected
