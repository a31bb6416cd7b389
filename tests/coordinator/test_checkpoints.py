"""When a checkpoint starts, what settles it, and what is owed to storage."""

from typing import assert_never

import pytest

from dtrain.common.errors import UserError
from dtrain.common.names import JobName
from dtrain.coordinator.core.checkpoints import COMMAND_TRAVEL_S, HORIZON_S
from dtrain.coordinator.core.effects import DeleteAttempt, Effect, ReadMarkers, WriteManifest, WriteMarker
from dtrain.coordinator.core.events import CheckpointAborted
from dtrain.coordinator.core.facts import ShardPhase
from dtrain.coordinator.core.salvages import WAIT_MAX_S
from tests.coordinator.support.clusters import Cluster, spec


def training(*, step: int = 10, **policy: float) -> Cluster:
    """A job of two ranks on one worker, trained up to this step, 0.1 s a step."""
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(**policy), step=step)  # type: ignore[arg-type]
    return cluster


def aborted(cluster: Cluster) -> CheckpointAborted:
    event = cluster.last("CheckpointAborted")
    assert isinstance(event, CheckpointAborted)
    return event


def words(effects: list[Effect]) -> list[str]:
    said = []
    for effect in effects:
        match effect:
            case WriteManifest():
                said.append(f"manifest of attempt {effect.inflight.attempt}")
            case WriteMarker():
                said.append(f"marker of checkpoint {effect.checkpoint.number}")
            case ReadMarkers():
                said.append("markers to read")
            case DeleteAttempt():
                said.append(f"deletion of attempt {effect.attempt}")
            case unreachable:
                assert_never(unreachable)
    return said


def lead(step_s: float = 0.1) -> int:
    return round(COMMAND_TRAVEL_S / step_s)


# -- starting -----------------------------------------------------------------------------------------


def test_no_policy_starts_no_checkpoint() -> None:
    assert training().decides() == []


def test_a_checkpoint_of_every_so_many_steps_is_started_shortly_before_its_step() -> None:
    cluster = training(step=10, every_steps=100)
    horizon_steps = round(HORIZON_S / 0.1)
    cluster.trains(step=100 - horizon_steps - 1)
    assert cluster.decides() == []
    cluster.trains(step=100 - horizon_steps)
    assert cluster.decides() == ["CheckpointStarted"]
    assert cluster.inflight().step == 100


def test_a_multiple_that_no_request_can_reach_in_time_is_passed_over() -> None:
    cluster = training(step=100 - lead() + 1, every_steps=100)
    assert cluster.decides() == []


def test_slow_steps_are_checkpointed_at_the_very_next_multiple() -> None:
    cluster = training(every_steps=1)
    cluster.trains(step=11, step_s=30.0)
    assert cluster.decides() == ["CheckpointStarted"]
    assert cluster.inflight().step == 12


def test_a_checkpoint_of_every_so_many_seconds_is_started_when_they_have_passed() -> None:
    cluster = training(every_seconds=60.0)
    cluster.passes(59.0)
    cluster.trains(step=600)
    assert cluster.decides() == []
    cluster.passes(1.0)
    cluster.trains(step=610)
    assert cluster.decides() == ["CheckpointStarted"]
    assert cluster.inflight().step == 610 + lead()


def test_the_interval_of_seconds_goes_on_over_a_change_of_leader() -> None:
    cluster = training(every_seconds=60.0)
    cluster.passes(59.0)
    successor = cluster.fails_over()
    successor.reconnect()
    assert successor.decides() == []
    successor.passes(1.0)
    successor.trains(step=600)
    assert successor.decides() == ["CheckpointStarted"]


def test_a_clock_that_went_back_brings_a_checkpoint_rather_than_none_for_ever() -> None:
    cluster = training(every_seconds=60.0)
    cluster.passes(-5000.0)
    cluster.trains(step=20)
    assert cluster.decides() == ["CheckpointStarted"]


@pytest.mark.parametrize("policy", [{"every_steps": 1000}, {"every_seconds": 3600.0}])
def test_the_last_step_is_saved_as_well(policy: dict[str, float]) -> None:
    cluster = training(step=10, **policy)
    cluster.trains(step=20, until=77)
    if "every_steps" in policy:
        assert cluster.decides() == []
        cluster.trains(step=60, until=77)
        assert cluster.decides() == ["CheckpointStarted"]
        assert cluster.inflight().step == 77
    else:
        cluster.trains(step=60, until=77)
        assert cluster.decides() == ["CheckpointStarted"]
        assert cluster.inflight().step == 77


def test_ranks_that_hold_at_their_last_step_are_saved_there_once() -> None:
    cluster = training(step=100, every_steps=100)
    cluster.trains(step=101, until=101, phase="holding")
    assert cluster.decides() == ["CheckpointStarted"]
    assert cluster.job().inflight is not None and cluster.job().inflight.step == 101
    cluster.acknowledges()
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointCommitted"]
    assert "CheckpointStarted" not in cluster.decides()


def test_a_step_that_is_saved_already_is_not_saved_again() -> None:
    cluster = training(step=10, every_steps=1000)
    cluster.trains(step=60, until=77)
    cluster.decides()
    cluster.acknowledges()
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointCommitted"]
    cluster.trains(step=60, until=77)
    assert cluster.decides() == []


def test_a_checkpoint_is_never_asked_for_a_step_beyond_the_last() -> None:
    cluster = training(step=10)
    cluster.trains(step=99, until=100)
    with pytest.raises(UserError, match="about to finish"):
        cluster.asks_for_checkpoint()


@pytest.mark.parametrize("missing", ["a rank does not track", "a rank has done no step", "a rank is silent"])
def test_a_job_whose_ranks_are_not_all_training_is_not_checkpointed(missing: str) -> None:
    cluster = training(every_steps=1)
    cluster.trains(step=10, step_s=10)
    match missing:
        case "a rank does not track":
            cluster._rank("mnist", 1, tracking=False)
        case "a rank has done no step":
            cluster._rank("mnist", 1, completed_step=0)
        case _:
            cluster.nodes["w1"].held["mnist"].ranks.pop(1)
    cluster.reports("w1")
    assert cluster.decides() == []


def test_an_old_report_makes_the_lead_longer() -> None:
    cluster = training(step=10)
    cluster.passes(2.0)
    cluster.asks_for_checkpoint()
    assert cluster.inflight().step == 10 + round((2.0 + COMMAND_TRAVEL_S) / 0.1)


def test_a_request_starts_a_checkpoint_and_a_second_one_is_served_by_the_same() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    attempt = cluster.inflight().attempt
    cluster.asks_for_checkpoint()
    assert cluster.inflight().attempt == attempt
    assert [record.type for record, _ in cluster.log].count("CheckpointStarted") == 1


def test_a_job_without_a_store_is_not_checkpointed_on_request() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(store=""), step=10)
    with pytest.raises(UserError, match="--store"):
        cluster.asks_for_checkpoint()


# -- settling -----------------------------------------------------------------------------------------


def test_a_checkpoint_is_committed_only_when_every_rank_has_acknowledged_and_the_manifest_is_written() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.acknowledges(0)
    assert cluster.decides() == [] and words(cluster.owes()) == []
    cluster.acknowledges(1)
    assert cluster.decides() == []
    assert words(cluster.owes()) == ["manifest of attempt 1"]
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointCommitted"]
    assert words(cluster.owes()) == ["marker of checkpoint 1"]


def test_a_marker_is_owed_until_storage_confirms_it_over_failover_and_the_end_of_the_job() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.acknowledges()
    cluster.manifest_written()
    cluster.finish()
    assert cluster.decides() == ["CheckpointCommitted", "JobSucceeded"]
    assert words(cluster.owes()) == ["marker of checkpoint 1"]
    successor = cluster.fails_over()
    assert words(successor.owes()) == ["marker of checkpoint 1"]
    successor.marker_written(1)
    assert words(successor.owes()) == [], "it is owed no more even before the mark is in the log"
    assert successor.decides() == ["CheckpointMarked"]
    assert words(successor.fails_over().owes()) == []


def test_a_new_leader_takes_the_attempt_in_flight_over() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.acknowledges()
    cluster.manifest_written()
    successor = cluster.fails_over()
    assert successor.decides() == []
    successor.reconnect()
    assert words(successor.owes()) == ["manifest of attempt 1"], "it does not know that the manifest is written"
    successor.manifest_written()
    assert successor.decides() == ["CheckpointCommitted"]


def test_an_acknowledgement_of_another_attempt_or_step_changes_nothing() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.shard(0, ShardPhase.FAILED, reason="disk full")
    assert cluster.decides() == ["CheckpointAborted"]
    cluster.asks_for_checkpoint()
    for rank in (0, 1):
        cluster.shard(rank, ShardPhase.DURABLE, attempt=1)
    assert words(cluster.owes()) == []
    for rank in (0, 1):
        cluster.shard(rank, ShardPhase.DURABLE, step=1)
    assert words(cluster.owes()) == []
    assert cluster.decides() == []


def test_an_acknowledgement_of_an_older_generation_changes_nothing() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.acknowledges()
    cluster.exits(0, -9)
    assert cluster.decides() == ["SalvageStarted"]
    cluster.passes(WAIT_MAX_S)  # its manifest is never written
    assert cluster.decides() == ["CheckpointAborted", "GenerationFailed", "GenerationStarted"]
    old = cluster.nodes["w1"].held["mnist"].shards
    cluster.starts()
    cluster.trains(step=10)
    cluster.asks_for_checkpoint()
    cluster.nodes["w1"].held["mnist"].generation = 1
    cluster.nodes["w1"].held["mnist"].shards = {
        (2, rank): old[1, rank].__class__(
            checkpoint=cluster.inflight().number, attempt=cluster.inflight().attempt, rank=rank,
            phase=ShardPhase.DURABLE, step=cluster.inflight().step, size_bytes=1,
        )
        for rank in (0, 1)
    }  # fmt: skip
    cluster.reports("w1")
    assert words(cluster.owes()) == [] and cluster.decides() == []


def test_a_late_manifest_of_an_aborted_attempt_commits_nothing() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.acknowledges()
    first = cluster.inflight().attempt
    cluster.shard(0, ShardPhase.FAILED, reason="disk full")
    assert cluster.decides() == ["CheckpointAborted"]
    cluster.asks_for_checkpoint()
    from dtrain.coordinator.core.facts import ManifestWritten

    cluster.tells(ManifestWritten(job=JobName("mnist"), attempt=first, manifest_key="m", manifest_digest="d"))
    cluster.acknowledges()
    assert cluster.decides() == []
    assert words(cluster.owes()) == ["manifest of attempt 2"]


def test_each_miss_doubles_the_lead_and_a_commit_resets_it() -> None:
    cluster = training()
    for misses in range(3):
        cluster.asks_for_checkpoint()
        assert cluster.inflight().step == 10 + lead() * 2**misses
        assert cluster.inflight().number == 1, "an aborted attempt leaves its checkpoint's number to the next"
        cluster.shard(1, ShardPhase.MISSED)
        assert cluster.decides() == ["CheckpointAborted"]
        assert aborted(cluster).missed
    cluster.commits()
    cluster.asks_for_checkpoint()
    assert cluster.inflight().step == 10 + lead()


@pytest.mark.parametrize(
    ("phase", "words_of_it"),
    [(ShardPhase.FAILED, "rank 1 could not store its shard: disk full"), (ShardPhase.MISSED, "already passed step")],
)
def test_a_shard_that_cannot_be_had_aborts_the_attempt_and_training_goes_on(
    phase: ShardPhase, words_of_it: str
) -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.acknowledges(0)
    cluster.shard(1, phase, reason="disk full")
    assert cluster.decides() == ["CheckpointAborted"]
    assert words_of_it in aborted(cluster).reason
    assert cluster.generation().number == 1


def test_an_attempt_of_the_last_step_is_kept_until_every_rank_was_asked() -> None:
    """Whoever was asked goes on; a peer that was not would hold on for a request that can never come."""
    cluster = training(step=100, every_steps=100)
    cluster.trains(step=101, until=101, phase="holding")
    assert cluster.decides() == ["CheckpointStarted"]
    cluster.shard(0, ShardPhase.FAILED, reason="disk full")
    assert cluster.decides() == []
    cluster.shard(1, ShardPhase.STAGED)
    assert cluster.decides()[0] == "CheckpointAborted"


def test_a_new_leader_aborts_no_attempt_of_the_last_step_before_it_has_heard_of_every_member() -> None:
    """Its base was found damaged, one worker's ranks were asked and have ended, and the other's were not."""
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(spec(nnodes_min=2, nnodes_max=2, every_steps=100), step=50)
    cluster.asks_for_checkpoint()
    cluster.commits()
    cluster.trains(step=101, until=101, phase="holding")
    assert cluster.decides() == ["CheckpointStarted"]
    for rank in (0, 1):
        cluster.shard(rank, ShardPhase.DURABLE)
        cluster.exits(rank, 0)
    cluster.quarantines(1)
    assert cluster.decides() == ["MembersFinished"]
    successor = cluster.fails_over()
    assert successor.decides() == []
    successor.connects("w2")
    assert successor.decides() == []
    successor.connects("w1")
    assert successor.decides() == []
    assert "/checkpoint-2/" in "".join(command.id for command in successor.commands("w2")), "it is asked all the same"
    for rank in (2, 3):
        successor.shard(rank, ShardPhase.DURABLE)
    assert successor.decides()[0] == "CheckpointAborted"


def test_a_refused_manifest_aborts_the_attempt_with_the_reason() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.acknowledges()
    cluster.manifest_refused("no such bucket")
    assert cluster.decides() == ["CheckpointAborted"]
    assert aborted(cluster).reason == "no such bucket"


def test_success_waits_for_the_checkpoint_in_flight() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    for rank in (0, 1):
        cluster.shard(rank, ShardPhase.STAGED)
    cluster.finish()
    assert cluster.decides() == ["MembersFinished"]
    cluster.acknowledges()
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointCommitted", "JobSucceeded"]


def test_a_rank_that_finishes_before_the_step_aborts_the_attempt_and_the_job_succeeds() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.finish()
    assert cluster.decides() == ["CheckpointAborted", "JobSucceeded"]
    assert "finished without reaching step" in aborted(cluster).reason


def test_a_new_leader_reads_the_commit_markers_of_each_active_job_before_it_starts_a_generation() -> None:
    cluster = training()
    cluster.exits(0, -9)
    successor = cluster.fails_over()
    assert words(successor.owes()) == ["markers to read"]
    for name in successor.nodes:
        successor.registers(name)
        successor.connects(name)
    assert successor.decides() == ["GenerationFailed"]
    successor.markers_are_read()
    assert successor.decides() == ["GenerationStarted"]
    assert words(successor.owes()) == []
