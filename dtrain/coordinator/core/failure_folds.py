"""The fold of what a failure costs: restarts used, waits to come, and whether it is the same failure again.

Everything is computed from the events and their times, so a replay on another day counts the same. The rules that
read these counts are in restarts.py.
"""

from dataclasses import replace

from dtrain.coordinator.core.checkpoint_folds import require
from dtrain.coordinator.core.events import (
    CheckpointQuarantined,
    FailureKind,
    GenerationFailed,
    JobFailed,
    RecordedEvent,
    SalvageStarted,
)
from dtrain.coordinator.core.states import GenerationState, JobPhase, JobState, LastFailure, Suspicion


def fold_failure(
    state: JobState, generation: GenerationState, record: RecordedEvent, event: GenerationFailed
) -> JobState:
    """The state after its active generation failed."""
    further = state.got_further(event.furthest_step)
    failure = _described(generation, record, event)
    times = _restart_times(state, record, event)
    return replace(
        state,
        phase=JobPhase.PENDING,
        generation=None,
        restarts=state.restarts + 1,
        restarts_used=len(times),
        restart_times=times,
        stalls=_stalls(state, event, further=further),
        furthest_step=max(state.furthest_step, event.furthest_step),
        last_failure=failure,
        last_error=_last_error(state.last_error, failure, further=further),
    )


def fold_salvage(state: JobState, record: RecordedEvent, event: SalvageStarted) -> JobState:
    """The state once a failed generation is kept for its checkpoint in flight."""
    inflight = state.inflight
    require(state.phase is JobPhase.RUNNING and inflight is not None, state, record, "none is in flight")
    assert inflight is not None
    same = (event.checkpoint, event.attempt) == (inflight.number, inflight.attempt)
    require(same and not inflight.salvaging, state, record, "it is not the one in flight, or is salvaged already")
    return replace(state, inflight=replace(inflight, salvage_time=record.time, salvage_wait_s=event.wait_s))


def _described(generation: GenerationState, record: RecordedEvent, event: GenerationFailed) -> LastFailure:
    restore = generation.restore
    return LastFailure(
        reason=event.reason,
        error=event.error,
        exit_code=event.exit_code,
        progressed=event.progressed,
        age_s=record.time - generation.started_time,
        repeats=1,
        generation=event.generation,
        time=record.time,
        kind=event.kind,
        step=event.step,
        restored=restore.checkpoint if restore is not None else None,
        restored_step=restore.step if restore is not None else None,
        victims=event.victims,
        traceback=record.cause.traceback,
    )


def _restart_times(state: JobState, record: RecordedEvent, event: GenerationFailed) -> tuple[float, ...]:
    """Times of the restarts that count now: those within the window, and no more than it takes to be over budget."""
    times = (*state.restart_times, record.time) if event.counted else state.restart_times
    window_s = state.spec.restart_window_s
    if window_s:
        times = tuple(time for time in times if record.time - time < window_s)
    return times[-(state.spec.max_restarts + 1) :]


def _stalls(state: JobState, event: GenerationFailed, *, further: bool) -> int:
    if further:
        return 0
    if event.kind is FailureKind.CHECKPOINT:
        return state.stalls  # nothing was tried: the next generation starts from an older one
    return state.stalls + 1


def _last_error(last: LastFailure | None, failure: LastFailure, *, further: bool) -> LastFailure | None:
    if failure.kind is FailureKind.SCRIPT:
        same = last is not None and last.same_place(failure) and last.same_error(failure)
        return replace(failure, repeats=last.repeats + 1) if last is not None and same else failure
    return None if further else last  # another kind of failure in between excuses nothing


def fold_suspicion(state: JobState, event: CheckpointQuarantined) -> JobState:
    """A sound-looking checkpoint is left aside because what was restored from it died of the same error twice."""
    error = state.last_error
    if not event.suspect or error is None:
        return state
    return replace(state, suspicion=Suspicion(checkpoint=event.checkpoint, failure=error), last_error=None)


def fold_clearing(state: JobState, event: JobFailed) -> JobState:
    """The checkpoint that was suspected and was not at fault may be restored from again."""
    found = state.committed.get(event.cleared) if event.cleared is not None else None
    if found is None or found.expired:
        return state
    return state.with_checkpoint(replace(found, quarantined=""))
