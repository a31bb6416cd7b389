"""What is kept is there, and nothing else is: storage after a run with a policy and an aborted attempt."""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from dtrain.common.names import JobName
from dtrain.coordinator.core.events import CheckpointAborted, CheckpointStarted, RecordedEvent
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.states import JobState
from dtrain.storage.keys import attempt_prefix, manifest_key, marker_key, shard_key
from dtrain.storage.uris import open_store
from dtrain.storage.verify import verify_checkpoint
from tests.support.cluster import cluster
from tests.support.facts import wait_for
from tests.survival.conftest import STEPS, Attack, begin

KEPT = 2


def folded(events: list[RecordedEvent]) -> JobState:
    state = None
    for event in events:
        state = evolve(state, event)
    assert state is not None
    return state


def objects_of(state: JobState) -> set[str]:
    """The keys that storage must hold, by the log alone."""
    expected = set()
    for number, checkpoint in state.committed.items():
        expected |= {marker_key(state.name, number), manifest_key(state.name, number, checkpoint.attempt)}
        for shard in checkpoint.shards:  # each of its fields that names an object
            expected |= {getattr(shard, field.name) for field in fields(shard) if field.name.endswith("key")} - {""}
            expected |= {pack.key for pack in shard.packs}
    return expected


def stop_in_an_attempt(attack: Attack) -> tuple[CheckpointStarted, set[int]]:
    """Stop both trainers while an attempt is in flight; return the attempt and their pids."""
    seen = 0
    while True:
        started = attack.cluster.wait_for_event(attack.job, "CheckpointStarted", count=seen + 1)
        seen = len(started)
        pids = {attack.steps(rank)[-1]["pid"] for rank in (0, 1)}
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        inflight = folded(attack.cluster.history(attack.job)).inflight
        attempt = started[-1].event
        assert isinstance(attempt, CheckpointStarted)
        if inflight is not None and inflight.attempt == attempt.attempt and attack.furthest() < attempt.step:
            return attempt, pids
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_storage_holds_exactly_what_the_log_says_is_there(
    tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng, more=("--keep-last", str(KEPT)))
        name, store = JobName(attack.job), open_store(attack.store)
        it.wait_for_event(attack.job, "CheckpointDeleted")
        attempt, pids = stop_in_an_attempt(attack)
        # What a rank leaves that had stored its shard when its peer was killed.
        store.put(shard_key(name, attempt.checkpoint, attempt.attempt, 0), b"of an attempt that comes to nothing")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        assert attack.final.read_bytes() == expected
        events = it.history(attack.job)
        assert attempt.attempt in {e.event.attempt for e in events if isinstance(e.event, CheckpointAborted)}

        def settled() -> JobState | None:
            state = folded(it.history(attack.job))
            owing = any(c.expired or not c.marked for c in state.committed.values()) or state.aborted
            return None if owing else state

        state = wait_for("the end of all deletions", settled, deadline_s=30)
        assert {event.type for event in events} >= {"CheckpointExpired", "CheckpointDeleted", "AttemptSwept"}
        assert not list(store.list(attempt_prefix(name, attempt.checkpoint, attempt.attempt)))
        assert sorted(info.key for info in store.list("")) == sorted(objects_of(state))
        numbers = sorted(state.committed)
        assert numbers[-KEPT:] == [state.last_checkpoint - 1, state.last_checkpoint]
        assert len(numbers) <= KEPT + 1, "besides the newest, only the one that the last generation started from"
        for checkpoint in state.committed.values():
            assert verify_checkpoint(store, checkpoint.manifest_key, checkpoint.manifest_digest) == []
