"""How a run ends: success, cancellation, being taken over; what people are refused; what workers are told."""

from dataclasses import replace

import pytest

from dtrain.common.errors import UserError
from dtrain.coordinator.core.commands import CANCEL_GRACE_S, StageCheckpoint, StartTrainers, StopTrainers
from dtrain.coordinator.core.events import FailureKind
from dtrain.coordinator.core.facts import ShardPhase, SnapshotReceived
from dtrain.coordinator.core.observed import LOST_AFTER_S, MUTE_AFTER_S
from dtrain.coordinator.core.states import JobPhase
from tests.coordinator.support.clusters import Cluster, spec
from tests.coordinator.support.endings import failed

START, STOP = "mnist/g1/start", "mnist/g1/stop"


def running(*workers: str, step: int = 10) -> Cluster:
    cluster = Cluster()
    cluster.joins(*workers)
    cluster.runs(spec(nnodes_min=len(workers), nnodes_max=len(workers)), step=step)
    return cluster


def ids(cluster: Cluster, worker: str) -> list[str]:
    return [command.id for command in cluster.commands(worker)]


# -- success ------------------------------------------------------------------------------------------


def test_a_job_succeeds_when_every_rank_of_every_worker_has_ended_with_0() -> None:
    cluster = running("w1", "w2")
    for rank in (0, 1, 3):
        cluster.exits(rank, 0)
    assert cluster.decides() == ["MembersFinished"]
    assert cluster.decides() == []
    cluster.exits(2, 0)
    assert cluster.decides() == ["JobSucceeded"]
    assert cluster.job().exit_code == 0


def test_ranks_that_are_not_reported_have_not_succeeded() -> None:
    cluster = running("w1")
    cluster.nodes["w1"].held["mnist"].ranks.clear()
    cluster.reports("w1")
    assert cluster.decides() == []


def test_an_exit_that_nobody_saw_is_a_failure_whatever_its_code() -> None:
    cluster = running("w1")
    cluster._rank("mnist", 1, exit_unknown=True)
    cluster.exits(0, 0)
    cluster.exits(1, 0)
    assert cluster.decides() == ["GenerationFailed", "GenerationStarted"]


LEAVES = "its worker is being shut down"


def drained(*, step: int, until: int, ended_for: str = LEAVES, leaving: bool = True) -> Cluster:
    """The job's worker is shut down; its ranks catch SIGTERM, save, and exit with 0. Another worker is there."""
    cluster = running("w1")
    cluster.joins("w2")
    cluster.trains(step=step, until=until)
    cluster.nodes["w1"].leaving = leaving
    for rank in (0, 1):
        cluster.says(rank, phase="finished")
        cluster.exits(rank, 0, ended_for=ended_for)
    cluster.loses("w1")
    return cluster


@pytest.mark.parametrize(
    ("step", "until", "ended_for", "leaving"),
    [
        (500, 10_000, LEAVES, True),
        (500, 10_000, LEAVES, False),
        (500, 10_000, "its worker was gone for 1800 s", False),
        (0, 0, LEAVES, True),
    ],
    ids=["its worker leaves", "no leader saw it leave", "its worker was gone", "a script that counts no steps"],
)
def test_ranks_that_end_with_0_before_their_work_is_done_because_they_were_told_to_were_preempted(
    step: int, until: int, ended_for: str, leaving: bool
) -> None:
    cluster = drained(step=step, until=until, ended_for=ended_for, leaving=leaving)
    assert cluster.decides() == ["GenerationFailed", "GenerationStarted"]
    event = failed(cluster)
    assert (event.kind, event.counted, event.exit_code) == (FailureKind.PREEMPTED, False, 1)
    at = f" after step {step} of {until}" if until else ""
    assert event.reason == f"rank 0 on w1 was ended by its node{at}: {ended_for}"
    assert [member.worker for member in cluster.generation().members] == ["w2"]


@pytest.mark.parametrize(
    ("step", "until", "ended_for"),
    [(10_000, 10_000, LEAVES), (0, 0, ""), (500, 10_000, "")],
    ids=["all steps done", "a script that counts none", "ended by itself"],
)
def test_ranks_that_end_with_0_have_succeeded_otherwise(step: int, until: int, ended_for: str) -> None:
    assert drained(step=step, until=until, ended_for=ended_for).decides() == ["JobSucceeded"]


def test_an_ended_job_decides_nothing_more() -> None:
    cluster = running("w1")
    cluster.finish()
    cluster.decides()
    ranks = cluster.nodes["w1"].held["mnist"].ranks
    ranks[0] = replace(ranks[0], exit_code=1)
    cluster.reports("w1")
    cluster.loses("w1")
    cluster.passes(LOST_AFTER_S * 2)
    assert cluster.decides() == []


# -- cancellation -------------------------------------------------------------------------------------


def test_a_job_that_waits_is_cancelled_at_once() -> None:
    cluster = Cluster()
    cluster.submits()
    cluster.cancels()
    assert cluster.decides() == ["JobCancelled"]
    assert cluster.job().exit_code == 130


def test_a_running_job_is_cancelled_when_all_its_ranks_have_ended_and_its_attempt_is_aborted_first() -> None:
    cluster = running("w1", "w2")
    cluster.asks_for_checkpoint()
    cluster.cancels()
    assert cluster.decides() == ["CheckpointAborted"]
    assert ids(cluster, "w1") == ids(cluster, "w2") == [STOP]
    cluster.exits(0, -15)
    cluster.exits(1, -15)
    assert cluster.decides() == [], "w2 still runs"
    cluster.exits(2, 0)
    cluster.exits(3, -9)
    assert cluster.decides() == ["JobCancelled"]


def test_a_worker_that_says_the_stop_is_done_holds_no_cancellation_up() -> None:
    cluster = running("w1")
    cluster.cancels()
    cluster.nodes["w1"].held.clear()
    cluster.answers("w1", STOP, "accepted")
    assert cluster.decides() == []
    cluster.answers("w1", STOP, "done")
    assert cluster.decides() == ["JobCancelled"]


def test_a_lost_worker_holds_no_cancellation_up() -> None:
    cluster = running("w1")
    cluster.cancels()
    cluster.loses("w1")
    assert cluster.decides() == []
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides() == ["JobCancelled"]


def test_a_worker_that_keeps_its_lease_and_says_nothing_holds_no_cancellation_up_for_ever() -> None:
    cluster = running("w1")
    cluster.cancels()
    successor = cluster.fails_over()
    successor.registers("w1")
    successor.passes(MUTE_AFTER_S - 1)
    assert successor.decides() == []
    successor.passes(1)
    assert successor.decides() == ["JobCancelled"]
    successor.connects("w1")
    assert ids(successor, "w1") == [STOP], "when it speaks again it is told"


def test_a_worker_that_never_got_its_start_command_is_still_told_to_stop() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.submits()
    cluster.decides()
    cluster.cancels()
    assert cluster.decides() == []
    assert ids(cluster, "w1") == [STOP]
    cluster.answers("w1", STOP, "done")
    assert cluster.decides() == ["JobCancelled"]


def test_a_failure_while_cancelling_starts_nothing() -> None:
    cluster = running("w1")
    cluster.cancels()
    cluster.exits(0, 1)
    assert cluster.decides() == []
    cluster.exits(1, 1)
    assert cluster.decides() == ["JobCancelled"]


# -- people -------------------------------------------------------------------------------------------


def test_a_submission_repeated_after_a_lost_answer_submits_nothing_twice() -> None:
    cluster = Cluster()
    cluster.submits(request="same")
    cluster.submits(request="same")
    assert cluster.job().run == 1
    assert len(cluster.log) == 1


def test_the_name_of_a_running_job_is_refused_with_the_mend() -> None:
    cluster = running("w1")
    with pytest.raises(UserError, match="dtrain cancel mnist"):
        cluster.submits(request="r2")


def test_the_name_of_an_ended_job_starts_its_next_run_from_the_newest_checkpoint() -> None:
    cluster = running("w1")
    cluster.commits()
    cluster.finish()
    cluster.decides()
    cluster.submits(request="r2")
    assert cluster.job().run == 2
    cluster.nodes["w1"].held.clear()
    cluster.reports("w1")
    assert cluster.decides() == ["GenerationStarted"]
    generation = cluster.generation()
    assert generation.number == 2
    assert generation.restore is not None and generation.restore.checkpoint == 1


def test_a_launcher_that_takes_over_interrupts_the_run_and_continues_it() -> None:
    cluster = running("w1")
    cluster.commits()
    cluster.asks_for_checkpoint()
    cluster.submits(request="r2", takes_over=True)
    types = [record.type for record, _ in cluster.log[-3:]]
    assert types == ["CheckpointAborted", "RunInterrupted", "JobSubmitted"]
    assert cluster.decides() == ["GenerationStarted"], "its own old trainers are in no one's way"
    assert cluster.job().run == 2
    assert ids(cluster, "w1") == ["mnist/g2/start"]


def test_more_ranks_a_node_than_any_worker_has_slots_are_refused() -> None:
    cluster = Cluster()
    cluster.joins("w1", slots=2)
    with pytest.raises(UserError, match="nproc-per-node 3 is more than any worker has slots"):
        cluster.submits(spec(nproc_per_node=3))


def test_without_any_worker_yet_a_job_is_admitted_and_waits() -> None:
    cluster = Cluster()
    cluster.submits(spec(nproc_per_node=64))
    assert cluster.decides() == []
    assert cluster.job().phase is JobPhase.PENDING


def test_what_cannot_be_cancelled_or_checkpointed_is_refused_in_words() -> None:
    cluster = Cluster()
    with pytest.raises(UserError, match="no job named 'mnist'"):
        cluster.cancels()
    cluster.submits()
    with pytest.raises(UserError, match="is pending: only a running job"):
        cluster.asks_for_checkpoint()
    cluster.cancels()
    cluster.cancels()
    cluster.decides()
    with pytest.raises(UserError, match="already ended"):
        cluster.cancels()


# -- commands are levels ------------------------------------------------------------------------------


def test_a_start_is_owed_to_each_member_until_it_is_taken_and_names_its_ranks() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2", "w3")
    cluster.submits(spec(nnodes_min=2, nnodes_max=2))
    cluster.decides()
    (command,) = cluster.commands("w2")
    assert isinstance(command, StartTrainers)
    assert list(command.member.ranks) == [2, 3]
    assert command.position == cluster.generation().position
    assert cluster.commands("w2") == [command], "asking twice gives the same"
    assert cluster.commands("w3") == []
    cluster.answers("w2", START, "accepted")
    assert cluster.commands("w2") == []
    assert ids(cluster, "w1") == [START]


def test_a_start_is_owed_again_by_the_next_leader_if_the_worker_does_not_show_it() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.submits()
    cluster.decides()
    successor = cluster.fails_over()
    successor.reconnect()
    assert ids(successor, "w1") == [START]


def test_no_command_is_owed_to_a_worker_that_has_lost_its_memory() -> None:
    cluster = running("w1")
    cluster.nodes["w1"].journal = "another"
    cluster.nodes["w1"].held.clear()
    cluster.nodes["w1"].commands.clear()
    cluster.reports("w1")
    assert cluster.commands("w1") == []


def test_a_stage_command_is_owed_until_the_worker_shows_the_attempt() -> None:
    cluster = running("w1")
    cluster.asks_for_checkpoint()
    (command,) = cluster.commands("w1")
    assert isinstance(command, StageCheckpoint)
    assert command.id == "mnist/g1/checkpoint-1/attempt-1"
    assert command.position == cluster.inflight().position
    cluster.shard(0, ShardPhase.REQUESTED)
    assert cluster.commands("w1") == []


def test_the_members_of_a_failed_generation_are_told_to_stop_only_while_they_hold_something_of_it() -> None:
    cluster = running("w1", "w2")
    cluster.joins("w3")
    cluster.loses("w1")
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides() == ["GenerationFailed", "GenerationStarted"]
    assert [member.worker for member in cluster.generation().members] == ["w2", "w3"]
    cluster.registers("w1")
    cluster.connects("w1")
    (command,) = cluster.commands("w1")
    assert isinstance(command, StopTrainers) and command.generation == 1
    assert command.grace_s == 0, "a failed generation has nothing left to save"
    cluster.answers("w1", STOP, "accepted")
    assert cluster.commands("w1") == []
    cluster.nodes["w1"].commands.clear()
    cluster.nodes["w1"].held.clear()
    cluster.reports("w1")
    assert cluster.commands("w1") == []


def test_a_member_of_the_next_generation_is_not_told_to_stop_but_to_start() -> None:
    cluster = running("w1")
    cluster.exits(0, -9)
    cluster.decides()
    assert ids(cluster, "w1") == ["mnist/g2/start"]


def test_the_trainers_of_an_ended_job_are_let_go_of() -> None:
    cluster = running("w1")
    cluster.finish()
    cluster.decides()
    assert ids(cluster, "w1") == [STOP]
    cluster.nodes["w1"].held.clear()
    cluster.reports("w1")
    assert cluster.commands("w1") == []


def test_a_cancelled_script_is_given_time_to_save_something() -> None:
    cluster = running("w1")
    cluster.cancels()
    (command,) = cluster.commands("w1")
    assert isinstance(command, StopTrainers) and command.grace_s == CANCEL_GRACE_S


@pytest.mark.parametrize("command", [START, STOP, "mnist/g1/checkpoint-1/attempt-1"])
def test_a_command_refused_to_an_older_leader_is_owed_by_this_one(command: str) -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.submits()
    cluster.decides()
    if command != START:
        cluster.starts()
        cluster.trains(step=10)
    if "checkpoint" in command:
        cluster.asks_for_checkpoint()
    if command == STOP:
        cluster.cancels()
    cluster.answers("w1", command, "refused", term=cluster.term - 1)
    assert ids(cluster, "w1") == [command]
    cluster.answers("w1", command, "refused", term=cluster.term)
    assert ids(cluster, "w1") == []


# -- facts that say nothing new -----------------------------------------------------------------------


def test_snapshots_that_come_late_or_twice_change_nothing() -> None:
    cluster = running("w1")
    node = cluster.nodes["w1"]
    late = SnapshotReceived(snapshot=node.snapshot(cluster.term), stream=node.stream)
    cluster.trains(step=50)
    newest = cluster.observed.view(node.name).snapshot
    cluster.tells(late)
    assert cluster.observed.view(node.name).snapshot == newest
    older_stream = replace(late, snapshot=replace(late.snapshot, number=10**6))
    cluster.connects("w1")
    newest = cluster.observed.view(node.name).snapshot
    cluster.tells(older_stream)
    assert cluster.observed.view(node.name).snapshot == newest
