"""Behind its last step a rank waits until its state was asked for; but not for what can never be asked."""

import pytest

from dtrain.common.errors import UserError
from dtrain.common.names import Step
from dtrain.coordinator.core.checkpoints import untracked
from dtrain.coordinator.core.facts import ShardPhase
from dtrain.coordinator.core.first_causes import FIRST_CAUSE_WAIT_S
from dtrain.coordinator.core.observed import MUTE_AFTER_S
from dtrain.coordinator.core.states import JobPhase
from tests.coordinator.support.clusters import HEARTBEAT_S, Cluster, spec

BOTH = spec(nnodes_min=2, nnodes_max=2, every_steps=100)


def running() -> Cluster:
    """Ranks 0 and 1 on w1, 2 and 3 on w2, all behind step 50."""
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(BOTH, step=50)
    return cluster


def holds(cluster: Cluster, rank: int, step: int) -> None:
    cluster.says(rank, phase="holding", completed_step=Step(step), until_step=Step(step))


def is_asked(cluster: Cluster, *ranks: int) -> None:
    """They stage what is asked for, and go on to whatever is behind their steps."""
    for rank in ranks:
        cluster.says(rank, phase="finished")
        cluster.shard(rank, ShardPhase.STAGED)


def ends_well(cluster: Cluster, *ranks: int) -> None:
    for rank in ranks:
        cluster.exits(rank, 0)


@pytest.mark.parametrize("how", ["ended", "finished", "left", "went further", "goes on"])
def test_a_rank_that_holds_its_last_state_in_vain_is_asked_for_it_and_goes_on(how: str) -> None:
    """No checkpoint can ever be of its step and of all ranks; nobody else would ask, and it would hold for hours."""
    cluster = running()
    for rank in (2, 3):
        match how:
            case "ended":
                cluster.exits(rank, 0)
            case "finished" | "left":
                cluster.says(rank, phase=how)
            case "goes on":
                cluster.says(rank, phase="training", completed_step=Step(60), until_step=Step(90))
            case _:
                cluster.says(rank, phase="training", completed_step=Step(70), until_step=Step(90))
    if how == "ended":
        assert cluster.decides() == ["MembersFinished"]
    for rank in (0, 1):
        holds(cluster, rank, 60)
    assert cluster.decides() == ["CheckpointStarted"]
    assert cluster.inflight().step == 60
    assert "/checkpoint-1/" in "".join(command.id for command in cluster.commands("w1"))
    for rank in (0, 1):
        assert cluster.decides() == [], "the other still holds"
        cluster.says(rank, phase="training")
        cluster.shard(rank, ShardPhase.STAGED)
    match how:
        case "went further" | "goes on":
            cluster.shard(2, ShardPhase.MISSED)
            cluster.shard(3, ShardPhase.MISSED)
    assert cluster.decides()[0] == "CheckpointAborted"
    ends_well(cluster, 0, 1)
    cluster.decides()
    if how in ("went further", "goes on"):
        for rank in (2, 3):
            cluster.says(rank, phase="holding", completed_step=Step(90))
        assert cluster.decides() == ["CheckpointStarted"], "and so for the others"
        for rank in (2, 3):
            cluster.shard(rank, ShardPhase.STAGED)
        ends_well(cluster, 2, 3)
        assert cluster.decides() == ["CheckpointAborted", "JobSucceeded"]
    else:
        if how != "ended":
            ends_well(cluster, 2, 3)
        cluster.decides()
        assert cluster.job().phase is JobPhase.SUCCEEDED


def test_all_that_hold_are_asked_wherever_each_ended_its_steps_though_none_has_ended() -> None:
    """Behind the loop they meet in a barrier, which no rank passes before the last has come to it."""
    cluster = running()
    for rank, until in ((0, 60), (1, 61), (2, 62), (3, 62)):
        cluster.says(rank, until_step=Step(until))
    holds(cluster, 0, 60)
    holds(cluster, 1, 61)
    assert cluster.decides() == ["CheckpointStarted"]
    assert cluster.inflight().step == 60
    is_asked(cluster, 0)
    cluster.shard(1, ShardPhase.MISSED)
    assert cluster.decides() == ["CheckpointAborted", "CheckpointStarted"]
    assert cluster.inflight().step == 61
    is_asked(cluster, 1)
    for rank in (2, 3):
        cluster.shard(rank, ShardPhase.STAGED)
        holds(cluster, rank, 62)
    assert cluster.decides() == ["CheckpointAborted", "CheckpointStarted"]
    assert cluster.inflight().step == 62
    is_asked(cluster, 2, 3)
    assert cluster.decides() == ["CheckpointAborted"]
    ends_well(cluster, 0, 1, 2, 3)
    assert cluster.decides() == ["JobSucceeded"]


def test_one_that_holds_an_earlier_step_later_on_is_asked_too() -> None:
    cluster = running()
    cluster.says(3, phase="finished", until_step=Step(100))
    cluster.says(0, until_step=Step(60))
    for rank in (1, 2):
        holds(cluster, rank, 90)
    assert cluster.decides() == ["CheckpointStarted"]
    assert cluster.inflight().step == 90
    is_asked(cluster, 1, 2)
    holds(cluster, 0, 60)
    assert cluster.decides() == ["CheckpointAborted", "CheckpointStarted"]
    assert cluster.inflight().step == 60
    is_asked(cluster, 0)
    assert cluster.decides() == ["CheckpointAborted"]


def test_a_failed_peer_is_no_reason_to_ask_for_what_the_generation_takes_along() -> None:
    cluster = running()
    holds(cluster, 0, 60)
    cluster.exits(2, 1, error="Connection closed by peer")
    assert cluster.decides() == [], "its cause may follow"
    cluster.passes(FIRST_CAUSE_WAIT_S)
    assert cluster.decides()[0] == "GenerationFailed"


def test_a_person_is_not_answered_with_an_attempt_that_can_never_be_committed() -> None:
    cluster = running()
    cluster.says(2, phase="finished")
    holds(cluster, 0, 60)
    assert cluster.decides() == ["CheckpointStarted"]
    with pytest.raises(UserError, match="cannot be checkpointed right now"):
        cluster.asks_for_checkpoint()


def test_no_step_is_chosen_by_what_a_worker_said_long_ago() -> None:
    """It would be as far ahead as the worker was silent, and no other attempt could be started before it."""
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(spec(nnodes_min=2, nnodes_max=2, every_seconds=3600.0), step=50)
    for _ in range(int(MUTE_AFTER_S / HEARTBEAT_S)):
        cluster.passes(HEARTBEAT_S)
        cluster.reports("w1")
        assert cluster.decides() == []
    with pytest.raises(UserError, match="cannot be checkpointed right now"):
        cluster.asks_for_checkpoint()
    cluster.reports("w2")
    cluster.asks_for_checkpoint()
    assert cluster.inflight().step < 60


def test_it_is_said_which_rank_tracks_nothing_so_that_no_checkpoint_can_be_taken() -> None:
    cluster = running()
    assert untracked(cluster.job(), cluster.generation(), cluster.observed) == ""
    cluster.says(3, tracking=False)
    assert cluster.decides() == []
    assert "rank 3 tracks nothing" in untracked(cluster.job(), cluster.generation(), cluster.observed)
    for rank in range(3):
        cluster.says(rank, tracking=False)
    assert untracked(cluster.job(), cluster.generation(), cluster.observed) == "", "the script wants none"
