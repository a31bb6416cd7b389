"""When a generation has failed, and why. Whether its job may go on is the subject of restarts.py.

A generation fails as a whole: collectives cannot go on without a member. The first cause is named as the reason
(first_causes.py); the peers' connection errors that follow it within milliseconds are its victims.
"""

from collections.abc import Iterator

from dtrain.common.names import Step
from dtrain.coordinator.core import finished
from dtrain.coordinator.core.events import (
    Cause,
    CheckpointQuarantined,
    Decision,
    FailureKind,
    GenerationFailed,
    Member,
)
from dtrain.coordinator.core.facts import AssignmentReport, Now, RankReport, RankState, RestorePhase
from dtrain.coordinator.core.first_causes import (
    FIRST_CAUSE_WAIT_S,
    FailedRank,
    failed_ranks,
    victims_of,
)
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.restarts import counts
from dtrain.coordinator.core.states import SIGNAL_EXIT_BASE, GenerationState, InflightCheckpoint, JobState

_SIGKILL = 9
_STARTED_PHASES = frozenset(
    {"joined", "restoring", "training", "checkpointing", "holding", "paused", "left", "finished"}
)


def reports(
    job: JobState, generation: GenerationState, observed: Observed
) -> Iterator[tuple[Member, AssignmentReport]]:
    """Each member that has reported on this generation, with its report."""
    for member in generation.members:
        report = observed.assignment(member.worker, job.name, generation.number)
        if report is not None:
            yield member, report


def failure(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> Decision | None:
    """What a failed generation leads to, but for its checkpoint in flight; None while it is healthy."""
    return (
        _damaged_restore(job, generation, observed)
        or _refused(job, generation, observed)
        or _failed_rank(job, generation, observed, now)
        or _lost_member(job, generation, observed, now)
    )


def _snapshot_number(observed: Observed, member: Member) -> int:
    snapshot = observed.view(member.worker).snapshot
    return snapshot.number if snapshot is not None else 0


def _damaged_restore(job: JobState, generation: GenerationState, observed: Observed) -> Decision | None:
    restore = generation.restore
    if restore is None:
        return None
    for member, report in reports(job, generation, observed):
        if report.restore.phase is not RestorePhase.DAMAGED or report.restore.checkpoint != restore.checkpoint:
            continue
        cause = Cause(
            fact="checkpoint_damaged",
            worker=member.worker,
            snapshot=_snapshot_number(observed, member),
            detail=f"{report.restore.key}: {report.restore.reason}",
        )
        if not job.committed[restore.checkpoint].quarantined:
            quarantined = CheckpointQuarantined(
                checkpoint=restore.checkpoint, key=report.restore.key, reason=report.restore.reason
            )
            return Decision(event=quarantined, cause=cause)
        failed = GenerationFailed(
            generation=generation.number,
            reason=f"checkpoint {restore.checkpoint} is damaged: {report.restore.key}: {report.restore.reason}",
            counted=False,
            kind=FailureKind.CHECKPOINT,
        )
        return Decision(event=failed, cause=cause)
    return None


def _refused(job: JobState, generation: GenerationState, observed: Observed) -> Decision | None:
    """A worker that refuses to start a generation (it was told of a newer one) will never run it."""
    for member in generation.members:
        snapshot = observed.view(member.worker).snapshot
        if snapshot is None:
            continue
        for command in snapshot.commands:
            if command.id == start_id(job, generation) and command.refused_by(observed.term):
                cause = Cause(
                    fact="command_refused", worker=member.worker, snapshot=snapshot.number, detail=command.reason
                )
                failed = GenerationFailed(
                    generation=generation.number,
                    reason=f"worker {member.worker} refused to start it: {command.reason}",
                    counted=not snapshot.leaving,  # who is asked to leave when it was chosen already is nobody's fault
                    kind=FailureKind.PREEMPTED if snapshot.leaving else FailureKind.UNKNOWN,
                )
                return Decision(event=failed, cause=cause)
    return None


def stage_id(job: JobState, inflight: InflightCheckpoint) -> str:
    """Id of the command that stages this attempt; the same for every leader."""
    return f"{job.name}/g{inflight.generation}/checkpoint-{inflight.number}/attempt-{inflight.attempt}"


def start_id(job: JobState, generation: GenerationState) -> str:
    """Id of the command that starts this generation's trainers; the same for every leader."""
    return f"{job.name}/g{generation.number}/start"


def _failed_rank(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> Decision | None:
    failed = failed_ranks(reports(job, generation, observed), observed)
    if not failed:
        return None
    first, *others = failed
    unreachable = None
    if first.is_victim:
        if _cause_may_follow(job, generation, observed, now):
            return None
        unreachable = next((m for m in generation.members if _is_unreachable(job, generation, m, observed)), None)
    if unreachable is not None:
        return _lost_with_victims(job, generation, observed, unreachable, failed)
    rank, worker = first.report, first.member.worker
    furthest = _furthest(job, generation, observed)
    event = GenerationFailed(
        generation=generation.number,
        reason=f"rank {rank.rank} on {worker} {how_it_ended(rank)}",
        counted=counts(first.kind, further=job.got_further(furthest)),
        exit_code=_exit_code(rank),
        error=rank.error if rank.exit_code > 0 else "",
        progressed=_progressed(job, generation, observed),
        kind=first.kind,
        step=rank.completed_step,
        furthest_step=furthest,
        victims=victims_of(others),
    )
    cause = Cause(
        fact="trainer_exited",
        worker=worker,
        snapshot=_snapshot_number(observed, first.member),
        rank=rank.rank,
        exit_code=rank.exit_code,
        detail=rank.error,
        traceback=rank.traceback,
    )
    return Decision(event=event, cause=cause)


def _is_unreachable(job: JobState, generation: GenerationState, member: Member, observed: Observed) -> bool:
    return not observed.view(member.worker).connected and not finished.is_done(job, generation, member, observed)


def _cause_may_follow(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> bool:
    """Whether lost connections are all that is known, and another rank's end may still be reported."""
    ended = sum(
        rank.state is RankState.EXITED for _, report in reports(job, generation, observed) for rank in report.ranks
    )
    ended += sum(member.nproc for member in finished.unheard(job, generation, observed))
    if ended == generation.world_size:
        return False
    since = observed.failing_since_s.setdefault((job.name, generation.number), now.mono_s)
    return now.mono_s - since < FIRST_CAUSE_WAIT_S


def _lost_with_victims(
    job: JobState, generation: GenerationState, observed: Observed, member: Member, failed: list[FailedRank]
) -> Decision:
    """Peers lost their connections and a worker cannot be reached: one death explains both."""
    furthest = _furthest(job, generation, observed)
    event = GenerationFailed(
        generation=generation.number,
        reason=f"worker {member.worker} cannot be reached, and its peers lost their connections",
        counted=False,
        progressed=True,
        kind=FailureKind.NODE,
        step=furthest,
        furthest_step=furthest,
        victims=victims_of(failed),
    )
    return Decision(
        event=event,
        cause=Cause(
            fact="worker_unreachable",
            worker=member.worker,
            snapshot=_snapshot_number(observed, member),
            detail=failed[0].report.error,
        ),
    )


def _progressed(job: JobState, generation: GenerationState, observed: Observed) -> bool:
    return any(
        rank.completed_step > 0 or rank.phase in _STARTED_PHASES
        for _, report in reports(job, generation, observed)
        for rank in report.ranks
    )


def _furthest(job: JobState, generation: GenerationState, observed: Observed) -> Step:
    """The furthest step that any rank of the generation is known to have completed."""
    steps = [rank.completed_step for _, report in reports(job, generation, observed) for rank in report.ranks]
    return max(steps, default=Step(0))


def how_it_ended(rank: RankReport) -> str:
    """The end of a trainer in words."""
    if rank.ended_for:
        at = f" after step {rank.completed_step} of {rank.until_step}" if rank.until_step else ""
        return f"was ended by its node{at}: {rank.ended_for}"
    if rank.exit_unknown:
        return "ended unseen"
    if rank.out_of_memory and rank.exit_code == -_SIGKILL:
        return f"was killed by the kernel, which was out of memory: {rank.out_of_memory}"
    beside = " (just then the kernel, out of memory, killed a process beside it)" if rank.out_of_memory else ""
    if rank.exit_code < 0:
        return f"was ended by signal {-rank.exit_code}{beside}"
    return f"exited with code {rank.exit_code}" + (f": {rank.error}" if rank.error else "") + beside


def _exit_code(rank: RankReport) -> int:
    if rank.exit_unknown or rank.exit_code == 0:
        return 1
    return rank.exit_code if rank.exit_code > 0 else SIGNAL_EXIT_BASE - rank.exit_code


def _lost_member(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> Decision | None:
    for member in generation.members:
        view = observed.view(member.worker)
        if finished.is_done(job, generation, member, observed):
            continue  # nothing is lost with it
        if view.journal and view.journal != member.journal:
            why = "its data folder is new, or it is another node of the same --worker-id"
            reason = f"worker {member.worker} came back without its memory ({why})"
            cause = Cause(fact="journal_replaced", worker=member.worker, snapshot=_snapshot_number(observed, member))
        elif observed.fenced(member.worker, now):
            reason = f"worker {member.worker} keeps its lease, and told nothing for so long that it ended what it ran"
            cause = Cause(fact="worker_mute", worker=member.worker, snapshot=_snapshot_number(observed, member))
        elif observed.lost(member.worker, now):
            reason = f"worker {member.worker} is gone: its lease and its stream ended"
            cause = Cause(fact="worker_lost", worker=member.worker, snapshot=_snapshot_number(observed, member))
        else:
            continue
        furthest = _furthest(job, generation, observed)
        event = GenerationFailed(
            generation=generation.number,
            reason=reason,
            counted=False,
            progressed=True,
            kind=FailureKind.NODE,
            step=furthest,
            furthest_step=furthest,
            victims=victims_of(failed_ranks(reports(job, generation, observed), observed)),
        )
        return Decision(event=event, cause=cause)
    return None
