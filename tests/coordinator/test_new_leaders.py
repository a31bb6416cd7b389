"""Whom a leader takes for lost that knows nobody yet, or may be the one that is cut off."""

import pytest

from dtrain.coordinator.core.facts import RegistrationsListed, StreamClosed, WorkerUnregistered
from dtrain.coordinator.core.hearing import GAP_S
from dtrain.coordinator.core.observed import LOST_AFTER_S, MUTE_AFTER_S, STREAM_SILENT_S, UNSEEN_LOST_AFTER_S, Observed
from tests.coordinator.support.clusters import HEARTBEAT_S, Cluster


def new_leader() -> Cluster:
    """A job runs on w1, of which the successor of its leader has heard nothing."""
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=5)
    return cluster.fails_over()


def hears_for(leader: Cluster, seconds: float) -> None:
    """Time passes in which another worker's heartbeats come, the last of them just now."""
    end_s = leader.now_s + seconds
    while leader.now_s < end_s:
        leader.passes(min(HEARTBEAT_S, end_s - leader.now_s))
        leader.reports("w9")


def test_a_new_leader_gives_every_worker_time_to_find_it_before_it_calls_one_lost() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=5)
    cluster.passes(1000)
    successor = cluster.fails_over()
    assert successor.decides() == []
    successor.joins("w9")
    hears_for(successor, UNSEEN_LOST_AFTER_S - 0.1)
    assert successor.decides() == []
    successor.passes(0.1)
    assert successor.decides()[0] == "GenerationFailed"


def test_a_new_leader_that_workers_reach_no_more_may_be_the_one_that_is_cut_off_or_asleep() -> None:
    successor = new_leader()
    successor.joins("w9")
    hears_for(successor, 0.5)
    successor.passes(UNSEEN_LOST_AFTER_S * 2)
    assert successor.decides() == [], "in a silence of all, that of one says nothing"
    successor.reports("w9")
    hears_for(successor, UNSEEN_LOST_AFTER_S - 0.5 - GAP_S - 0.1)
    assert successor.decides() == []
    successor.passes(0.1)
    assert successor.decides()[0] == "GenerationFailed", "what was heard before and behind the silence counts"


def test_what_a_leader_heard_before_a_worker_was_gone_is_nothing_against_it() -> None:
    successor = new_leader()
    successor.joins("w9")
    successor.connects("w1")  # it is not registered yet
    hears_for(successor, UNSEEN_LOST_AFTER_S * 2)
    successor.tells(StreamClosed(worker=successor.nodes["w1"].name, stream=successor.nodes["w1"].stream))
    hears_for(successor, UNSEEN_LOST_AFTER_S - 0.1)
    assert successor.decides() == []
    successor.passes(0.1)
    assert successor.decides()[0] == "GenerationFailed"


def test_a_new_leader_that_no_worker_reaches_may_be_the_one_that_is_cut_off() -> None:
    successor = new_leader()
    successor.passes(MUTE_AFTER_S - 1.0)
    assert successor.decides() == [], "whoever it does not hear of may train"
    successor.joins("w9")
    assert successor.decides() == [], "its way is open again: the others need a moment too"
    hears_for(successor, UNSEEN_LOST_AFTER_S)
    assert successor.decides()[0] == "GenerationFailed"


def test_a_new_leader_that_no_worker_ever_reaches_gives_up_those_that_it_never_saw() -> None:
    successor = new_leader()
    successor.passes(MUTE_AFTER_S - 0.1)
    assert successor.decides() == []
    successor.passes(0.1)
    assert successor.decides() == ["GenerationFailed"]


def test_a_leader_that_has_not_read_yet_who_is_registered_takes_nobody_for_lost() -> None:
    successor = new_leader()
    successor.joins("w9")
    successor.observed = Observed(term=successor.term, since_s=successor.now_s)  # etcd does not answer it
    successor.connects("w9")
    hears_for(successor, UNSEEN_LOST_AFTER_S * 10)
    assert successor.decides() == []
    successor.tells(RegistrationsListed())
    hears_for(successor, UNSEEN_LOST_AFTER_S - 0.1)
    assert successor.decides() == [], "a worker that etcd was away from could not find it either"
    successor.passes(0.1)
    assert successor.decides()[0] == "GenerationFailed"


@pytest.mark.parametrize("stream_closes", [False, True])
def test_a_leader_that_nobody_reaches_gives_up_nobody_whose_lease_has_ended(stream_closes: bool) -> None:
    """It is cut off from all, and a lease that was not renewed in time says little; it could start nothing anyway."""
    cluster = Cluster()
    cluster.joins("w1", "w9")
    cluster.runs(step=5)
    cluster.passes(STREAM_SILENT_S * 2)
    node = cluster.nodes["w1"]
    if stream_closes:
        cluster.tells(StreamClosed(worker=node.name, stream=node.stream))
    cluster.tells(WorkerUnregistered(worker=node.name))
    cluster.passes(MUTE_AFTER_S - STREAM_SILENT_S * 2 - 0.1)
    assert cluster.decides() == []
    cluster.reports("w9")
    cluster.passes(LOST_AFTER_S - 0.1)
    assert cluster.decides() == [], "its way is open again: the other needs a moment too"
    cluster.passes(0.1)
    assert cluster.decides()[0] == "GenerationFailed"


def test_where_nobody_else_is_registered_there_is_nobody_to_hear() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=5)
    cluster.passes(STREAM_SILENT_S * 2)
    cluster.loses("w1")
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides() == ["GenerationFailed"]


def test_a_worker_that_speaks_once_and_never_registers_is_given_up() -> None:
    successor = new_leader()
    successor.joins("w9")
    successor.connects("w1")
    hears_for(successor, MUTE_AFTER_S - 0.1)
    assert successor.decides() == []
    successor.passes(0.1)
    assert successor.decides()[0] == "GenerationFailed"
