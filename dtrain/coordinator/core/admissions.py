"""What a person's request leads to: decisions, or a refusal in one sentence with the mend."""

from collections.abc import Mapping

from dtrain.common.errors import UserError
from dtrain.common.names import CheckpointNumber, JobName
from dtrain.coordinator.core import checkpoints
from dtrain.coordinator.core.events import (
    CancelRequested,
    Cause,
    CheckpointAborted,
    CheckpointPinned,
    CheckpointQuarantined,
    Decision,
    JobSubmitted,
    RunInterrupted,
)
from dtrain.coordinator.core.facts import CancelAsked, CheckpointAsked, Now, PinAsked, QuarantineAsked, SubmitAsked
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.states import CommittedCheckpoint, JobPhase, JobState

Jobs = Mapping[JobName, JobState]


def submit(asked: SubmitAsked, observed: Observed, jobs: Jobs) -> list[Decision]:
    """Decisions that admit a job; empty if this very submission was admitted before."""
    spec, job = asked.spec, jobs.get(asked.spec.name)
    if job is not None and asked.request and job.request == asked.request:
        return []
    slots = [view.snapshot.slots for view in observed.workers.values() if view.snapshot is not None and view.connected]
    if slots and max(slots) < spec.nproc_per_node:
        raise UserError(
            f"nproc-per-node {spec.nproc_per_node} is more than any worker has slots ({max(slots)} at most): "
            "lower --nproc-per-node, or start workers with more --slots."
        )
    cause = Cause(fact="client_request", detail=asked.request)
    decisions = []
    if job is not None and not job.ended:
        if not asked.takes_over:
            raise UserError(
                f"a job named {spec.name!r} is already running: choose another --name, "
                f"or end it first with: dtrain cancel {spec.name}"
            )
        if job.inflight is not None:
            aborted = CheckpointAborted(
                checkpoint=job.inflight.number, attempt=job.inflight.attempt, reason="the run was interrupted"
            )
            decisions.append(Decision(event=aborted, cause=cause))
        decisions.append(Decision(event=RunInterrupted(reason="its launcher ended before it did"), cause=cause))
    run = 1 if job is None else job.run + 1
    return [*decisions, Decision(event=JobSubmitted(spec=spec, run=run, request=asked.request), cause=cause)]


def _known(name: JobName, jobs: Jobs) -> JobState:
    job = jobs.get(name)
    if job is None:
        raise UserError(f"there is no job named {name!r}: see the names with: dtrain list")
    return job


def cancel(asked: CancelAsked, jobs: Jobs) -> list[Decision]:
    """CancelRequested; empty if the job is being cancelled already."""
    job = _known(asked.job, jobs)
    if job.ended:
        raise UserError(f"job {job.name!r} has already ended ({job.phase}): there is nothing to cancel.")
    if job.phase is JobPhase.CANCELLING:
        return []
    return [Decision(event=CancelRequested(), cause=Cause(fact="client_request"))]


def pin(asked: PinAsked, jobs: Jobs) -> list[Decision]:
    """Pin a checkpoint or let it go; empty if it is so already."""
    found = _committed(_known(asked.job, jobs), asked.checkpoint)
    if found.pinned == asked.pinned:
        return []
    event = CheckpointPinned(checkpoint=asked.checkpoint, pinned=asked.pinned)
    return [Decision(event=event, cause=Cause(fact="client_request"))]


def quarantine(asked: QuarantineAsked, jobs: Jobs) -> list[Decision]:
    """Never restore from this checkpoint again; empty if it is so already."""
    found = _committed(_known(asked.job, jobs), asked.checkpoint)
    if found.quarantined:
        return []
    event = CheckpointQuarantined(checkpoint=asked.checkpoint, key=asked.key, reason=asked.reason)
    return [Decision(event=event, cause=Cause(fact="client_request", detail=asked.key))]


def _committed(job: JobState, number: CheckpointNumber) -> CommittedCheckpoint:
    found = job.committed.get(number)
    if found is None or found.expired:
        raise UserError(f"job {job.name!r} has no checkpoint {number}: see them with: dtrain checkpoints {job.name}")
    return found


def checkpoint(asked: CheckpointAsked, observed: Observed, jobs: Jobs, now: Now) -> list[Decision]:
    """Start a checkpoint as soon as possible; empty if one is in flight already."""
    job = _known(asked.job, jobs)
    generation = job.generation
    if job.phase is not JobPhase.RUNNING or generation is None:
        raise UserError(f"job {job.name!r} is {job.phase}: only a running job can be checkpointed.")
    if not job.spec.store:
        raise UserError(f"job {job.name!r} has no store to keep a checkpoint in: give it one with --store next time.")
    in_vain = job.inflight is not None and checkpoints.is_in_vain(job, generation, job.inflight, observed)
    if job.inflight is not None and not in_vain:
        return []  # an attempt is started only shortly before its step, so the one in flight serves the request
    decision = None if in_vain else checkpoints.start_on_request(job, generation, observed, now, asked.request)
    if decision is None:
        raise UserError(
            f"job {job.name!r} cannot be checkpointed right now: its ranks are not all training with run.track(), "
            "or are about to finish. Try again in a moment: dtrain status " + job.name
        )
    return [decision]
