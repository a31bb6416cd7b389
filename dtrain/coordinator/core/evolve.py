"""The fold: (state, event) -> state. The table of legal transitions is in states.py."""

from dataclasses import replace
from typing import assert_never

from dtrain.common.errors import InvariantError
from dtrain.common.names import Term
from dtrain.coordinator.core.events import (
    CancelRequested,
    CheckpointAborted,
    CheckpointCommitted,
    CheckpointMarked,
    CheckpointQuarantined,
    CheckpointStarted,
    GenerationFailed,
    GenerationStarted,
    JobCancelled,
    JobFailed,
    JobSubmitted,
    JobSucceeded,
    RecordedEvent,
    RunInterrupted,
)
from dtrain.coordinator.core.states import (
    CommittedCheckpoint,
    GenerationState,
    InflightCheckpoint,
    JobPhase,
    JobState,
    LastFailure,
)

_ACTIVE = (JobPhase.PENDING, JobPhase.RUNNING)


def _require(condition: bool, state: JobState | None, record: RecordedEvent, why: str) -> None:
    if not condition:
        before = "no job" if state is None else f"job {state.name} ({state.phase}, event {state.position.seq})"
        raise InvariantError(f"{record.key}: {record.type} cannot follow {before}: {why}")


def evolve(state: JobState | None, record: RecordedEvent) -> JobState:
    """Return the state after ``record``. Raises InvariantError if the event is not legal here."""
    expected = 1 if state is None else state.position.seq + 1
    _require(record.seq == expected, state, record, f"its sequence number is not {expected}")
    _require(state is None or record.term >= state.term, state, record, "its term goes back")
    if isinstance(record.event, JobSubmitted):
        return _submitted(state, record, record.event)
    if state is None:
        raise InvariantError(f"{record.key}: {record.type} cannot be a job's first event")
    state = replace(state, position=record.position, term=Term(record.term))
    return _checkpoint_event(state, record) or _lifecycle_event(state, record)


def _submitted(state: JobState | None, record: RecordedEvent, event: JobSubmitted) -> JobState:
    _require(state is None or state.ended, state, record, "the last run has not ended")
    _require(event.spec.name == record.job, state, record, "it is of another job")
    run = 1 if state is None else state.run + 1
    _require(event.run == run, state, record, f"its run is not {run}")
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
    return replace(
        fresh,
        last_generation=state.last_generation,
        committed=state.committed,
        last_attempt=state.last_attempt,
        placed=state.placed,
    )


def _lifecycle_event(state: JobState, record: RecordedEvent) -> JobState:
    match record.event:
        case CancelRequested():
            _require(state.phase in _ACTIVE, state, record, "the job is not active")
            return replace(state, phase=JobPhase.CANCELLING)
        case RunInterrupted() as event:
            _require(not state.ended and state.inflight is None, state, record, "nothing to interrupt")
            return _end(state, JobPhase.INTERRUPTED, event.reason, 1)
        case GenerationStarted() as event:
            return _generation_started(state, record, event)
        case GenerationFailed() as event:
            return _generation_failed(state, record, event)
        case JobSucceeded():
            _require(state.phase is JobPhase.RUNNING and state.inflight is None, state, record, "not running")
            return _end(state, JobPhase.SUCCEEDED, "", 0)
        case JobFailed() as event:
            _require(state.phase is JobPhase.PENDING, state, record, "not pending")
            return _end(state, JobPhase.FAILED, event.reason, event.exit_code)
        case JobCancelled():
            _require(state.phase is JobPhase.CANCELLING and state.inflight is None, state, record, "not cancelling")
            return _end(state, JobPhase.CANCELLED, "cancelled", 130)
        case (
            JobSubmitted()
            | CheckpointStarted()
            | CheckpointAborted()
            | CheckpointCommitted()
            | CheckpointMarked()
            | CheckpointQuarantined()
        ):
            raise InvariantError(f"{record.key}: {record.type} was not handled where it belongs")
        case unreachable:
            assert_never(unreachable)


def _end(state: JobState, phase: JobPhase, reason: str, exit_code: int) -> JobState:
    return replace(state, phase=phase, generation=None, reason=reason, exit_code=exit_code)


def _generation_started(state: JobState, record: RecordedEvent, event: GenerationStarted) -> JobState:
    _require(state.phase is JobPhase.PENDING, state, record, "not pending")
    _require(event.generation == state.last_generation + 1, state, record, "its number is not the next")
    ranks = [rank for member in event.members for rank in member.ranks]
    _require(ranks == list(range(event.world_size)), state, record, "its ranks have a gap or overlap")
    newest = state.newest_restorable
    _require(event.restore == (newest and newest.restore_point), state, record, "it does not start from the newest")
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


def _generation_failed(state: JobState, record: RecordedEvent, event: GenerationFailed) -> JobState:
    generation = state.generation
    _require(
        state.phase is JobPhase.RUNNING and generation is not None and generation.number == event.generation,
        state,
        record,
        "it is not the active generation",
    )
    _require(state.inflight is None, state, record, "a checkpoint is in flight")
    assert generation is not None
    last = state.last_failure
    hopeless = event.error != "" and not event.progressed
    same = last is not None and hopeless and not last.progressed and last.error == event.error
    failure = LastFailure(
        reason=event.reason,
        error=event.error,
        exit_code=event.exit_code,
        progressed=event.progressed,
        age_s=record.time - generation.started_time,
        repeats=last.repeats + 1 if last is not None and same else 1,
    )
    return replace(
        state,
        phase=JobPhase.PENDING,
        generation=None,
        restarts=state.restarts + 1,
        restarts_used=state.restarts_used + int(event.counted),
        last_failure=failure,
    )


def _checkpoint_event(state: JobState, record: RecordedEvent) -> JobState | None:
    """Fold a checkpoint's event; None if the event is of another kind."""
    inflight = state.inflight
    match record.event:
        case CheckpointStarted() as event:
            generation = state.generation
            _require(state.phase is JobPhase.RUNNING and inflight is None, state, record, "one is in flight")
            _require(generation is not None and generation.number == event.generation, state, record, "old generation")
            _require(event.attempt == state.last_attempt + 1, state, record, "its attempt is not the next")
            _require(event.checkpoint == state.next_checkpoint, state, record, "its number is not the next")
            started = InflightCheckpoint(
                number=event.checkpoint,
                attempt=event.attempt,
                generation=event.generation,
                step=event.step,
                position=record.position,
            )
            return replace(state, inflight=started, last_attempt=event.attempt, checkpoint_time=record.time)
        case CheckpointAborted() as event:
            _require(inflight is not None, state, record, "none is in flight")
            assert inflight is not None
            same = (event.checkpoint, event.attempt) == (inflight.number, inflight.attempt)
            _require(same, state, record, "it is not the one in flight")
            return replace(state, inflight=None, misses=state.misses + 1 if event.missed else state.misses)
        case CheckpointCommitted() as event:
            return _committed(state, record, event)
        case CheckpointMarked() as event:
            _require(event.checkpoint in state.committed, state, record, "it is not committed")
            committed = state.committed[event.checkpoint]
            _require(not committed.marked, state, record, "it is marked already")
            return state.with_checkpoint(replace(committed, marked=True))
        case CheckpointQuarantined() as event:
            _require(event.checkpoint in state.committed, state, record, "it is not committed")
            committed = state.committed[event.checkpoint]
            _require(not committed.quarantined, state, record, "it is quarantined already")
            return state.with_checkpoint(replace(committed, quarantined=f"{event.key}: {event.reason}"))
        case _:
            return None


def _committed(state: JobState, record: RecordedEvent, event: CheckpointCommitted) -> JobState:
    inflight, generation = state.inflight, state.generation
    _require(inflight is not None and generation is not None, state, record, "none is in flight")
    assert inflight is not None and generation is not None
    started = (inflight.number, inflight.attempt, inflight.generation, inflight.step, generation.world_size)
    committed = (event.checkpoint, event.attempt, event.generation, event.step, event.world_size)
    _require(committed == started, state, record, "it is not the one in flight")
    ranks = [shard.rank for shard in event.shards]
    _require(ranks == list(range(event.world_size)), state, record, "a rank's shard is missing")
    checkpoint = CommittedCheckpoint(
        number=event.checkpoint,
        attempt=event.attempt,
        generation=event.generation,
        step=event.step,
        world_size=event.world_size,
        shards=event.shards,
        store=event.store,
        manifest_key=event.manifest_key,
        manifest_digest=event.manifest_digest,
        position=record.position,
        time=record.time,
    )
    return replace(state.with_checkpoint(checkpoint), inflight=None, misses=0)
