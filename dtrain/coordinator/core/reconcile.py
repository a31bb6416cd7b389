"""reconcile: compare desired state with the facts and decide the next event.

One call gives one decision; `decide` repeats it, folding each decision in, until desired state and facts
agree. Everything decided in one round is appended as one transaction. The rules are tried in the order below
and the first that applies wins:

    any          note what storage has confirmed; expire what nobody wants
    ended        nothing else
    CANCELLING   abort the attempt in flight; end once nothing of the job runs any more
    PENDING      fail for good if its failures say so; else start a generation as soon as they and workers allow
    RUNNING      fail the generation, also one that hangs, unless its checkpoint can be salvaged first; settle the
                 attempt in flight; succeed; note who has finished; start a checkpoint
"""

from collections.abc import Callable, Mapping
from typing import assert_never

from dtrain.common.errors import InvariantError
from dtrain.common.names import Generation, JobName
from dtrain.coordinator.core import (
    checkpoints,
    failures,
    finished,
    hangs,
    holds,
    packs,
    placement,
    restarts,
    retention,
    salvages,
)
from dtrain.coordinator.core.events import (
    Cause,
    CheckpointAborted,
    Decision,
    GenerationFailed,
    JobCancelled,
    JobSucceeded,
    Member,
)
from dtrain.coordinator.core.facts import Now, RankState
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.states import GenerationState, JobPhase, JobState

# More decisions than this about one job in one round mean that two rules answer each other for ever. A job has
# at most a mark for each unmarked checkpoint and a handful of others; marks are spread over rounds.
DECISIONS_MAX = 16

Jobs = Mapping[JobName, JobState]


def reconcile(job: JobState, observed: Observed, jobs: Jobs, now: Now) -> Decision | None:
    """Return the next decision about ``job``, or None if desired state and facts agree."""
    settled = checkpoints.marks(job, observed) or retention.confirm(job, observed) or retention.expire(job)
    settled = settled or packs.confirm(job, observed) or packs.expire(job)
    if settled is not None:
        return settled
    match job.phase:
        case JobPhase.PENDING:
            return restarts.verdict(job) or placement.start(job, observed, jobs, now)
        case JobPhase.RUNNING:
            assert job.generation is not None
            return _running(job, job.generation, observed, now)
        case JobPhase.CANCELLING:
            return _cancelling(job, observed, now)
        case JobPhase.SUCCEEDED | JobPhase.FAILED | JobPhase.CANCELLED | JobPhase.INTERRUPTED:
            return None
        case unreachable:
            assert_never(unreachable)


def decide(
    job: JobState,
    observed: Observed,
    jobs: Jobs,
    now: Now,
    fold: Callable[[JobState, Decision], JobState],
) -> tuple[JobState, list[Decision]]:
    """Reconcile until nothing is left to decide. ``fold`` gives the state after a decision."""
    decisions: list[Decision] = []
    while (decision := reconcile(job, observed, jobs, now)) is not None:
        decisions.append(decision)
        job = fold(job, decision)
        if len(decisions) == DECISIONS_MAX:
            if all(d == decision for d in decisions):
                raise InvariantError(f"job {job.name}: {decision} is decided again and again")
            break
    return job, decisions


def _running(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> Decision | None:
    failed = failures.failure(job, generation, observed, now) or hangs.hang(job, generation, observed, now)
    if failed is not None and isinstance(failed.event, GenerationFailed) and job.inflight is not None:
        failed = salvages.before_failure(job, generation, job.inflight, observed, now, failed)
    return (
        failed
        or checkpoints.settle(job, generation, observed, now)
        or _success(job, generation, observed)
        or finished.note(job, generation, observed)
        or (_started(job, generation, observed, now) if job.inflight is None else None)
    )


def _started(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> Decision | None:
    return checkpoints.start(job, generation, observed, now) or holds.release(job, generation, observed)


def _success(job: JobState, generation: GenerationState, observed: Observed) -> Decision | None:
    if job.inflight is not None:
        return None
    if not all(finished.is_done(job, generation, member, observed) for member in generation.members):
        return None
    return Decision(event=JobSucceeded(), cause=Cause(fact="all_ranks_finished"))


def _cancelling(job: JobState, observed: Observed, now: Now) -> Decision | None:
    if job.inflight is not None:
        aborted = CheckpointAborted(
            checkpoint=job.inflight.number, attempt=job.inflight.attempt, reason="the job is being cancelled"
        )
        return Decision(event=aborted, cause=Cause(fact="client_request"))
    if job.generation is not None:
        for member in job.generation.members:
            gone = observed.lost(member.worker, now) or observed.mute(member.worker, now)  # told to stop when it comes
            if not gone and not _stopped(job, job.generation, member, observed):
                return None
    return Decision(event=JobCancelled(), cause=Cause(fact="all_ranks_ended"))


def _stopped(job: JobState, generation: GenerationState, member: Member, observed: Observed) -> bool:
    """True if the worker's own report says that nothing of this generation runs there or ever will."""
    snapshot = observed.view(member.worker).snapshot
    if snapshot is None:
        return False
    stop = stop_id(job.name, generation.number)
    if any(command.id == stop and command.state == "done" for command in snapshot.commands):
        return True
    report = next((a for a in snapshot.assignments if a.job == job.name), None)
    return (
        report is not None
        and report.generation >= generation.number
        and all(rank.state is RankState.EXITED for rank in report.ranks)
    )


def stop_id(job: JobName, generation: Generation) -> str:
    """Id of the command that ends this generation's trainers; the same for every leader."""
    return f"{job}/g{generation}/stop"
