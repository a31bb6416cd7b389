"""The part of the fold that is about hangs: one suspicion at a time, cleared or confirmed."""

from dataclasses import replace

from dtrain.coordinator.core.checkpoint_folds import require
from dtrain.coordinator.core.events import HangCleared, HangFound, HangSuspected, RecordedEvent
from dtrain.coordinator.core.states import JobPhase, JobState


def fold_hang(state: JobState, record: RecordedEvent) -> JobState:
    """Fold an event about a hang. Raises InvariantError if it is not legal here."""
    event, generation = record.event, state.generation
    assert isinstance(event, HangSuspected | HangCleared | HangFound)
    require(
        state.phase is JobPhase.RUNNING and generation is not None and generation.number == event.generation,
        state,
        record,
        "it is not the active generation",
    )
    assert generation is not None
    require(generation.hang is None, state, record, "the generation was found to hang")
    if isinstance(event, HangSuspected):
        require(generation.suspicion is None, state, record, "it is suspected already")
        require(event.number == generation.suspicions + 1, state, record, "its number is not the next")
        return replace(state, generation=replace(generation, suspicions=event.number, suspicion=event))
    open_one = generation.suspicion
    require(open_one is not None and open_one.number == event.number, state, record, "it is not suspected")
    if isinstance(event, HangCleared):
        return replace(state, generation=replace(generation, suspicion=None))
    return replace(state, generation=replace(generation, hang=event))
