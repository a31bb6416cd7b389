"""Which checkpoints are kept, and when what is not kept may be deleted.

Deletion is an event first, then the marker, the manifest and the shards, in that order: at every moment what a
marker promises is there. The newest sound checkpoint never expires, nor the one the active generation starts
from, nor a damaged one until a sound one has come as far. An attempt is swept only once it is aborted and a later
one is committed or the run has ended.
"""

from collections.abc import Iterable

from dtrain.common.names import CheckpointNumber
from dtrain.common.specs import RetentionPolicy
from dtrain.coordinator.core.events import AttemptSwept, Cause, CheckpointDeleted, CheckpointExpired, Decision
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.states import AbortedAttempt, CommittedCheckpoint, JobState


def kept(policy: RetentionPolicy, checkpoints: Iterable[CommittedCheckpoint]) -> set[CheckpointNumber]:
    """Numbers of the sound checkpoints that the policy wants."""
    sound = sorted((c for c in checkpoints if not c.quarantined and not c.expired), key=lambda c: c.number)
    if not policy.keep_last:
        return {c.number for c in sound}
    wanted = {c.number for c in sound[-policy.keep_last :]}
    wanted |= {c.number for c in sound if c.pinned}
    if policy.keep_every_steps:
        wanted |= {c.number for c in sound if c.step % policy.keep_every_steps == 0}
    if policy.keep_every_seconds:
        first: dict[int, CheckpointNumber] = {}
        for c in sound:
            first.setdefault(int(c.time // policy.keep_every_seconds), c.number)
        wanted |= set(first.values())
    return wanted


def expire(job: JobState) -> Decision | None:
    """CheckpointExpired for the oldest checkpoint that nobody wants, or None."""
    policy, newest = job.spec.retention, job.newest_restorable
    if not policy.keep_last or newest is None:
        return None  # without a sound one, nothing that a person might still save is given up
    wanted = kept(policy, job.committed.values())
    if job.generation is not None and job.generation.restore is not None:
        wanted.add(job.generation.restore.checkpoint)
    if job.inflight is not None and job.inflight.base:
        wanted.add(CheckpointNumber(job.inflight.base))
    for number in sorted(job.committed):
        checkpoint = job.committed[number]
        if number in wanted or checkpoint.expired or checkpoint.pinned or not checkpoint.marked:
            continue
        if number > newest.number or checkpoint.step > newest.step:
            continue  # a damaged one that is ahead of all sound ones: people will want to see it
        what = "damaged and older" if checkpoint.quarantined else "older"
        event = CheckpointExpired(checkpoint=number, reason=f"{what} than the {policy.keep_last} newest to be kept")
        return Decision(event=event, cause=Cause(fact="retention_policy"))
    return None


def sweepable(job: JobState) -> list[AbortedAttempt]:
    """Aborted attempts whose objects may be deleted."""
    newest = max((c.attempt for c in job.committed.values()), default=0)
    return [a for number, a in sorted(job.aborted.items()) if a.store and (job.ended or number < newest)]


def confirm(job: JobState, observed: Observed) -> Decision | None:
    """CheckpointDeleted or AttemptSwept for what storage has confirmed to be gone."""
    for number, checkpoint in job.committed.items():
        if checkpoint.expired and (job.name, checkpoint.attempt) in observed.deleted:
            return Decision(event=CheckpointDeleted(checkpoint=number), cause=Cause(fact="objects_deleted"))
    for aborted in job.aborted.values():
        if (job.name, aborted.attempt) in observed.deleted:
            swept = AttemptSwept(checkpoint=aborted.checkpoint, attempt=aborted.attempt)
            return Decision(event=swept, cause=Cause(fact="objects_deleted"))
    return None
