"""What a loss or a refusal costs, and what it does not: small rules that each saved somebody's run."""

import pytest

from dtrain.coordinator.core.commands import StageCheckpoint
from dtrain.coordinator.core.events import CheckpointAborted, GenerationFailed, GenerationStarted
from dtrain.coordinator.core.facts import Registration, ShardPhase, WorkerRegistered, WorkerUnregistered
from dtrain.coordinator.core.observed import LOST_AFTER_S, MUTE_AFTER_S, STREAM_SILENT_S
from dtrain.coordinator.core.placement import GATHER_S
from tests.coordinator.support.clusters import HEARTBEAT_S, Cluster, spec

RESTARTED = ["GenerationFailed", "GenerationStarted"]
ELASTIC = spec(nnodes_min=1, nnodes_max=3)


def running(*workers: str, step: int = 10) -> Cluster:
    """A job of two ranks on each of these workers."""
    cluster = Cluster()
    cluster.joins(*workers)
    cluster.runs(spec(nnodes_min=len(workers), nnodes_max=len(workers)), step=step)
    return cluster


def elastic(*workers: str) -> Cluster:
    """A job that would take three workers and started with these after it had waited for more."""
    cluster = Cluster()
    cluster.joins(*workers)
    cluster.submits(ELASTIC)
    assert cluster.decides() == []
    cluster.passes(GATHER_S)
    assert cluster.decides() == ["GenerationStarted"]
    cluster.starts()
    cluster.trains(step=10)
    return cluster


def members(cluster: Cluster) -> list[str]:
    event = cluster.last("GenerationStarted")
    assert isinstance(event, GenerationStarted)
    return [member.worker for member in event.members]


def failure(cluster: Cluster) -> GenerationFailed:
    event = cluster.last("GenerationFailed")
    assert isinstance(event, GenerationFailed)
    return event


# -- elastic jobs -------------------------------------------------------------------------------------


def test_an_elastic_job_that_lost_a_rank_and_no_worker_starts_again_at_once() -> None:
    cluster = elastic("w1", "w2")
    cluster.exits(0, -9)
    assert cluster.decides() == RESTARTED, "there is nobody to wait for"
    assert members(cluster) == ["w1", "w2"]


def test_an_elastic_job_that_lost_a_worker_gathers_before_it_goes_on_with_fewer() -> None:
    cluster = elastic("w1", "w2")
    cluster.loses("w2")
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides() == ["GenerationFailed"]
    cluster.passes(GATHER_S)
    assert cluster.decides() == ["GenerationStarted"]
    assert members(cluster) == ["w1"]


def test_an_elastic_job_whose_lost_worker_was_replaced_starts_again_at_once() -> None:
    cluster = elastic("w1", "w2")
    cluster.loses("w2")
    cluster.joins("w3")
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides() == RESTARTED
    assert members(cluster) == ["w1", "w3"]


def test_the_next_run_of_an_elastic_job_gathers_again() -> None:
    cluster = elastic("w1")
    cluster.finish()
    assert cluster.decides() == ["JobSucceeded"]
    cluster.submits(ELASTIC, request="r2")
    assert cluster.decides() == []
    cluster.passes(GATHER_S)
    assert cluster.decides() == ["GenerationStarted"]


# -- workers that are done ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [None, 1])
def test_a_worker_with_a_rank_that_has_not_finished_well_may_not(code: int | None) -> None:
    cluster = running("w1", "w2")
    cluster.exits(2, 0)
    if code is not None:
        cluster.exits(3, code)
    cluster.loses("w2")
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides()[0] == "GenerationFailed"


# -- signs of life ------------------------------------------------------------------------------------


def test_a_stream_that_stays_open_and_says_nothing_is_no_sign_of_life() -> None:
    cluster = running("w1", "w2")
    cluster.passes(STREAM_SILENT_S * 10)
    assert cluster.decides() == [], "its lease is alive"
    cluster.reports("w1")
    cluster.tells(WorkerUnregistered(worker=cluster.nodes["w1"].name))
    cluster.passes(STREAM_SILENT_S - 0.1)
    assert cluster.decides() == []
    cluster.passes(0.1)
    assert cluster.decides() == ["GenerationFailed"]


def test_a_key_that_comes_back_at_once_was_not_lost_even_where_nothing_is_heard_of_its_worker() -> None:
    """A late put of an earlier life binds the key to a lease that ends just then; its owner puts it anew."""
    cluster = running("w1", "w2")
    cluster.passes(STREAM_SILENT_S * 10)
    cluster.reports("w2")
    cluster.tells(WorkerUnregistered(worker=cluster.nodes["w1"].name))
    assert cluster.decides() == []
    cluster.passes(LOST_AFTER_S - 0.1)
    cluster.registers("w1")
    cluster.passes(STREAM_SILENT_S * 10)
    assert cluster.decides() == []


def test_a_worker_without_a_lease_that_goes_on_reporting_is_not_lost() -> None:
    cluster = running("w1", "w2")
    cluster.tells(WorkerUnregistered(worker=cluster.nodes["w1"].name))
    cluster.stands_still(STREAM_SILENT_S * 5)
    assert cluster.decides() == []


# -- the first failure --------------------------------------------------------------------------------


def test_a_failure_whose_time_nobody_saw_is_not_taken_for_the_first() -> None:
    cluster = running("w1", "w2")
    cluster.exits(0, -9, at_s=0.0)
    cluster.exits(3, 7, error="the reason", at_s=1000.0)
    assert cluster.decides()[0] == "GenerationFailed"
    assert "rank 3" in failure(cluster).reason and failure(cluster).error == "the reason"


def test_among_failures_whose_times_nobody_saw_the_lowest_rank_is_named() -> None:
    cluster = running("w1", "w2")
    for rank in (3, 1):
        cluster.exits(rank, 7, at_s=0.0)
    cluster.decides()
    assert "rank 1" in failure(cluster).reason


# -- refused checkpoints ------------------------------------------------------------------------------


def refused(cluster: Cluster, *, term: int | None = None) -> None:
    cluster.asks_for_checkpoint()
    [command] = cluster.commands("w1")
    assert isinstance(command, StageCheckpoint)
    cluster.answers("w1", command.id, "refused", term=term, reason="its ranks have ended")


def test_a_checkpoint_that_a_worker_refuses_is_aborted_with_its_words_and_training_goes_on() -> None:
    cluster = running("w1")
    refused(cluster)
    assert cluster.decides() == ["CheckpointAborted"]
    event = cluster.last("CheckpointAborted")
    assert isinstance(event, CheckpointAborted)
    assert event.reason == "worker w1 refused it: its ranks have ended" and not event.missed
    assert cluster.cause("CheckpointAborted") == "command_refused"
    assert cluster.generation().number == 1
    cluster.asks_for_checkpoint()
    assert cluster.inflight().attempt == 2


def test_a_refusal_to_a_leader_of_an_older_term_says_nothing_and_the_worker_is_asked_again() -> None:
    cluster = running("w1")
    refused(cluster, term=cluster.term - 1)
    assert cluster.decides() == []
    assert [type(command) for command in cluster.commands("w1")] == [StageCheckpoint]


def test_a_refusal_of_an_older_attempt_does_not_abort_the_next() -> None:
    cluster = running("w1")
    refused(cluster)
    cluster.decides()
    cluster.asks_for_checkpoint()
    cluster.shard(0, ShardPhase.REQUESTED)
    assert cluster.decides() == []


FENCE_S = 1800.0


def mute_beyond_its_fence(*workers: str) -> Cluster:
    """Worker w1 keeps its lease and its stream, and tells nothing for as long as it would go on without a word."""
    cluster = Cluster()
    cluster.joins(*workers)
    cluster.runs(spec(), step=10)
    node = cluster.nodes["w1"]
    told = Registration(worker=node.name, journal=node.journal, address="", slots=2, fence_after_s=FENCE_S)
    cluster.tells(WorkerRegistered(registration=told))
    for _ in range(int((FENCE_S + MUTE_AFTER_S - 1.0) / HEARTBEAT_S)):
        cluster.passes(HEARTBEAT_S)
        for other in workers[1:]:
            cluster.reports(other)
    assert cluster.decides() == [], "it may train as well as ever"
    cluster.passes(1.0)
    return cluster


def test_a_worker_that_was_mute_for_longer_than_it_goes_on_without_a_coordinator_has_ended_its_ranks() -> None:
    cluster = mute_beyond_its_fence("w1", "w2")
    assert cluster.decides() == RESTARTED
    assert members(cluster) == ["w2"]
    assert not failure(cluster).counted
    assert "keeps its lease" in failure(cluster).reason


def test_it_is_not_chosen_again_before_it_speaks() -> None:
    cluster = mute_beyond_its_fence("w1")
    assert cluster.decides() == ["GenerationFailed"]
    cluster.reports("w1")
    assert cluster.decides() == ["GenerationStarted"]
