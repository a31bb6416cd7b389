"""What must hold whatever happens: facts in any order, nonsense among them, under any number of leaders."""

import hashlib
import os
import subprocess
import sys
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain.common.names import CheckpointNumber, JobName
from dtrain.coordinator import codec
from dtrain.coordinator.core.effects import DeleteAttempt, DeletePacks
from dtrain.coordinator.core.events import (
    AttemptSwept,
    CheckpointAborted,
    CheckpointCommitted,
    CheckpointDeleted,
    CheckpointExpired,
    CheckpointPinned,
    CheckpointQuarantined,
    CheckpointStarted,
    GenerationFailed,
    GenerationStarted,
    PacksExpired,
    RecordedEvent,
)
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.facts import ShardPhase
from dtrain.coordinator.core.states import JobState
from tests.coordinator.support.turmoil import Happening, Turmoil, seeded

NUMBERS = st.integers(min_value=0, max_value=999)
WALKS = st.lists(st.builds(Happening, NUMBERS, NUMBERS, NUMBERS), max_size=60)


class Checker:
    """Judges every event by the log alone and by what the workers have said; knows nothing of the rules."""

    def __init__(self) -> None:
        self.seen = 0
        self.inflight: dict[str, CheckpointStarted] = {}
        self.sound: dict[str, dict[int, CheckpointCommitted]] = {}
        self.committed: dict[tuple[str, int], CheckpointCommitted] = {}
        self.generation: dict[str, GenerationStarted | None] = {}
        self.pinned: dict[str, set[int]] = {}  # numbers of checkpoints
        self.there: dict[str, dict[CheckpointNumber, CheckpointCommitted]] = {}  # until deleted
        self.lost: dict[str, set[str]] = {}  # packs that may be deleted
        self.doomed: dict[str, dict[int, int]] = {}  # attempts that may be deleted, with their checkpoints

    def check(self, turmoil: Turmoil) -> None:
        for record, _ in turmoil.cluster.log[self.seen :]:
            self._judge(record, turmoil)
        self.seen = len(turmoil.cluster.log)
        for job in turmoil.cluster.jobs:
            deletions = {e.attempt for e in turmoil.cluster.owes(job) if isinstance(e, DeleteAttempt)}
            for effect in turmoil.cluster.owes(job):
                if isinstance(effect, DeletePacks):
                    assert set(effect.packs) <= self.lost[job], "deletes packs that have not expired"
            needed = {key for committed in self.there.get(job, {}).values() for key in packs_of(committed)}
            keeping = [e.keep for e in turmoil.cluster.owes(job) if isinstance(e, DeleteAttempt) and e.committed]
            assert all(needed <= keep for keep in keeping), "a deletion does not know of a pack that is needed"
            assert deletions <= self.doomed.get(job, {}).keys(), "deletes what is neither expired nor aborted"

    def _judge(self, record: RecordedEvent, turmoil: Turmoil) -> None:
        job = record.job
        sound = self.sound.setdefault(job, {})
        match record.event:
            case GenerationStarted() as event:
                assert self.generation.get(job) is None, "two generations at once"
                self.generation[job] = event
                restored = None if event.restore is None else event.restore.checkpoint
                assert restored == (max(sound) if sound else None), "not from the newest sound checkpoint"
            case GenerationFailed():
                assert job not in self.inflight, "a generation failed with a checkpoint in flight"
                self.generation[job] = None
            case CheckpointStarted() as event:
                assert job not in self.inflight, "two checkpoints in flight"
                self.inflight[job] = event
            case CheckpointAborted() as event:
                assert self.inflight.pop(job).attempt == event.attempt
                self.doomed.setdefault(job, {})[event.attempt] = event.checkpoint
            case CheckpointCommitted() as event:
                started = self.inflight.pop(job)
                assert (started.attempt, started.checkpoint, started.step) == (
                    event.attempt,
                    event.checkpoint,
                    event.step,
                )
                assert (job, event.attempt) in turmoil.manifests, "committed without a manifest"
                self._judge_acks(job, event, turmoil)
                self._judge_packs(job, started, event)
                sound[event.checkpoint] = self.committed[job, event.checkpoint] = event
                self.there.setdefault(job, {})[event.checkpoint] = event
            case CheckpointQuarantined() as event:
                sound.pop(event.checkpoint, None)
            case PacksExpired(keys=keys):
                needed = {key for committed in self.there.get(job, {}).values() for key in packs_of(committed)}
                assert needed.isdisjoint(keys), "a pack expires that a checkpoint needs"
                assert not self.lost.setdefault(job, set()) & set(keys), "a pack expires twice"
                self.lost[job] |= set(keys)
            case CheckpointPinned() | CheckpointExpired() | CheckpointDeleted() | AttemptSwept():
                self._judge_retention(job, record)
            case _:
                if record.type in ("JobSucceeded", "JobCancelled", "RunInterrupted"):
                    assert job not in self.inflight, f"{record.type} with a checkpoint in flight"
                    self.generation[job] = None

    def _judge_retention(self, job: str, record: RecordedEvent) -> None:
        sound, doomed = self.sound[job], self.doomed.setdefault(job, {})
        pinned = self.pinned.setdefault(job, set())
        match record.event:
            case CheckpointPinned() as event:
                pinned.symmetric_difference_update({event.checkpoint})
                assert (event.checkpoint in pinned) is event.pinned, "pinned twice, or let go twice"
            case CheckpointExpired() as event:
                assert sound and event.checkpoint < max(sound), "expired the newest sound one, or a newer one"
                assert event.checkpoint not in pinned, "expired a pinned one"
                generation = self.generation.get(job)
                restored = generation.restore if generation is not None else None
                assert restored is None or restored.checkpoint != event.checkpoint, "a generation starts from it"
                sound.pop(event.checkpoint, None)
                doomed[self.committed[job, event.checkpoint].attempt] = event.checkpoint
            case CheckpointDeleted() as event:
                assert event.checkpoint in doomed.values(), "deleted without having expired"
                del self.there[job][event.checkpoint]
            case AttemptSwept() as event:
                assert doomed.get(event.attempt) == event.checkpoint, "swept without having been aborted"
            case _:
                raise AssertionError(record.type)

    def _judge_packs(self, job: str, started: CheckpointStarted, event: CheckpointCommitted) -> None:
        base = packs_of(self.there[job][CheckpointNumber(started.base)]) if started.base else set()
        for key in packs_of(event):
            assert key in base or f"/attempt-{event.attempt:06d}/" in key, "names a pack of neither itself nor its base"
            assert key not in self.lost.get(job, set()), "names a pack that has expired"

    def _judge_acks(self, job: str, event: CheckpointCommitted, turmoil: Turmoil) -> None:
        generation = self.generation[job]
        assert generation is not None
        acked = set()
        for member in generation.members:
            snapshot = turmoil.cluster.observed.workers[member.worker].snapshot
            assert snapshot is not None
            for assignment in snapshot.assignments:
                if assignment.job == job and assignment.generation == generation.generation:
                    acked |= {
                        shard.rank
                        for shard in assignment.shards
                        if shard.phase is ShardPhase.DURABLE
                        and (shard.attempt, shard.step) == (event.attempt, event.step)
                    }
        assert acked >= set(range(generation.world_size)), "committed without every rank's acknowledgement"


def packs_of(committed: CheckpointCommitted) -> set[str]:
    return {pack.key for shard in committed.shards for pack in shard.packs}


def replayed(turmoil: Turmoil) -> dict[JobName, JobState]:
    states: dict[JobName, JobState] = {}
    for record, value in turmoil.cluster.log:
        name = JobName(record.job)
        states[name] = evolve(states.get(name), codec.decode(record.key, value, name))
    return states


def lived_through(walk: list[Happening]) -> Turmoil:
    turmoil, checker = Turmoil(), Checker()
    for happening in walk:
        turmoil.happen(happening)
        turmoil.cluster.decides()
        checker.check(turmoil)
    return turmoil


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(start=st.integers(min_value=0, max_value=10_000), walk=WALKS)
def test_no_facts_break_the_rules_and_replay_gives_the_same_state(start: int, walk: list[Happening]) -> None:
    turmoil = lived_through(seeded(start, 60) + walk)
    assert replayed(turmoil) == turmoil.cluster.jobs
    assert turmoil.cluster.decides() == [] or turmoil.cluster.decides() == [], "decisions never come to rest"


def test_the_turmoil_reaches_every_type_of_event() -> None:
    types: Counter[str] = Counter()
    for seed in range(60):
        types.update(record.type for record, _ in lived_through(seeded(seed, 400)).cluster.log)
    assert set(types) == set(codec._TYPES), f"never seen: {set(codec._TYPES) - set(types)}"


def log_digest(seed: int) -> str:
    values = [value for _, value in lived_through(seeded(seed, 300)).cluster.log]
    assert len(values) > 20
    return hashlib.sha256(b"\n".join(values)).hexdigest()


def test_the_same_facts_give_the_same_bytes_whatever_the_hash_seed_of_the_process() -> None:
    code = "from tests.coordinator.test_turmoil import log_digest; print(*(log_digest(seed) for seed in (3, 15, 16)))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True, timeout=120,
        ).stdout
        for hash_seed in ("0", "1", "4242")
    }  # fmt: skip
    assert len(said) == 1
