"""Which checkpoints stay, which go, and that nothing goes which somebody may still need."""

import itertools

import pytest

from dtrain.common.errors import UserError
from dtrain.common.specs import RetentionPolicy
from dtrain.coordinator.core.effects import DeleteAttempt, WriteMarker
from dtrain.coordinator.core.events import CheckpointQuarantined
from dtrain.coordinator.core.facts import RestorePhase, ShardPhase
from dtrain.coordinator.core.reconcile import DECISIONS_MAX
from dtrain.coordinator.core.retention import kept
from tests.coordinator.support.clusters import Cluster, spec

EVERY_S = 20.0


def training(**policy: float) -> Cluster:
    """A job of two ranks on one worker that trains under this policy."""
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(retention=RetentionPolicy(**policy)), step=1)  # type: ignore[arg-type]
    return cluster


def saves(cluster: Cluster, *, step: int, marked: bool = True) -> list[str]:
    """A checkpoint of exactly this step, and what is decided of it and after it."""
    cluster.trains(step=step - 5)  # a request reaches ranks of 0.1 s a step five steps later
    cluster.asks_for_checkpoint()
    assert cluster.inflight().step == step
    number = cluster.inflight().number
    cluster.acknowledges()
    cluster.manifest_written()
    decided = cluster.decides()
    if marked:
        cluster.marker_written(number)
        decided += cluster.decides()
    return decided


def sound(cluster: Cluster) -> list[int]:
    """Numbers of what could be restored from."""
    return sorted(number for number, c in cluster.job().committed.items() if not c.expired and not c.quarantined)


def doomed(cluster: Cluster) -> list[tuple[int, int, bool]]:
    """(checkpoint, attempt, committed) of the deletions that are owed."""
    owed = [effect for effect in cluster.owes() if isinstance(effect, DeleteAttempt)]
    return [(effect.checkpoint, effect.attempt, effect.committed) for effect in owed]


def fails(cluster: Cluster) -> None:
    """A rank is killed, and the next generation trains."""
    cluster.exits(0, -9)
    decided = cluster.decides()
    assert decided[-2:] == ["GenerationFailed", "GenerationStarted"], decided
    cluster.starts()
    restore = cluster.generation().restore
    cluster.trains(step=restore.step + 1 if restore is not None else 1)


# -- what the policy wants ----------------------------------------------------------------------------


def steps_kept(policy: RetentionPolicy, cluster: Cluster) -> list[int]:
    committed = cluster.job().committed
    return [int(committed[number].step) for number in sorted(kept(policy, committed.values()))]


@pytest.fixture(scope="module")
def six() -> Cluster:
    """A job with checkpoints of steps 10, 20, ... 60, 10 s apart, the first at second 0 of a span."""
    cluster = training()
    cluster.passes(EVERY_S - cluster.now.wall_s % EVERY_S)
    for step in range(10, 70, 10):
        saves(cluster, step=step)
        cluster.passes(10.0)
    return cluster


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (RetentionPolicy(), [10, 20, 30, 40, 50, 60]),
        (RetentionPolicy(keep_last=1), [60]),
        (RetentionPolicy(keep_last=4), [30, 40, 50, 60]),
        (RetentionPolicy(keep_last=99), [10, 20, 30, 40, 50, 60]),
        (RetentionPolicy(keep_last=1, keep_every_steps=20), [20, 40, 60]),
        (RetentionPolicy(keep_last=1, keep_every_steps=25), [50, 60]),
        (RetentionPolicy(keep_last=1, keep_every_steps=1), [10, 20, 30, 40, 50, 60]),
        (RetentionPolicy(keep_last=1, keep_every_seconds=EVERY_S), [10, 30, 50, 60]),
        (RetentionPolicy(keep_last=1, keep_every_seconds=0.001), [10, 20, 30, 40, 50, 60]),
        (RetentionPolicy(keep_last=2, keep_every_steps=20, keep_every_seconds=EVERY_S), [10, 20, 30, 40, 50, 60]),
        (RetentionPolicy(keep_last=1, keep_every_steps=40, keep_every_seconds=EVERY_S), [10, 30, 40, 50, 60]),
    ],
    ids=repr,
)
def test_what_any_rule_wants_is_kept(policy: RetentionPolicy, steps: list[int], six: Cluster) -> None:
    assert steps_kept(policy, six) == steps


def test_a_damaged_checkpoint_takes_no_place_among_the_last() -> None:
    cluster = training()
    for step in (10, 20, 30):
        saves(cluster, step=step)
    cluster.quarantines(3)
    assert steps_kept(RetentionPolicy(keep_last=2), cluster) == [10, 20]


@pytest.mark.parametrize(
    "policy",
    [
        {"keep_last": -1},
        {"keep_every_steps": 5},
        {"keep_every_seconds": 5.0},
        {"keep_last": 1, "keep_every_steps": -5},
        {"keep_last": 1, "keep_every_seconds": float("nan")},
        {"keep_last": 1, "keep_every_seconds": float("inf")},
        {"keep_last": 1, "keep_every_seconds": 1e-300},
    ],
    ids=repr,
)
def test_a_policy_that_cannot_be_meant_is_refused(policy: dict[str, float]) -> None:
    with pytest.raises(UserError, match="keep-"):
        spec(retention=RetentionPolicy(**policy))  # type: ignore[arg-type]


# -- when it goes -------------------------------------------------------------------------------------


def test_nothing_is_deleted_without_a_policy() -> None:
    cluster = training()
    for step in range(10, 60, 10):
        assert saves(cluster, step=step) == ["CheckpointCommitted", "CheckpointMarked"]
    assert doomed(cluster) == []


def test_the_oldest_expires_when_one_more_is_committed_and_is_gone_when_storage_says_so() -> None:
    cluster = training(keep_last=2)
    for step in (10, 20):
        assert saves(cluster, step=step) == ["CheckpointCommitted", "CheckpointMarked"]
    assert saves(cluster, step=30) == ["CheckpointCommitted", "CheckpointExpired", "CheckpointMarked"]
    assert (sound(cluster), doomed(cluster)) == ([2, 3], [(1, 1, True)])
    assert cluster.decides() == [], "it is not gone before storage says so"
    cluster.objects_deleted(1)
    assert doomed(cluster) == []
    assert cluster.decides() == ["CheckpointDeleted"]
    assert sorted(cluster.job().committed) == [2, 3]
    assert saves(cluster, step=40)[0] == "CheckpointCommitted"
    assert max(cluster.job().committed) == 4, "a number is not used twice"


def test_a_deletion_is_owed_over_failover_and_the_end_of_the_job() -> None:
    cluster = training(keep_last=1)
    for step in (10, 20):
        saves(cluster, step=step)
    cluster.finish()
    assert cluster.decides() == ["JobSucceeded"]
    successor = cluster.fails_over()
    assert doomed(successor) == [(1, 1, True)]
    successor.objects_deleted(1)
    assert successor.decides() == ["CheckpointDeleted"]
    assert doomed(successor.fails_over()) == []


def test_a_checkpoint_without_its_marker_is_not_expired_yet() -> None:
    cluster = training(keep_last=1)
    saves(cluster, step=10, marked=False)
    assert "CheckpointExpired" not in saves(cluster, step=20)
    assert [e.checkpoint.number for e in cluster.owes() if isinstance(e, WriteMarker)] == [1]
    cluster.marker_written(1)
    assert cluster.decides() == ["CheckpointMarked", "CheckpointExpired"], "no marker is written behind a deletion"


def test_a_round_has_a_bounded_number_of_decisions_and_the_next_ones_have_the_rest() -> None:
    cluster, count = training(), 2 * DECISIONS_MAX + 5
    for step in range(10, 10 * count + 1, 10):
        saves(cluster, step=step)
    cluster.finish()
    assert cluster.decides() == ["JobSucceeded"]
    cluster.submits(spec(retention=RetentionPolicy(keep_last=1)), request="r2")
    rounds = [cluster.decides() for _ in range(3)]
    assert [len(decided) for decided in rounds] == [DECISIONS_MAX, DECISIONS_MAX, 5]
    assert list(itertools.chain(*rounds)) == ["CheckpointExpired"] * (count - 1) + ["GenerationStarted"]
    assert sound(cluster) == [count]


# -- what never goes ----------------------------------------------------------------------------------


def test_the_newest_sound_checkpoint_stays_when_newer_ones_are_damaged() -> None:
    cluster = training(keep_last=2)
    for step in (10, 20):
        saves(cluster, step=step)
    cluster.quarantines(2)
    assert cluster.decides() == []
    assert saves(cluster, step=30) == ["CheckpointCommitted", "CheckpointExpired", "CheckpointMarked"]
    assert (sound(cluster), doomed(cluster)) == ([1, 3], [(2, 2, True)]), "what is damaged goes first"
    cluster.quarantines(3)
    assert cluster.decides() == []
    assert sound(cluster) == [1]


def test_a_damaged_one_expires_only_once_a_newer_one_is_sound() -> None:
    cluster = training(keep_last=1)
    saves(cluster, step=10)
    cluster.quarantines(1)
    assert cluster.decides() == [], "somebody may want to look into it, and there is no other"
    assert saves(cluster, step=20) == ["CheckpointCommitted", "CheckpointExpired", "CheckpointMarked"]
    assert doomed(cluster) == [(1, 1, True)]


def test_a_damaged_one_expires_only_once_a_sound_one_has_come_as_far() -> None:
    cluster = training(keep_last=1)
    for step in (10, 100):
        saves(cluster, step=step)
    cluster.quarantines(2)
    fails(cluster)
    assert saves(cluster, step=20) == ["CheckpointCommitted", "CheckpointMarked"], "its steps are not done again yet"
    assert 2 not in [number for number, _, _ in doomed(cluster)]
    saves(cluster, step=120)
    assert 2 in [number for number, _, _ in doomed(cluster)]


def test_nothing_expires_while_no_checkpoint_is_sound() -> None:
    cluster = training(keep_last=3)
    for step in (10, 20):
        saves(cluster, step=step)
    fails(cluster)
    for number in (1, 2):  # both before the next look at the job
        cluster.quarantines(number)
    assert cluster.decides() == [] and doomed(cluster) == []
    cluster.restore_is(RestorePhase.DAMAGED, worker="w1", reason="bit")
    assert cluster.decides() == ["GenerationFailed", "GenerationStarted"]
    assert cluster.generation().restore is None


def test_a_pinned_checkpoint_stays_until_it_is_let_go() -> None:
    cluster = training(keep_last=1)
    saves(cluster, step=10)
    cluster.pins(1)
    for step in (20, 30):
        saves(cluster, step=step)
    assert sound(cluster) == [1, 3]
    cluster.pins(1, wanted=False)
    assert cluster.decides() == ["CheckpointExpired"]
    assert sound(cluster) == [3]


def test_a_damaged_checkpoint_that_is_pinned_stays_as_well() -> None:
    cluster = training(keep_last=1)
    saves(cluster, step=10)
    cluster.pins(1)
    cluster.quarantines(1)
    saves(cluster, step=20)
    assert doomed(cluster) == []


def test_a_pin_that_changes_nothing_is_not_written_down_and_one_of_nothing_is_refused() -> None:
    cluster = training(keep_last=1)
    for step in (10, 20):
        saves(cluster, step=step)
    before = len(cluster.log)
    cluster.pins(2, wanted=False)
    assert len(cluster.log) == before
    for gone in (1, 3):  # expired; never was
        with pytest.raises(UserError, match=f"no checkpoint {gone}"):
            cluster.pins(gone)


def test_the_checkpoint_that_the_active_generation_starts_from_stays() -> None:
    cluster = training(keep_last=1)
    saves(cluster, step=10)
    fails(cluster)
    assert saves(cluster, step=20) == ["CheckpointCommitted", "CheckpointMarked"]
    assert sound(cluster) == [1, 2], "a worker may still be reading it"
    cluster.exits(0, -9)
    assert cluster.decides() == ["GenerationFailed", "CheckpointExpired", "GenerationStarted"]
    assert sound(cluster) == [2]


# -- a person's verification --------------------------------------------------------------------------


def test_damage_that_a_person_found_is_never_restored_from_and_the_log_says_who_asked() -> None:
    cluster = training()
    for step in (10, 20):
        saves(cluster, step=step)
    cluster.quarantines(2)
    event = cluster.last("CheckpointQuarantined")
    assert isinstance(event, CheckpointQuarantined)
    assert (event.checkpoint, event.key) == (2, "the blob")
    cause = cluster.log[-1][0].cause
    assert (cause.fact, cause.detail) == ("client_request", "the blob")
    fails(cluster)
    restore = cluster.generation().restore
    assert restore is not None and restore.checkpoint == 1


def test_damage_is_written_down_once_and_only_of_what_is_committed_and_kept() -> None:
    cluster = training(keep_last=1)
    for step in (10, 20):
        saves(cluster, step=step)
    cluster.quarantines(2)
    before = len(cluster.log)
    cluster.quarantines(2)
    assert len(cluster.log) == before
    for gone in (1, 3):  # expired: it may be half deleted; never was
        with pytest.raises(UserError, match=f"no checkpoint {gone}"):
            cluster.quarantines(gone)


# -- aborted attempts ---------------------------------------------------------------------------------


def aborts(cluster: Cluster) -> None:
    cluster.asks_for_checkpoint()
    cluster.shard(0, ShardPhase.FAILED, reason="disk full")
    assert cluster.decides() == ["CheckpointAborted"]


def test_an_aborted_attempt_is_swept_once_a_later_one_is_committed() -> None:
    cluster = training()
    aborts(cluster)
    assert doomed(cluster) == [], "its uploads may still be under way"
    saves(cluster, step=20)
    assert doomed(cluster) == [(1, 1, False)], "the checkpoint's marker is the later attempt's and stays"
    cluster.objects_deleted(1)
    assert cluster.decides() == ["AttemptSwept"]
    assert doomed(cluster) == [] and doomed(cluster.fails_over()) == []
    assert sound(cluster) == [1]


def test_an_attempt_that_was_aborted_last_is_swept_when_the_run_has_ended() -> None:
    cluster = training()
    saves(cluster, step=10)
    aborts(cluster)
    cluster.finish()
    assert cluster.decides() == ["JobSucceeded"]
    assert doomed(cluster) == [(2, 2, False)]


def test_every_aborted_attempt_of_a_checkpoint_is_swept() -> None:
    cluster = training()
    for attempt in range(1, 4):
        aborts(cluster)
        assert max(cluster.job().aborted) == attempt
    saves(cluster, step=20)
    assert [attempt for _, attempt, _ in doomed(cluster)] == [1, 2, 3]
