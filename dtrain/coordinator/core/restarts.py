"""Whether a job whose generation failed may go on, when, and from where.

    failure                                       uses a restart    what follows
    --------------------------------------------  ----------------  ------------------------------------------
    script, connection, hang                      yes               the next generation
    killed, memory                                if nothing new    the next generation
                                                  was reached
    preempted, node, checkpoint                   no                the next generation, elsewhere or from an
                                                                    older checkpoint
    the same script error, at the same step,      yes               the job fails: it is the script's bug
    from the same checkpoint, again
    ... and no step was completed after the       yes               once a run: that checkpoint is left aside;
    restore, and an older one is there                              the older one decides whose fault it was

The first restart comes at once, and so does each one after progress. Failures in a row that get no further than any
before wait longer and longer, whatever their kind: a broken node or a full disk is not mended by haste.

All counts come from the log, and times are those of its events, so that every leader decides the same.
"""

from dtrain.coordinator.core.events import Cause, CheckpointQuarantined, Decision, FailureKind, JobFailed
from dtrain.coordinator.core.facts import Now
from dtrain.coordinator.core.states import JobState, LastFailure, Suspicion

# Once may be chance. The same words at the same step from the same state are not.
SAME_ERROR_LIMIT = 2
BACKOFF_FIRST_S = 1.0  # before the second restart in a row without progress; doubled with each further one
BACKOFF_MAX_S = 30.0  # longer would leave machines idle that may be well again


def counts(kind: FailureKind, *, further: bool) -> bool:
    """Whether a failure of this kind uses one of the job's restarts."""
    match kind:
        case FailureKind.PREEMPTED | FailureKind.NODE | FailureKind.CHECKPOINT:
            return False
        case FailureKind.KILLED | FailureKind.MEMORY:
            # What needs too much memory is killed again and again, and not every killer says that it was that. But a
            # generation that got further may have met a neighbour's peak, and a leak leaves most of the time useful.
            return not further
        case FailureKind.SCRIPT | FailureKind.CONNECTION | FailureKind.HANG | FailureKind.UNKNOWN:
            return True


def backoff_s(job: JobState) -> float:
    """Seconds between the newest failure and the next generation."""
    if job.stalls < 2:
        return 0.0
    return min(BACKOFF_FIRST_S * 2.0 ** min(job.stalls - 2, 30), BACKOFF_MAX_S)


def backoff_left_s(job: JobState, now: Now) -> float:
    """Seconds that a pending job has yet to wait because of its failures."""
    if job.last_failure is None:
        return 0.0
    passed_s = now.wall_s - job.last_failure.time
    if passed_s < 0:
        return 0.0  # the clock was set back: nobody can say how long to wait
    return max(0.0, backoff_s(job) - passed_s)


def verdict(job: JobState) -> Decision | None:
    """What a pending job's failures lead to: JobFailed, a suspect checkpoint left aside, or None: start again."""
    last, error = job.last_failure, job.last_error
    if last is None:
        return None
    if job.suspicion is not None and _was_not_the_checkpoint(job.suspicion, last):
        return _failed(last, _same_from_older(job.suspicion), cleared=job.suspicion)
    if error is not None and error.repeats >= SAME_ERROR_LIMIT:
        if not _is_suspect(job, error):
            return _failed(error, _same_again(job, error))
        if job.restarts_used <= job.spec.max_restarts:
            return _left_aside(error)
    if job.restarts_used > job.spec.max_restarts:
        return _failed(last, _budget_words(job))
    return None


def _is_suspect(job: JobState, error: LastFailure) -> bool:
    """Whether the state that was restored may be to blame: no step was completed after it, and none was blamed yet.

    A script that did not even join never read it. Where no older checkpoint could be tried instead, none is blamed:
    what was missing for a minute may lead to the same error twice, and all steps would be done again for it.
    """
    if job.suspicion is not None or error.restored is None or not error.right_after_restore or not error.progressed:
        return False
    sound = {number for number, found in job.committed.items() if not found.quarantined and not found.expired}
    return error.restored in sound and len(sound) > 1


def _was_not_the_checkpoint(suspicion: Suspicion, last: LastFailure) -> bool:
    """Whether the older checkpoint led to the same error: where the newer one did, or right after its restore too."""
    before = suspicion.failure
    if last.generation <= before.generation:
        return False  # the older one has not been tried yet
    if last.kind is not FailureKind.SCRIPT or not last.same_error(before):
        return False
    return last.step == before.step or last.right_after_restore


def _left_aside(error: LastFailure) -> Decision:
    assert error.restored is not None
    event = CheckpointQuarantined(
        checkpoint=error.restored,
        key="its state",
        reason=f"{error.repeats} generations died of the same error before they completed a step from it: "
        f"{error.error or error.reason}",
        suspect=True,
    )
    return Decision(event=event, cause=_cause("same_error_after_restore", error))


def _failed(last: LastFailure, why: str, *, cleared: Suspicion | None = None) -> Decision:
    event = JobFailed(
        reason=f"{last.reason}{why}",
        exit_code=last.exit_code,
        cleared=cleared.checkpoint if cleared is not None else None,
    )
    fact = "same_error_again" if last.repeats >= SAME_ERROR_LIMIT or cleared is not None else "restarts_exhausted"
    return Decision(event=event, cause=_cause(fact, last))


def _cause(fact: str, last: LastFailure) -> Cause:
    return Cause(fact=fact, exit_code=last.exit_code, detail=last.error, traceback=last.traceback)


def _same_again(job: JobState, error: LastFailure) -> str:
    if error.cannot_start:
        return f" ({error.repeats} times in a row before it got anywhere): mend the script and run it again"
    start = "the start" if error.restored is None else f"checkpoint {error.restored}"
    then = ", to continue from the newest checkpoint" if job.newest_restorable is not None else ""
    times = f"{error.repeats} times in a row after step {error.step} from {start}"
    return f" ({times}): mend the script and run it again{then}"


def _same_from_older(suspicion: Suspicion) -> str:
    return (
        f" (from an older checkpoint too, so checkpoint {suspicion.checkpoint} was not at fault): "
        "mend the script and run it again, to continue from it"
    )


def _budget_words(job: JobState) -> str:
    budget, window_s = job.spec.max_restarts, job.spec.restart_window_s
    if not budget:
        return " (no restarts allowed)"
    within = f" of {window_s:g} s" if window_s else ""
    return f" (all {budget} restarts{within} are used)"
