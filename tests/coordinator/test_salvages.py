"""A checkpoint that was staged when its generation died: committed if that saves more than it costs."""

import itertools
from collections.abc import Callable

import pytest

from dtrain.coordinator.core.commands import StopTrainers
from dtrain.coordinator.core.events import CheckpointAborted, GenerationFailed, GenerationStarted, SalvageStarted
from dtrain.coordinator.core.facts import ShardPhase, Transfer
from dtrain.coordinator.core.observed import LOST_AFTER_S, MUTE_AFTER_S
from dtrain.coordinator.core.paces import MIB
from dtrain.coordinator.core.salvages import CLOCKS_DIFFER_S, MANIFEST_WAIT_S, WAIT_MAX_S
from tests.coordinator.support.clusters import Cluster, spec

RESTARTED = ["GenerationFailed", "GenerationStarted"]
GIVEN_UP = ["CheckpointAborted", *RESTARTED]
LOST = "Connection closed by peer"
STEP_S = 0.5


def in_flight(*workers: str, step_s: float = STEP_S) -> Cluster:
    """Checkpoint 1 is committed; checkpoint 2 is in flight, some steps later."""
    cluster = Cluster()
    cluster.joins(*workers)
    cluster.runs(spec(nnodes_min=len(workers), nnodes_max=len(workers)), step=10)
    cluster.commits()
    cluster.trains(step=20, step_s=STEP_S)
    cluster.asks_for_checkpoint()
    cluster.trains(step=cluster.inflight().step, step_s=step_s)
    return cluster


def stages(cluster: Cluster) -> None:
    for rank in range(cluster.generation().world_size):
        cluster.shard(rank, ShardPhase.STAGED)


def salvage(cluster: Cluster) -> SalvageStarted:
    event = cluster.last("SalvageStarted")
    assert isinstance(event, SalvageStarted)
    return event


def restored(cluster: Cluster) -> int:
    event = cluster.last("GenerationStarted")
    assert isinstance(event, GenerationStarted) and event.restore is not None
    return event.restore.checkpoint


def gain_s(cluster: Cluster) -> float:
    saved = cluster.job().committed[min(cluster.job().committed)].step
    return (cluster.inflight().step - saved) * STEP_S


def test_the_bytes_of_dead_ranks_are_waited_for_and_the_next_generation_starts_from_them() -> None:
    cluster = in_flight("w1")
    stages(cluster)
    cluster.exits(1, -9, at_s=50.0)
    assert cluster.decides() == ["SalvageStarted"]
    event = salvage(cluster)
    assert (event.checkpoint, event.reason) == (2, "rank 1 on w1 was ended by signal 9")
    assert event.wait_s == pytest.approx(gain_s(cluster)), "the wait is bounded by the steps at stake"
    assert cluster.cause("SalvageStarted") == "trainer_exited"
    assert cluster.decides() == []
    cluster.acknowledges()
    assert len(cluster.owes()) == 1, "the manifest"
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointCommitted", *RESTARTED]
    assert restored(cluster) == 2
    failed = cluster.last("GenerationFailed")
    assert isinstance(failed, GenerationFailed)
    assert failed.reason == event.reason


def test_nothing_is_stopped_while_it_is_waited_for() -> None:
    cluster = in_flight("w1", "w2")
    stages(cluster)
    cluster.exits(1, -9)
    cluster.decides()
    for worker in ("w1", "w2"):
        assert not any(isinstance(command, StopTrainers) for command in cluster.commands(worker))


def test_what_is_not_stored_in_time_is_given_up() -> None:
    cluster = in_flight("w1")
    stages(cluster)
    cluster.exits(1, -9)
    cluster.decides()
    cluster.acknowledges(0)
    cluster.passes(salvage(cluster).wait_s - 0.1)
    assert cluster.decides() == []
    cluster.passes(0.2)
    assert cluster.decides() == GIVEN_UP
    aborted = cluster.last("CheckpointAborted")
    assert isinstance(aborted, CheckpointAborted)
    assert "had staged was not stored within" in aborted.reason
    assert restored(cluster) == 1


def waited_for(*, left_mib: float) -> tuple[Cluster, float]:
    """A generation that died with one upload still under way; and the bound of the wait."""
    cluster = in_flight("w1", step_s=2.0)
    stages(cluster)
    cluster.acknowledges(0)
    cluster.exits(0, -9)
    cluster.says(1, upload=uploaded(100.0 - left_mib))
    assert cluster.decides() == ["SalvageStarted"]
    return cluster, salvage(cluster).wait_s


def uploaded(done_mib: float) -> Transfer:
    return Transfer(bytes_done=int(done_mib * MIB), bytes_total=100 * MIB)


@pytest.mark.parametrize(
    ("sent", "given_up"),
    [(0.0, True), (20.0, True), (30.0, True), (34.0, False), (90.0, False), (100.0, False), (-5.0, True)],
    ids=[
        "nothing",
        "a fifth",
        "too little at twice the pace",
        "enough at twice the pace",
        "most",
        "all",
        "it began anew",
    ],
)
def test_half_way_a_wait_ends_that_cannot_be_in_time_as_its_upload_shows(sent: float, given_up: bool) -> None:
    """At half of the bound, twice the pace brings twice of what has come: a third is the least."""
    cluster, bound_s = waited_for(left_mib=90.0)
    cluster.passes(bound_s * 0.49)
    cluster.says(1, upload=uploaded(10.0 + 0.9 * sent * 0.49 / 0.5))
    assert cluster.decides() == [], "it was judged too early"
    cluster.passes(bound_s * 0.01)
    cluster.says(1, upload=uploaded(10.0 + 0.9 * sent))
    assert cluster.decides() == (GIVEN_UP if given_up else [])
    if given_up:
        aborted = cluster.last("CheckpointAborted")
        assert isinstance(aborted, CheckpointAborted)
        assert f"cannot be stored within {bound_s:.1f} s: rank 1 has" in aborted.reason
        assert "MiB to go, and sent" in aborted.reason
    else:
        cluster.acknowledges()
        cluster.manifest_written()
        assert cluster.decides() == ["CheckpointCommitted", *RESTARTED]


def test_an_upload_that_shows_nothing_is_waited_for_to_the_end() -> None:
    cluster, bound_s = waited_for(left_mib=90.0)
    cluster.says(1, upload=None)
    cluster.passes(bound_s * 0.9)
    cluster.reports("w1")
    assert cluster.decides() == []


def test_another_leader_looks_anew_before_it_judges() -> None:
    cluster, bound_s = waited_for(left_mib=90.0)
    cluster.passes(bound_s * 0.45)
    successor = cluster.fails_over()
    successor.reconnect()
    assert successor.decides() == []
    successor.passes(bound_s * 0.45)
    successor.reports("w1")
    assert successor.decides() == [], "it judged by what it had not seen"


def test_why_nothing_is_waited_for_is_in_the_log() -> None:
    quick = in_flight("w1", step_s=0.0001)
    stages(quick)
    quick.exits(1, -9)
    quick.decides()
    missing = in_flight("w1")
    missing.shard(0, ShardPhase.STAGED)
    missing.exits(1, -9)
    missing.decides()
    first, second = quick.last("CheckpointAborted"), missing.last("CheckpointAborted")
    assert isinstance(first, CheckpointAborted) and isinstance(second, CheckpointAborted)
    assert "steps take" in first.reason and first.reason.endswith("again: no wait is worth it")
    assert second.reason == "generation 1 failed, and rank 1 on w1 had not staged it"


def test_a_rank_that_had_not_staged_leaves_nothing_to_wait_for() -> None:
    cluster = in_flight("w1")
    cluster.shard(0, ShardPhase.STAGED)
    cluster.shard(1, ShardPhase.REQUESTED)
    cluster.exits(1, -9)
    assert cluster.decides() == GIVEN_UP


def test_steps_that_are_done_again_at_once_are_not_worth_a_wait() -> None:
    cluster = in_flight("w1", step_s=0.0001)
    stages(cluster)
    cluster.exits(1, -9)
    assert cluster.decides() == GIVEN_UP


def test_a_manifest_alone_is_always_worth_a_moment() -> None:
    cluster = in_flight("w1", step_s=0.0001)
    cluster.acknowledges()
    cluster.exits(1, -9)
    assert cluster.decides() == ["SalvageStarted"]
    assert salvage(cluster).wait_s == MANIFEST_WAIT_S
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointCommitted", *RESTARTED]


def test_no_gain_is_worth_a_wait_without_end() -> None:
    cluster = in_flight("w1", step_s=1000.0)
    stages(cluster)
    cluster.exits(1, -9)
    cluster.decides()
    assert salvage(cluster).wait_s == WAIT_MAX_S


def test_a_shard_that_fails_ends_the_wait() -> None:
    cluster = in_flight("w1")
    stages(cluster)
    cluster.exits(1, -9)
    cluster.decides()
    cluster.shard(1, ShardPhase.FAILED, reason="disk full")
    assert cluster.decides() == GIVEN_UP


def test_a_lost_worker_whose_shards_were_stored_does_not_spoil_the_others() -> None:
    cluster = in_flight("w1", "w2")
    stages(cluster)
    cluster.acknowledges(2, 3)
    cluster.loses("w2")
    cluster.joins("w3")
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides() == ["SalvageStarted"]
    cluster.acknowledges(0, 1)
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointCommitted", *RESTARTED]
    assert restored(cluster) == 2


def test_bytes_that_only_a_lost_worker_had_are_lost() -> None:
    cluster = in_flight("w1", "w2")
    stages(cluster)
    cluster.loses("w2")
    cluster.joins("w3")
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides() == GIVEN_UP


def test_a_worker_that_dies_while_it_is_waited_for_ends_the_wait() -> None:
    cluster = in_flight("w1", "w2")
    stages(cluster)
    cluster.exits(0, -9)
    assert cluster.decides() == ["SalvageStarted"]
    cluster.loses("w2")
    assert cluster.decides() == [], "an agent that restarts goes on with its uploads"
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides()[:2] == ["CheckpointAborted", "GenerationFailed"]


def test_a_worker_that_is_shut_down_uploads_nothing_more() -> None:
    cluster = in_flight("w1", "w2")
    stages(cluster)
    cluster.nodes["w2"].leaving = True
    cluster.exits(3, -15)
    assert cluster.decides()[:2] == ["CheckpointAborted", "GenerationFailed"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_the_facts_may_come_in_any_order(order: tuple[int, ...]) -> None:
    """Stored shards, the death of a rank, and the lost connections of its peers."""
    cluster = in_flight("w1", "w2")
    stages(cluster)
    facts: list[Callable[[], None]] = [
        lambda: cluster.acknowledges(0, 1),
        lambda: cluster.acknowledges(2, 3),
        lambda: cluster.exits(0, -9, at_s=50.0),
        lambda: cluster.exits(2, 1, error=LOST, at_s=50.1),
    ]
    decided = []
    for index in order:
        facts[index]()
        decided += cluster.decides()
    cluster.manifest_written()
    decided += cluster.decides()
    assert decided == ["SalvageStarted", "CheckpointCommitted", *RESTARTED]
    failed = cluster.last("GenerationFailed")
    assert isinstance(failed, GenerationFailed)
    assert failed.reason == "rank 0 on w1 was ended by signal 9"
    assert [victim.rank for victim in failed.victims] == [2]
    assert restored(cluster) == 2


@pytest.mark.parametrize("first", ["w1", "w2"])
def test_another_leader_goes_on_waiting_and_commits(first: str) -> None:
    cluster = in_flight("w1", "w2")
    stages(cluster)
    cluster.exits(0, -9)
    cluster.decides()
    successor = cluster.fails_over()
    successor.markers_are_read()
    assert successor.decides() == []
    for worker in sorted(("w1", "w2"), key=lambda name: name != first):
        successor.registers(worker)
        successor.connects(worker)
        assert successor.decides() == [], "it was given up although a worker had not spoken yet"
    successor.acknowledges()
    successor.manifest_written()
    assert successor.decides() == ["CheckpointCommitted", *RESTARTED]


def test_another_leader_gives_up_at_the_same_time() -> None:
    cluster = in_flight("w1")
    stages(cluster)
    cluster.exits(0, -9)
    cluster.decides()
    cluster.passes(salvage(cluster).wait_s)
    successor = cluster.fails_over()
    successor.reconnect()
    assert successor.decides() == GIVEN_UP


def test_a_clock_far_behind_does_not_keep_the_job_waiting() -> None:
    cluster = in_flight("w1")
    stages(cluster)
    cluster.exits(0, -9)
    cluster.decides()
    cluster.now_s -= CLOCKS_DIFFER_S + 1
    assert cluster.decides() == GIVEN_UP


def test_a_new_leader_that_finds_a_dead_rank_hears_all_workers_before_it_gives_anything_up() -> None:
    cluster = in_flight("w1", "w2")
    stages(cluster)
    cluster.exits(0, -9)
    successor = cluster.fails_over()
    successor.markers_are_read()
    successor.registers("w1")
    successor.connects("w1")
    assert successor.decides() == []
    successor.registers("w2")
    successor.connects("w2")
    assert successor.decides() == ["SalvageStarted"]


def test_a_worker_that_keeps_its_lease_and_never_speaks_to_the_new_leader_is_not_waited_for_without_end() -> None:
    cluster = in_flight("w1", "w2")
    stages(cluster)
    cluster.exits(0, -9)
    successor = cluster.fails_over()
    successor.markers_are_read()
    for worker in ("w1", "w2"):
        successor.registers(worker)
    successor.connects("w1")
    successor.passes(MUTE_AFTER_S - 1)
    assert successor.decides() == []
    successor.passes(1)
    assert successor.decides()[:2] == ["CheckpointAborted", "GenerationFailed"]
    aborted = successor.last("CheckpointAborted")
    assert isinstance(aborted, CheckpointAborted) and "w2 has not said what it has" in aborted.reason


def test_a_cancelled_job_waits_for_nothing() -> None:
    cluster = in_flight("w1")
    stages(cluster)
    cluster.exits(0, -9)
    cluster.decides()
    cluster.cancels()
    assert cluster.decides() == ["CheckpointAborted"]
