"""The fold: (state, event) -> state. The table of legal transitions is in states.py."""

from dataclasses import replace
from typing import assert_never

from dtrain.common.errors import InvariantError
from dtrain.common.names import Generation, Term
from dtrain.coordinator.core.checkpoint_folds import fold_checkpoint, fold_retention, require
from dtrain.coordinator.core.events import (
    AttemptSwept,
    CancelRequested,
    CheckpointAborted,
    CheckpointCommitted,
    CheckpointDeleted,
    CheckpointExpired,
    CheckpointMarked,
    CheckpointPinned,
    CheckpointQuarantined,
    CheckpointStarted,
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
    RecordedEvent,
    RunInterrupted,
    SalvageStarted,
)
from dtrain.coordinator.core.failure_folds import fold_clearing, fold_failure, fold_salvage, fold_suspicion
from dtrain.coordinator.core.hang_folds import fold_hang
from dtrain.coordinator.core.states import (
    GenerationState,
    JobPhase,
    JobState,
)

_ACTIVE = (JobPhase.PENDING, JobPhase.RUNNING)


def evolve(state: JobState | None, record: RecordedEvent) -> JobState:
    """Return the state after ``record``. Raises InvariantError if the event is not legal here."""
    expected = 1 if state is None else state.position.seq + 1
    require(record.seq == expected, state, record, f"its sequence number is not {expected}")
    require(state is None or record.term >= state.term, state, record, "its term goes back")
    if isinstance(record.event, JobSubmitted):
        return _submitted(state, record, record.event)
    if state is None:
        raise InvariantError(f"{record.key}: {record.type} cannot be a job's first event")
    state = replace(state, position=record.position, term=Term(record.term))
    folded = fold_checkpoint(state, record) or fold_retention(state, record) or _lifecycle_event(state, record)
    return fold_suspicion(folded, record.event) if isinstance(record.event, CheckpointQuarantined) else folded


def _submitted(state: JobState | None, record: RecordedEvent, event: JobSubmitted) -> JobState:
    require(state is None or state.ended, state, record, "the last run has not ended")
    require(event.spec.name == record.job, state, record, "it is of another job")
    run = 1 if state is None else state.run + 1
    require(event.run == run, state, record, f"its run is not {run}")
    fresh = JobState(
        name=event.spec.name,
        position=record.position,
        term=Term(record.term),
        spec=event.spec,
        run=event.run,
        request=event.request,
        phase=JobPhase.PENDING,
        checkpoint_time=record.time,
    )
    if state is None:
        return fresh
    newest = state.newest_restorable
    return replace(
        fresh,
        last_generation=state.last_generation,
        committed=state.committed,
        last_checkpoint=state.last_checkpoint,
        aborted=state.aborted,
        packs=state.packs,
        doomed=state.doomed,
        last_attempt=state.last_attempt,
        placed=state.placed,
        furthest_step=newest.step if newest is not None else fresh.furthest_step,
    )


def _lifecycle_event(state: JobState, record: RecordedEvent) -> JobState:
    match record.event:
        case CancelRequested():
            require(state.phase in _ACTIVE, state, record, "the job is not active")
            return replace(state, phase=JobPhase.CANCELLING)
        case RunInterrupted() as event:
            require(not state.ended and state.inflight is None, state, record, "nothing to interrupt")
            return _end(state, JobPhase.INTERRUPTED, event.reason, 1)
        case GenerationStarted() as event:
            return _generation_started(state, record, event)
        case MembersFinished() as event:
            return _members_finished(state, record, event)
        case GenerationFailed() as event:
            return _generation_failed(state, record, event)
        case HangSuspected() | HangCleared() | HangFound():
            return fold_hang(state, record)
        case SalvageStarted() as event:
            return fold_salvage(state, record, event)
        case JobSucceeded():
            require(state.phase is JobPhase.RUNNING and state.inflight is None, state, record, "not running")
            return _end(state, JobPhase.SUCCEEDED, "", 0)
        case JobFailed() as event:
            require(state.phase is JobPhase.PENDING, state, record, "not pending")
            return _end(fold_clearing(state, event), JobPhase.FAILED, event.reason, event.exit_code)
        case JobCancelled():
            require(state.phase is JobPhase.CANCELLING and state.inflight is None, state, record, "not cancelling")
            return _end(state, JobPhase.CANCELLED, "cancelled", 130)
        case (
            JobSubmitted()
            | CheckpointStarted()
            | CheckpointAborted()
            | CheckpointCommitted()
            | CheckpointMarked()
            | CheckpointQuarantined()
            | CheckpointPinned()
            | CheckpointExpired()
            | CheckpointDeleted()
            | AttemptSwept()
            | PacksExpired()
            | PacksDeleted()
        ):
            raise InvariantError(f"{record.key}: {record.type} was not handled where it belongs")
        case unreachable:
            assert_never(unreachable)


def _end(state: JobState, phase: JobPhase, reason: str, exit_code: int) -> JobState:
    return replace(state, phase=phase, generation=None, reason=reason, exit_code=exit_code)


def _generation_started(state: JobState, record: RecordedEvent, event: GenerationStarted) -> JobState:
    require(state.phase is JobPhase.PENDING, state, record, "not pending")
    require(event.generation == state.last_generation + 1, state, record, "its number is not the next")
    ranks = [rank for member in event.members for rank in member.ranks]
    require(ranks == list(range(event.world_size)), state, record, "its ranks have a gap or overlap")
    newest = state.newest_restorable
    require(event.restore == (newest and newest.restore_point), state, record, "it does not start from the newest")
    generation = GenerationState(
        number=event.generation,
        members=event.members,
        world_size=event.world_size,
        master_address=event.master_address,
        master_port=event.master_port,
        restore=event.restore,
        position=record.position,
        started_time=record.time,
        restarts=state.restarts,
    )
    placed = {**state.placed, **{member.worker: event.generation for member in event.members}}
    return replace(
        state,
        phase=JobPhase.RUNNING,
        generation=generation,
        last_generation=event.generation,
        placed=placed,
        checkpoint_time=record.time,
    )


def _members_finished(state: JobState, record: RecordedEvent, event: MembersFinished) -> JobState:
    generation = _active(state, record, event.generation)
    members = {member.worker for member in generation.members}
    new = set(event.workers)
    require(bool(new) and len(new) == len(event.workers), state, record, "it names nobody, or somebody twice")
    require(new <= members - set(generation.finished), state, record, "it names who is no member, or was named before")
    return replace(state, generation=replace(generation, finished=generation.finished + event.workers))


def _generation_failed(state: JobState, record: RecordedEvent, event: GenerationFailed) -> JobState:
    generation = _active(state, record, event.generation)
    require(state.inflight is None, state, record, "a checkpoint is in flight")
    return fold_failure(state, generation, record, event)


def _active(state: JobState, record: RecordedEvent, number: Generation) -> GenerationState:
    generation = state.generation
    require(
        state.phase is JobPhase.RUNNING and generation is not None and generation.number == number,
        state,
        record,
        "it is not the active generation",
    )
    assert generation is not None
    return generation
