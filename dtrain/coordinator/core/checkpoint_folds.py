"""The fold of the events about checkpoints. The table of legal transitions is in states.py."""

from dataclasses import replace

from dtrain.common.errors import InvariantError
from dtrain.coordinator.core import packs
from dtrain.coordinator.core.events import (
    AttemptSwept,
    CheckpointAborted,
    CheckpointCommitted,
    CheckpointDeleted,
    CheckpointExpired,
    CheckpointMarked,
    CheckpointPinned,
    CheckpointQuarantined,
    CheckpointStarted,
    PacksDeleted,
    PacksExpired,
    RecordedEvent,
)
from dtrain.coordinator.core.states import (
    AbortedAttempt,
    CommittedCheckpoint,
    DoomedPacks,
    InflightCheckpoint,
    JobPhase,
    JobState,
)


def require(condition: bool, state: JobState | None, record: RecordedEvent, why: str) -> None:
    if not condition:
        before = "no job" if state is None else f"job {state.name} ({state.phase}, event {state.position.seq})"
        raise InvariantError(f"{record.key}: {record.type} cannot follow {before}: {why}")


def fold_checkpoint(state: JobState, record: RecordedEvent) -> JobState | None:
    """Fold a checkpoint's event; None if the event is of another kind."""
    inflight = state.inflight
    match record.event:
        case CheckpointStarted() as event:
            generation = state.generation
            require(state.phase is JobPhase.RUNNING and inflight is None, state, record, "one is in flight")
            require(generation is not None and generation.number == event.generation, state, record, "old generation")
            require(event.attempt == state.last_attempt + 1, state, record, "its attempt is not the next")
            require(event.checkpoint == state.next_checkpoint, state, record, "its number is not the next")
            started = InflightCheckpoint(
                number=event.checkpoint,
                attempt=event.attempt,
                generation=event.generation,
                step=event.step,
                position=record.position,
                base=event.base,
            )
            require(not packs.why_base_is_lost(state, started), state, record, "its base is not there")
            return replace(state, inflight=started, last_attempt=event.attempt, checkpoint_time=record.time)
        case CheckpointAborted() as event:
            require(inflight is not None, state, record, "none is in flight")
            assert inflight is not None
            same = (event.checkpoint, event.attempt) == (inflight.number, inflight.attempt)
            require(same, state, record, "it is not the one in flight")
            aborted = AbortedAttempt(checkpoint=event.checkpoint, attempt=event.attempt, store=state.spec.store)
            return replace(
                state,
                inflight=None,
                misses=state.misses + 1 if event.missed else state.misses,
                aborted={**state.aborted, event.attempt: aborted},
            )
        case CheckpointCommitted() as event:
            return _committed(state, record, event)
        case CheckpointMarked() as event:
            require(event.checkpoint in state.committed, state, record, "it is not committed")
            committed = state.committed[event.checkpoint]
            require(not committed.marked, state, record, "it is marked already")
            return state.with_checkpoint(replace(committed, marked=True))
        case CheckpointQuarantined() as event:
            require(event.checkpoint in state.committed, state, record, "it is not committed")
            committed = state.committed[event.checkpoint]
            require(not committed.quarantined, state, record, "it is quarantined already")
            why = f"{event.key}: {event.reason}"
            return state.with_checkpoint(replace(committed, quarantined=why))
        case _:
            return None


def _committed(state: JobState, record: RecordedEvent, event: CheckpointCommitted) -> JobState:
    inflight, generation = state.inflight, state.generation
    require(inflight is not None and generation is not None, state, record, "none is in flight")
    assert inflight is not None and generation is not None
    started = (inflight.number, inflight.attempt, inflight.generation, inflight.step, generation.world_size)
    committed = (event.checkpoint, event.attempt, event.generation, event.step, event.world_size)
    require(committed == started, state, record, "it is not the one in flight")
    ranks = [shard.rank for shard in event.shards]
    require(ranks == list(range(event.world_size)), state, record, "a rank's shard is missing")
    foreign = packs.why_foreign(state, inflight, event.shards)
    require(not foreign, state, record, foreign)
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
    return replace(
        state.with_checkpoint(checkpoint),
        inflight=None,
        misses=0,
        last_checkpoint=int(event.checkpoint),
        packs={**dict.fromkeys(sorted(pack.key for pack in checkpoint.packs), event.store), **state.packs},
    )


def fold_retention(state: JobState, record: RecordedEvent) -> JobState | None:
    """Fold an event about what is kept; None if the event is of another kind."""
    match record.event:
        case CheckpointPinned() as event:
            require(event.checkpoint in state.committed, state, record, "it is not committed")
            committed = state.committed[event.checkpoint]
            require(not committed.expired, state, record, "it is expired")
            require(committed.pinned != event.pinned, state, record, "it changes nothing")
            return state.with_checkpoint(replace(committed, pinned=event.pinned))
        case CheckpointExpired() as event:
            require(event.checkpoint in state.committed, state, record, "it is not committed")
            committed, newest = state.committed[event.checkpoint], state.newest_restorable
            require(newest is not None and event.checkpoint != newest.number, state, record, "it is the newest")
            require(committed.marked and not committed.pinned, state, record, "it is not marked, or is pinned")
            require(not committed.expired, state, record, "it is expired already")
            building = state.inflight is not None and state.inflight.base == event.checkpoint
            require(not building, state, record, "the attempt in flight builds upon it")
            return state.with_checkpoint(replace(committed, expired=True))
        case CheckpointDeleted() as event:
            expired = event.checkpoint in state.committed and state.committed[event.checkpoint].expired
            require(expired, state, record, "it is not expired")
            left = {number: c for number, c in state.committed.items() if number != event.checkpoint}
            return replace(state, committed=left)
        case AttemptSwept() as event:
            require(event.attempt in state.aborted, state, record, "it was not aborted")
            rest = {number: a for number, a in state.aborted.items() if number != event.attempt}
            return replace(state, aborted=rest)
        case PacksExpired() as event:
            known = all(state.packs.get(key) == event.store for key in event.keys)
            require(known and len(event.keys) > 0, state, record, "there is no such pack")
            require(packs.named(state).isdisjoint(event.keys), state, record, "a checkpoint names one of them")
            left_packs = {key: store for key, store in state.packs.items() if key not in event.keys}
            doomed = DoomedPacks(keys=event.keys, store=event.store)
            return replace(state, packs=left_packs, doomed={**state.doomed, record.seq: doomed})
        case PacksDeleted() as event:
            require(event.expired in state.doomed, state, record, "they have not expired")
            still = {number: found for number, found in state.doomed.items() if number != event.expired}
            return replace(state, doomed=still)
        case _:
            return None
