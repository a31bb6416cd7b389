"""The fold: every legal transition of a job, and that every other one is refused and changes nothing."""

import dataclasses
from dataclasses import replace

import pytest

from dtrain.common.errors import InvariantError
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step, Term, WorkerId
from dtrain.common.packs import Pack
from dtrain.coordinator.core.events import (
    AttemptSwept,
    CancelRequested,
    Cause,
    CheckpointAborted,
    CheckpointCommitted,
    CheckpointDeleted,
    CheckpointExpired,
    CheckpointMarked,
    CheckpointPinned,
    CheckpointQuarantined,
    CheckpointStarted,
    Decision,
    Event,
    GenerationFailed,
    GenerationStarted,
    HangCleared,
    HangFound,
    HangSuspected,
    JobCancelled,
    JobFailed,
    JobSubmitted,
    JobSucceeded,
    Member,
    MembersFinished,
    PacksDeleted,
    PacksExpired,
    RunInterrupted,
    SalvageStarted,
    ShardRecord,
)
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.states import JobPhase, JobState
from tests.coordinator.support.clusters import DIGEST, JOB, PREFIX, WALL_START_S, Cluster, spec

DECIDED = Cause(fact="test")
FINISHED = MembersFinished(generation=Generation(1), workers=(WorkerId("w1"),))


def submitted(run: int) -> JobSubmitted:
    return JobSubmitted(spec=spec(), run=run, request=f"r{run}")


def generation(number: int, *, state: JobState | None = None) -> GenerationStarted:
    member = Member(worker=WorkerId("w1"), journal="j", node_rank=0, first_rank=0, nproc=2)
    newest = None if state is None else state.newest_restorable
    return GenerationStarted(
        generation=Generation(number),
        members=(member,),
        world_size=2,
        master_address="127.0.0.1",
        master_port=1,
        restore=None if newest is None else newest.restore_point,
    )


def failed(number: int) -> GenerationFailed:
    return GenerationFailed(generation=Generation(number), reason="why", counted=True)


def suspected(number: int, *, of: int = 1) -> HangSuspected:
    return HangSuspected(generation=Generation(of), number=number, steps_sum=9, idle_s=300.0, timeout_s=300.0)


def cleared(number: int) -> HangCleared:
    return HangCleared(generation=Generation(1), number=number)


def found(number: int) -> HangFound:
    return HangFound(generation=Generation(1), number=number, idle_s=300.0, culprit=-1, victims=(0, 1), stacks=())


def checkpoint_started(checkpoint: int, attempt: int, *, of: int = 1, base: int = 0) -> CheckpointStarted:
    return CheckpointStarted(
        checkpoint=CheckpointNumber(checkpoint),
        attempt=AttemptNumber(attempt),
        generation=Generation(of),
        step=Step(10 * checkpoint),
        base=base,
    )


def salvaged(checkpoint: int, attempt: int) -> SalvageStarted:
    return SalvageStarted(
        checkpoint=CheckpointNumber(checkpoint),
        attempt=AttemptNumber(attempt),
        generation=Generation(1),
        step=Step(10 * checkpoint),
        wait_s=1.0,
        reason="why",
    )


def aborted(checkpoint: int, attempt: int) -> CheckpointAborted:
    return CheckpointAborted(checkpoint=CheckpointNumber(checkpoint), attempt=AttemptNumber(attempt), reason="why")


def pack(attempt: int) -> Pack:
    return Pack(key=f"jobs/{JOB}/packs/attempt-{attempt:06d}/rank-00000-0f.bin", size_bytes=9, digest=DIGEST)


def committed(checkpoint: int, attempt: int, *packs: Pack) -> CheckpointCommitted:
    return CheckpointCommitted(
        checkpoint=CheckpointNumber(checkpoint),
        attempt=AttemptNumber(attempt),
        generation=Generation(1),
        step=Step(10 * checkpoint),
        world_size=2,
        shards=tuple(ShardRecord(rank=rank, key="k", size_bytes=1, digest=DIGEST, packs=packs) for rank in range(2)),
        store="file:///store",
        manifest_key="m",
        manifest_digest=DIGEST,
    )


def marked(checkpoint: int) -> CheckpointMarked:
    return CheckpointMarked(checkpoint=CheckpointNumber(checkpoint))


def quarantined(checkpoint: int) -> CheckpointQuarantined:
    return CheckpointQuarantined(checkpoint=CheckpointNumber(checkpoint), key="k", reason="bit")


def pinned(checkpoint: int, *, wanted: bool = True) -> CheckpointPinned:
    return CheckpointPinned(checkpoint=CheckpointNumber(checkpoint), pinned=wanted)


def expired(checkpoint: int) -> CheckpointExpired:
    return CheckpointExpired(checkpoint=CheckpointNumber(checkpoint), reason="older")


def deleted(checkpoint: int) -> CheckpointDeleted:
    return CheckpointDeleted(checkpoint=CheckpointNumber(checkpoint))


def swept(checkpoint: int, attempt: int) -> AttemptSwept:
    return AttemptSwept(checkpoint=CheckpointNumber(checkpoint), attempt=AttemptNumber(attempt))


def packs_expired(*attempts: int) -> PacksExpired:
    return PacksExpired(keys=tuple(pack(attempt).key for attempt in attempts), store="file:///store")


def packs_deleted(event: int) -> PacksDeleted:
    return PacksDeleted(expired=event)


SUBMITTED: list[Event] = [submitted(1)]
RUNNING: list[Event] = [*SUBMITTED, generation(1)]
INFLIGHT: list[Event] = [*RUNNING, checkpoint_started(1, 1)]
COMMITTED: list[Event] = [*INFLIGHT, committed(1, 1)]
MARKED: list[Event] = [*COMMITTED, marked(1)]
TWO_MARKED: list[Event] = [*MARKED, checkpoint_started(2, 2), committed(2, 2), marked(2)]
ABORTED: list[Event] = [*INFLIGHT, aborted(1, 1)]

PACKED: list[Event] = [*INFLIGHT, committed(1, 1, pack(1)), marked(1)]
BUILDING: list[Event] = [*PACKED, checkpoint_started(2, 2, base=1)]
REPACKED: list[Event] = [*BUILDING, committed(2, 2, pack(2)), marked(2), expired(1)]
IDLE: list[Event] = [*REPACKED, deleted(1)]
DOOMED: list[Event] = [*IDLE, packs_expired(1)]

HISTORIES: dict[str, list[Event]] = {
    "nothing": [],
    "pending": SUBMITTED,
    "running": RUNNING,
    "in flight": INFLIGHT,
    "salvaging": [*INFLIGHT, salvaged(1, 1)],
    "committed": COMMITTED,
    "marked": MARKED,
    "quarantined": [*MARKED, quarantined(1)],
    "two marked": TWO_MARKED,
    "two committed": [*COMMITTED, checkpoint_started(2, 2), committed(2, 2)],
    "pinned": [*TWO_MARKED, pinned(1)],
    "expired": [*TWO_MARKED, expired(1)],
    "deleted": [*TWO_MARKED, expired(1), deleted(1)],
    "newest quarantined": [*TWO_MARKED, quarantined(2)],
    "all quarantined": [*TWO_MARKED, quarantined(2), quarantined(1)],
    "packed": PACKED,
    "building": BUILDING,
    "repacked": REPACKED,
    "idle pack": IDLE,
    "doomed pack": DOOMED,
    "pack gone": [*DOOMED, packs_deleted(len(DOOMED))],
    "aborted": ABORTED,
    "swept": [*ABORTED, swept(1, 1)],
    "suspected": [*RUNNING, suspected(1)],
    "cleared": [*RUNNING, suspected(1), cleared(1)],
    "hung": [*RUNNING, suspected(1), found(1)],
    "pending again": [*RUNNING, failed(1)],
    "cancelling": [*RUNNING, CancelRequested()],
    "cancelling in flight": [*INFLIGHT, CancelRequested()],
    "succeeded": [*COMMITTED, JobSucceeded()],
    "failed": [*SUBMITTED, JobFailed(reason="why", exit_code=1)],
    "cancelled": [*SUBMITTED, CancelRequested(), JobCancelled()],
    "interrupted": [*SUBMITTED, RunInterrupted(reason="why")],
}

# Histories of a generation that runs with no checkpoint in flight; with two checkpoints ever committed; with
# checkpoint 1 still there; with it there and sound.
TWO = {
    "two marked", "two committed", "pinned", "expired", "deleted", "newest quarantined", "all quarantined",
    "repacked", "idle pack", "doomed pack", "pack gone",
}  # fmt: skip
GONE = {"deleted", "idle pack", "doomed pack", "pack gone"}
EXPIRED = {"expired", "repacked"}
ON = {
    "suspected", "cleared", "hung", "running", "committed", "marked", "quarantined", "aborted", "swept", "packed", *TWO
}  # fmt: skip
HAS_ONE = {"committed", "marked", "quarantined", "succeeded", "packed", "building", *TWO} - GONE
ONE_SOUND = HAS_ONE - {"quarantined", "all quarantined"}

# Each event with the histories it may follow, and the phase it leads to (None: the phase stays).
LEGAL: list[tuple[Event, set[str], JobPhase | None]] = [
    (submitted(1), {"nothing"}, JobPhase.PENDING),
    (submitted(2), {"succeeded", "failed", "cancelled", "interrupted"}, JobPhase.PENDING),
    (generation(1), {"pending"}, JobPhase.RUNNING),
    (generation(2), {"pending again"}, JobPhase.RUNNING),
    (FINISHED, {"in flight", "salvaging", "building", *ON}, JobPhase.RUNNING),
    (failed(1), ON, JobPhase.PENDING),
    (failed(2), set(), None),
    (CancelRequested(), {"pending", "pending again", "in flight", "salvaging", "building", *ON}, JobPhase.CANCELLING),
    (JobCancelled(), {"cancelling"}, JobPhase.CANCELLED),
    (JobSucceeded(), ON, JobPhase.SUCCEEDED),
    (JobFailed(reason="w", exit_code=1), {"pending", "pending again"}, JobPhase.FAILED),
    (RunInterrupted(reason="w"), {"pending", "pending again", "cancelling", *ON}, JobPhase.INTERRUPTED),
    (suspected(1), {"in flight", "salvaging", "building", *ON} - {"suspected", "cleared", "hung"}, None),
    (suspected(2), {"cleared"}, None),
    (suspected(1, of=2), set(), None),
    (cleared(1), {"suspected"}, None),
    (cleared(2), set(), None),
    (found(1), {"suspected"}, None),
    (found(2), set(), None),
    (checkpoint_started(1, 1), {"running", "suspected", "cleared", "hung"}, None),
    (checkpoint_started(2, 2), {"committed", "marked", "quarantined", "packed"}, None),
    (checkpoint_started(2, 2, base=1), {"committed", "marked", "packed"}, None),
    (checkpoint_started(3, 3, base=1), TWO - GONE - EXPIRED - {"all quarantined"}, None),
    (checkpoint_started(3, 3, base=4), set(), None),
    (checkpoint_started(1, 2), {"aborted", "swept"}, None),
    (checkpoint_started(2, 3), set(), None),
    (checkpoint_started(3, 3), TWO, None),
    (checkpoint_started(2, 2, of=2), set(), None),
    (salvaged(1, 1), {"in flight"}, None),
    (salvaged(1, 2), set(), None),
    (salvaged(2, 1), set(), None),
    (aborted(1, 1), {"in flight", "salvaging", "cancelling in flight"}, None),
    (aborted(1, 2), set(), None),
    (aborted(2, 1), set(), None),
    (committed(1, 1), {"in flight", "salvaging", "cancelling in flight"}, None),
    (committed(1, 2), set(), None),
    (committed(2, 1), set(), None),
    (committed(1, 1, pack(1)), {"in flight", "salvaging", "cancelling in flight"}, None),
    (committed(1, 1, pack(2)), set(), None),
    (committed(2, 2), {"building"}, None),
    (committed(2, 2, pack(1), pack(2)), {"building"}, None),
    (committed(2, 2, pack(3)), set(), None),
    (committed(2, 2, dataclasses.replace(pack(1), size_bytes=8)), set(), None),
    (marked(1), {"committed", "two committed", "succeeded"}, None),
    (marked(2), {"two committed"}, None),
    (quarantined(1), ONE_SOUND, None),
    (quarantined(2), TWO - {"newest quarantined", "all quarantined"}, None),
    (pinned(1), HAS_ONE - {"pinned", *EXPIRED}, None),
    (pinned(1, wanted=False), {"pinned"}, None),
    (pinned(2), TWO, None),
    (expired(1), {"two marked"}, None),
    (expired(2), {"newest quarantined"}, None),
    (deleted(1), EXPIRED, None),
    (deleted(2), set(), None),
    (swept(1, 1), {"aborted"}, None),
    (swept(1, 2), set(), None),
    (packs_expired(1), {"idle pack"}, None),
    (packs_expired(2), set(), None),
    (packs_expired(), set(), None),
    (dataclasses.replace(packs_expired(1), store="file:///other"), set(), None),
    (packs_deleted(len(DOOMED)), {"doomed pack"}, None),
    (packs_deleted(1), set(), None),
]  # fmt: skip

CASES = [
    pytest.param(history, event, phase if legal else None, legal, id=f"{history}-{type(event).__name__}-{index}")
    for index, (event, after, phase) in enumerate(LEGAL)
    for history in HISTORIES
    for legal in [history in after]
]


def fold(events: list[Event]) -> tuple[Cluster, JobState | None]:
    cluster, state = Cluster(), None
    for event in events:
        state = cluster.fold(JobName(JOB), state, Decision(event=event, cause=DECIDED))
    return cluster, state


@pytest.mark.parametrize(("history", "event", "phase", "legal"), CASES)
def test_an_event_is_folded_where_it_may_follow_and_refused_elsewhere(
    history: str, event: Event, phase: JobPhase | None, legal: bool
) -> None:
    cluster, state = fold(HISTORIES[history])
    before = repr(state)
    if legal:
        after = cluster.fold(JobName(JOB), state, Decision(event=event, cause=DECIDED))
        assert after.phase is (phase if phase is not None else state and state.phase)
        assert after.position.seq == len(HISTORIES[history]) + 1
    else:
        with pytest.raises(InvariantError, match=type(event).__name__):
            cluster.fold(JobName(JOB), state, Decision(event=event, cause=DECIDED))
    assert repr(state) == before, "the fold changed the state it was given"


def test_every_type_of_event_is_in_the_table() -> None:
    from typing import get_args

    assert {type(event) for event, _, _ in LEGAL} == set(get_args(Event))


def broken(event: Event, **changes: object) -> Event:
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return type(event)(**{**fields, **changes})


REFUSED_FIELDS = [
    ("pending", broken(generation(1), world_size=3), "gap"),
    ("pending", broken(generation(1), generation=Generation(2)), "number"),
    ("in flight", broken(committed(1, 1), step=Step(11)), "in flight"),
    ("in flight", broken(FINISHED, workers=("w1", "w2")), "no member"),
    ("in flight", broken(committed(1, 1), world_size=1), "in flight"),
    ("in flight", broken(committed(1, 1), generation=Generation(2)), "in flight"),
    ("in flight", broken(committed(1, 1), shards=committed(1, 1).shards[:1]), "missing"),
    ("nothing", broken(submitted(1), spec=spec("other")), "another job"),
    ("nothing", submitted(2), "run"),
]


@pytest.mark.parametrize(("history", "event", "why"), REFUSED_FIELDS)
def test_an_event_that_no_leader_could_have_decided_is_refused(history: str, event: Event, why: str) -> None:
    cluster, state = fold(HISTORIES[history])
    with pytest.raises(InvariantError, match=why):
        cluster.fold(JobName(JOB), state, Decision(event=event, cause=DECIDED))


def test_a_generation_must_start_from_the_newest_sound_checkpoint() -> None:
    cluster, state = fold([*MARKED, failed(1)])
    assert state is not None
    with pytest.raises(InvariantError, match="newest"):
        cluster.fold(JobName(JOB), state, Decision(event=generation(2), cause=DECIDED))
    started = cluster.fold(JobName(JOB), state, Decision(event=generation(2, state=state), cause=DECIDED))
    assert started.generation is not None and started.generation.restore is not None


@pytest.mark.parametrize("event", [CancelRequested(), submitted(2)], ids=["within a run", "with the next run"])
def test_a_term_never_goes_back(event: Event) -> None:
    history = [*SUBMITTED] if isinstance(event, CancelRequested) else HISTORIES["failed"]
    cluster, state = fold(history)
    assert state is not None
    older = Cluster(term=cluster.term - 1)
    with pytest.raises(InvariantError, match="term goes back"):
        older.fold(JobName(JOB), state, Decision(event=event, cause=DECIDED))


@pytest.mark.parametrize("seq", [1, 3])
def test_a_repeated_or_skipped_sequence_number_is_refused(seq: int) -> None:
    from dtrain.coordinator import codec

    _, state = fold(SUBMITTED)
    assert state is not None
    entry = codec.record(
        Decision(event=generation(1), cause=DECIDED),
        prefix=PREFIX, job=JobName(JOB), seq=seq, term=7, time_s=WALL_START_S, prev=state.position.digest,
    )  # fmt: skip
    with pytest.raises(InvariantError, match="sequence number"):
        evolve(state, entry.record)


def test_the_next_run_keeps_checkpoints_and_numbers_and_forgets_the_failures_of_the_last() -> None:
    _, state = fold([*MARKED, failed(1), JobFailed(reason="why", exit_code=3), submitted(2)])
    assert state is not None
    assert (state.run, state.phase, state.exit_code, state.reason) == (2, JobPhase.PENDING, 0, "")
    assert (state.restarts, state.restarts_used, state.last_failure) == (0, 0, None)
    assert (state.last_generation, state.last_attempt, sorted(state.committed)) == (1, 1, [1])
    assert state.term == Term(7)


def test_missed_attempts_are_counted_until_a_commit() -> None:
    missed = replace(aborted(1, 1), missed=True)
    _, state = fold([*INFLIGHT, missed])
    assert state is not None and state.misses == 1
    _, state = fold([*INFLIGHT, missed, checkpoint_started(1, 2), aborted(1, 2)])
    assert state is not None and state.misses == 1, "an attempt that failed otherwise says nothing about the lead"
    _, state = fold([*INFLIGHT, missed, checkpoint_started(1, 2), committed(1, 2)])
    assert state is not None and state.misses == 0
