"""Ranks end one after the other: nodes whose ranks have all ended well may go, whoever leads by then."""

import pytest

from dtrain.common.names import Step
from dtrain.coordinator.core.events import CheckpointAborted, FailureKind, GenerationFailed, HangFound, MembersFinished
from dtrain.coordinator.core.facts import ShardPhase
from dtrain.coordinator.core.hangs import AUTO_FLOOR_S
from dtrain.coordinator.core.observed import LOST_AFTER_S, MUTE_AFTER_S
from tests.coordinator.support.clusters import HEARTBEAT_S, Cluster, spec

BOTH = spec(nnodes_min=2, nnodes_max=2, every_steps=100)


def half_done() -> Cluster:
    """Ranks 0 and 1 train on w1; ranks 2 and 3, on w2, have ended well."""
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(BOTH, step=50)
    ends_well(cluster, 2, 3)
    assert cluster.decides() == ["MembersFinished"]
    return cluster


def ends_well(cluster: Cluster, *ranks: int) -> None:
    for rank in ranks:
        cluster.exits(rank, 0)


def leaves_for_good(cluster: Cluster, worker: str) -> None:
    cluster.loses(worker)
    del cluster.nodes[worker]
    cluster.passes(LOST_AFTER_S * 2)


def under_its_successor(cluster: Cluster) -> Cluster:
    """Another leads, and hears of those that are there."""
    successor = cluster.fails_over()
    successor.reconnect()
    return successor


def test_it_is_noted_once_who_has_finished_while_others_go_on() -> None:
    cluster = half_done()
    event = cluster.last("MembersFinished")
    assert isinstance(event, MembersFinished)
    assert event.workers == ("w2",)
    assert cluster.decides() == []
    assert under_its_successor(cluster).decides() == []


def test_nobody_is_noted_whose_ranks_were_told_to_end_or_have_not_all_ended() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(BOTH, step=50)
    cluster.exits(2, 0)
    assert cluster.decides() == []
    cluster.exits(3, 0, ended_for="its worker was asked to end")
    assert cluster.decides()[0] == "GenerationFailed"
    assert not [event for event, _ in cluster.log if event.type == "MembersFinished"]


@pytest.mark.parametrize("leader_dies", [False, True])
def test_a_worker_whose_ranks_have_finished_may_go_away(leader_dies: bool) -> None:
    cluster = half_done()
    leaves_for_good(cluster, "w2")
    assert cluster.decides() == []
    if leader_dies:
        cluster = under_its_successor(cluster)
        cluster.passes(MUTE_AFTER_S * 2)
    assert cluster.decides() == []
    ends_well(cluster, 0, 1)
    assert cluster.decides() == ["JobSucceeded"]


def test_it_may_come_back_without_its_memory_and_is_told_nothing() -> None:
    cluster = half_done()
    node = cluster.nodes["w2"]
    node.journal, node.incarnation, node.number, node.held, node.commands = "another", "second", 0, {}, []
    cluster.registers("w2")
    cluster.connects("w2")
    assert cluster.decides() == []
    assert cluster.commands("w2") == []
    ends_well(cluster, 0, 1)
    assert cluster.decides() == ["JobSucceeded"]


def test_what_the_others_lose_by_its_going_is_a_failure_of_theirs() -> None:
    """They still wanted something of it: no node is to blame, so it must not be tried again without an end."""
    cluster = half_done()
    leaves_for_good(cluster, "w2")
    successor = under_its_successor(cluster)
    successor.exits(0, 1, error="Connection closed by peer")
    successor.exits(1, 1, error="Connection closed by peer")
    assert successor.decides()[0] == "GenerationFailed"
    event = successor.last("GenerationFailed")
    assert isinstance(event, GenerationFailed)
    assert (event.kind, event.counted) == (FailureKind.CONNECTION, True)


def test_an_attempt_is_kept_until_those_that_still_hold_their_last_state_were_asked() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(BOTH, step=50)
    cluster.asks_for_checkpoint()
    cluster.commits()
    cluster.trains(step=101, until=101, phase="holding")
    assert cluster.decides() == ["CheckpointStarted"]
    for rank in (2, 3):
        cluster.shard(rank, ShardPhase.DURABLE)
    ends_well(cluster, 2, 3)
    assert cluster.decides() == ["MembersFinished"]
    leaves_for_good(cluster, "w2")
    successor = under_its_successor(cluster)
    successor.passes(MUTE_AFTER_S)
    successor.reports("w1")
    assert successor.decides() == []
    assert "/checkpoint-2/" in "".join(command.id for command in successor.commands("w1"))
    for rank in (0, 1):
        successor.says(rank, phase="training")
        successor.shard(rank, ShardPhase.STAGED)
    assert successor.decides() == ["CheckpointAborted"]
    ends_well(successor, 0, 1)
    assert successor.decides() == ["JobSucceeded"]


@pytest.mark.parametrize("leader_dies", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_what_it_takes_along_of_the_last_checkpoint_is_not_waited_for_without_end(
    leader_dies: bool, stored: bool
) -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(BOTH, step=50)
    cluster.trains(step=101, until=101, phase="holding")
    assert cluster.decides() == ["CheckpointStarted"]
    for rank in (0, 1):
        cluster.shard(rank, ShardPhase.DURABLE)
    for rank in (2, 3):
        cluster.shard(rank, ShardPhase.DURABLE if stored else ShardPhase.STAGED)
    ends_well(cluster, 0, 1, 2, 3)
    assert cluster.decides() == ["MembersFinished"]
    leaves_for_good(cluster, "w2")
    if leader_dies:
        cluster = under_its_successor(cluster)
        cluster.passes(MUTE_AFTER_S)
        cluster.reports("w1")
    elif stored:
        assert cluster.decides() == []
        cluster.manifest_written()
        assert cluster.decides() == ["CheckpointCommitted", "JobSucceeded"]
        return
    else:
        assert cluster.decides() == [], "it may come back, and store what it has"
        cluster.passes(MUTE_AFTER_S)
    assert cluster.decides() == ["CheckpointAborted", "JobSucceeded"]
    event = cluster.last("CheckpointAborted")
    assert isinstance(event, CheckpointAborted)
    assert event.reason == "rank 2 finished, and w2 is gone, or silent, with what it had not stored"


@pytest.mark.parametrize("lease_ends", [False, True])
def test_a_worker_that_was_silent_for_a_while_still_stores_the_last_checkpoint(lease_ends: bool) -> None:
    """Nothing runs any more that could make it again."""
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(BOTH, step=50)
    cluster.trains(step=101, until=101, phase="holding")
    cluster.decides()
    for rank in range(4):
        cluster.shard(rank, ShardPhase.STAGED)
    ends_well(cluster, 0, 1, 2, 3)
    assert cluster.decides() == ["MembersFinished"]
    if lease_ends:
        cluster.loses("w2")
    for _ in range(int(MUTE_AFTER_S * (1 if lease_ends else 3) / HEARTBEAT_S) - 1):
        cluster.passes(HEARTBEAT_S)
        cluster.reports("w1")
        assert cluster.decides() == []
    cluster.registers("w2")
    cluster.connects("w2")
    cluster.acknowledges()
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointCommitted", "JobSucceeded"]


def test_a_hang_of_the_others_is_found_and_nobody_is_blamed_where_it_is_not_known_how_far_one_had_come() -> None:
    cluster = half_done()
    leaves_for_good(cluster, "w2")
    successor = under_its_successor(cluster)
    for step in (51, 52):
        for rank in (0, 1):
            successor.says(rank, phase="training", completed_step=Step(step), step_s=0.1)
        successor.passes(0.1)
    successor.stands_still(AUTO_FLOOR_S + 1.0)
    assert successor.decides() == ["HangSuspected"]
    for rank, where in ((0, "torch/distributed/c10d.py"), (1, "train.py")):
        successor.says(rank, stack=f'File "/{where}", line 9 in wait', stack_number=1)
    assert successor.decides()[0] == "HangFound"
    event = successor.last("HangFound")
    assert isinstance(event, HangFound)
    assert event.culprit == -1
