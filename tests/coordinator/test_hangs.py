"""What is taken for a hang, what never is, and who is named as its culprit."""

import pytest

from dtrain.common.errors import UserError
from dtrain.common.names import Step, WorkerId
from dtrain.coordinator import codec
from dtrain.coordinator.core.checkpoints import ATTEMPT_TIMEOUT_S
from dtrain.coordinator.core.commands import TakeStacks
from dtrain.coordinator.core.events import FailureKind, HangFound, HangSuspected, Victim
from dtrain.coordinator.core.hangs import AUTO_FACTOR, AUTO_FLOOR_S, STACKS_WAIT_S
from dtrain.coordinator.core.step_clocks import LATER_STEPS_MIN, REPORT_GAP_MAX_S
from tests.coordinator.support.clusters import JOB, Cluster, spec
from tests.coordinator.support.endings import failed

TIMEOUT_S = 20.0
IN_COLLECTIVE = 'File "/torch/distributed/c10d.py", line 3 in all_reduce\nFile "/a/train.py", line 40 in <module>'
IN_BACKWARD = 'File "/torch/autograd/graph.py", line 9 in _engine_run_backward\nFile "/a/train.py", line 41 in <module>'
IN_BUFFERS = (
    'File "/torch/nn/parallel/distributed.py", line 5 in _sync_buffers\n'
    'File "/torch/nn/parallel/distributed.py", line 4 in _pre_forward\n'
    'File "/torch/nn/parallel/distributed.py", line 3 in forward\nFile "/a/train.py", line 38 in <module>'
)
IN_ITEM = 'File "/a/train.py", line 42 in <module>'  # loss.item() waits for the GPU
IN_USER_CODE = 'File "/a/train.py", line 17 in read_file\nFile "/a/train.py", line 39 in <module>'


def training(*, hang_timeout_s: float | None = TIMEOUT_S, workers: int = 1) -> Cluster:
    """A job of two ranks a worker that has done 50 steps."""
    cluster = Cluster()
    names = [f"w{number}" for number in range(1, workers + 1)]
    cluster.joins(*names)
    cluster.runs(spec(nnodes_min=workers, nnodes_max=workers, hang_timeout_s=hang_timeout_s))
    cluster.trains(step=0)
    cluster.trains(step=1)
    cluster.trains(step=50)
    return cluster


def suspected(*, workers: int = 1) -> Cluster:
    cluster = training(workers=workers)
    cluster.stands_still(TIMEOUT_S)
    assert cluster.decides() == ["HangSuspected"]
    return cluster


def found(cluster: Cluster) -> HangFound:
    event = cluster.last("HangFound")
    assert isinstance(event, HangFound)
    return event


# -- a hang, from its first sign to the new generation ------------------------------------------------


def test_a_generation_in_which_no_rank_completes_a_step_is_asked_where_it_stands_and_then_replaced() -> None:
    cluster = suspected()
    [command] = cluster.commands("w1")
    assert isinstance(command, TakeStacks) and command.number == 1
    cluster.answers("w1", command.id, "accepted")
    assert cluster.commands("w1") == [] and cluster.decides() == []
    cluster.says(0, stack=IN_COLLECTIVE, stack_number=1)
    assert cluster.decides() == [], "rank 1 has not said where it stands"
    cluster.says(1, stack=IN_USER_CODE, stack_number=1)
    assert cluster.decides() == ["HangFound", "GenerationFailed", "GenerationStarted"]
    assert (found(cluster).culprit, found(cluster).victims) == (1, (0,))
    assert [stack.rank for stack in found(cluster).stacks] == [1, 0], "the culprit's comes first"
    event = failed(cluster)
    assert event.counted and event.progressed and event.kind is FailureKind.HANG and event.step == 50
    assert event.victims == (Victim(rank=0, worker=WorkerId("w1")),)
    assert event.reason == (
        "it hung: no rank completed a step for 20 s; rank 1 on w1 seems to be stuck: read_file, /a/train.py:17"
    )
    assert cluster.cause("GenerationFailed") == "hang"


def test_a_checkpoint_in_flight_is_aborted_before_a_generation_that_hangs_fails() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.stands_still(TIMEOUT_S)
    assert cluster.decides() == ["HangSuspected"]
    for rank in (0, 1):
        cluster.says(rank, stack=IN_COLLECTIVE, stack_number=1)
    assert cluster.decides() == ["HangFound", "CheckpointAborted", "GenerationFailed", "GenerationStarted"]


def test_ranks_that_do_not_say_where_they_stand_are_waited_for_no_longer_than_the_bound() -> None:
    cluster = suspected()
    cluster.says(0, stack=IN_BACKWARD, stack_number=1)
    assert cluster.decides() == []
    cluster.stands_still(STACKS_WAIT_S)
    assert cluster.decides()[0] == "HangFound"
    assert found(cluster).culprit == 1, "one that cannot even answer is the likelier culprit"
    assert "did not answer" in found(cluster).stacks[0].stack


def test_progress_clears_the_suspicion_and_the_next_one_asks_again() -> None:
    cluster = suspected()
    cluster.trains(step=51)
    assert cluster.decides() == ["HangCleared"]
    assert cluster.commands("w1") == []
    cluster.stands_still(TIMEOUT_S)
    assert cluster.decides() == ["HangSuspected"]
    cluster.says(0, stack=IN_USER_CODE, stack_number=1)
    cluster.says(1, stack=IN_USER_CODE, stack_number=1)
    assert cluster.decides() == [], "these are the answers to the first asking"
    assert [command.id for command in cluster.commands("w1")] == [f"{JOB}/g1/stacks-2"]


def test_a_new_leader_goes_on_with_the_suspicion_that_it_finds() -> None:
    cluster = suspected().fails_over()
    assert cluster.decides() == []
    cluster.reconnect()
    assert cluster.decides() == []
    assert [type(command) for command in cluster.commands("w1")] == [TakeStacks]
    for rank in (0, 1):
        cluster.says(rank, stack=IN_COLLECTIVE, stack_number=1)
    assert cluster.decides()[:2] == ["HangFound", "GenerationFailed"]


def test_a_rank_that_dies_while_it_is_suspected_fails_the_generation_by_itself() -> None:
    cluster = suspected()
    cluster.exits(0, -9)
    assert cluster.decides() == ["GenerationFailed", "GenerationStarted"]
    assert cluster.cause("GenerationFailed") == "trainer_exited"


def test_the_events_of_a_hang_come_back_from_the_log_as_they_were() -> None:
    cluster = suspected()
    for rank in (0, 1):
        cluster.says(rank, stack=IN_COLLECTIVE, stack_number=1)
    cluster.decides()
    for record, value in cluster.log:
        assert codec.decode(record.key, value, cluster.job().name) == record


# -- what is no hang ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["starting", "joined", "restoring", "checkpointing", "paused", "left"])
def test_while_a_rank_does_something_that_is_no_step_nobody_hangs(phase: str) -> None:
    cluster = training()
    cluster.says(1, phase=phase)
    cluster.stands_still(TIMEOUT_S * 5)
    assert cluster.decides() == []
    cluster.says(1, phase="training")
    cluster.stands_still(TIMEOUT_S - 1)
    assert cluster.decides() == [], "the rank's clock began anew"
    cluster.stands_still(1)
    assert cluster.decides() == ["HangSuspected"]


def test_a_first_step_may_take_as_long_as_it_likes() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(hang_timeout_s=TIMEOUT_S))
    cluster.trains(step=0)
    cluster.stands_still(TIMEOUT_S * 5)
    assert cluster.decides() == []
    cluster.says(0, completed_step=Step(1))
    cluster.stands_still(TIMEOUT_S * 5)
    assert cluster.decides() == [], "rank 1 may still compile"


def test_a_first_step_after_a_restore_may_too() -> None:
    cluster = training()
    cluster.commits()
    cluster.exits(0, -9)
    assert cluster.decides() == ["GenerationFailed", "GenerationStarted"]
    restore = cluster.generation().restore
    assert restore is not None
    cluster.starts()
    cluster.trains(step=restore.step)
    cluster.stands_still(TIMEOUT_S * 5)
    assert cluster.decides() == []


@pytest.mark.parametrize("phase", ["holding", "finished"])
def test_ranks_that_have_done_their_last_step_do_not_hang(phase: str) -> None:
    cluster = training()
    cluster.trains(step=100, until=100, phase=phase)
    cluster.stands_still(TIMEOUT_S * 5)
    assert cluster.decides() == []


def test_a_rank_that_has_done_its_last_step_is_no_excuse_for_one_that_is_stuck() -> None:
    cluster = training()
    cluster.says(0, completed_step=Step(100), phase="finished")
    cluster.stands_still(TIMEOUT_S)
    assert cluster.decides() == ["HangSuspected"]


def test_time_in_which_no_report_came_does_not_count() -> None:
    cluster = training()
    for _ in range(10):
        cluster.passes(TIMEOUT_S)
        cluster.reports("w1")
        assert cluster.decides() == []
    cluster.stands_still(TIMEOUT_S)
    assert cluster.decides() == ["HangSuspected"]


def test_a_worker_that_does_not_report_keeps_the_others_from_being_judged() -> None:
    cluster = training(workers=2)
    for _ in range(round(TIMEOUT_S / REPORT_GAP_MAX_S) * 3):
        cluster.passes(REPORT_GAP_MAX_S)
        cluster.reports("w1")
    assert cluster.decides() == []


def test_one_rank_that_moves_is_enough() -> None:
    cluster = training()
    for step in range(51, 60):
        cluster.stands_still(TIMEOUT_S / 2)
        cluster.says(1, completed_step=Step(step))
        assert cluster.decides() == []


# -- the timeout --------------------------------------------------------------------------------------


def test_without_a_timeout_the_floor_counts_for_short_steps() -> None:
    cluster = training(hang_timeout_s=None)
    cluster.stands_still(AUTO_FLOOR_S - 1)
    assert cluster.decides() == []
    cluster.stands_still(1)
    assert cluster.decides() == ["HangSuspected"]


def test_without_a_timeout_long_steps_raise_it() -> None:
    cluster = training(hang_timeout_s=None)
    cluster.stands_still(AUTO_FLOOR_S / 2)  # one step of a hundred evaluates
    cluster.trains(step=51)
    cluster.stands_still(AUTO_FLOOR_S * 2)
    assert cluster.decides() == []
    cluster.stands_still(AUTO_FACTOR * AUTO_FLOOR_S / 2 - AUTO_FLOOR_S * 2)
    assert cluster.decides() == ["HangSuspected"]
    event = cluster.last("HangSuspected")
    assert isinstance(event, HangSuspected)
    assert event.timeout_s == pytest.approx(AUTO_FACTOR * AUTO_FLOOR_S / 2)


def first_step_takes(seconds: float) -> Cluster:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec())
    cluster.trains(step=0, step_s=0.0)
    cluster.stands_still(seconds)
    cluster.trains(step=1, step_s=seconds)
    return cluster


@pytest.mark.parametrize(("later", "decided"), [(LATER_STEPS_MIN - 1, []), (LATER_STEPS_MIN, ["HangSuspected"])])
def test_a_long_first_step_raises_it_only_until_a_few_later_ones_were_seen(later: int, decided: list[str]) -> None:
    cluster = first_step_takes(AUTO_FLOOR_S)
    for step in range(2, 2 + later):
        cluster.trains(step=step)
    cluster.stands_still(AUTO_FLOOR_S)
    assert cluster.decides() == decided


def test_steps_longer_than_the_floor_are_no_hang() -> None:
    cluster = first_step_takes(AUTO_FLOOR_S + 100)
    for step in range(2, LATER_STEPS_MIN + 4):
        cluster.stands_still(AUTO_FLOOR_S + 100)
        assert cluster.decides() == [], f"step {step}"
        cluster.trains(step=step, step_s=AUTO_FLOOR_S + 100)


def test_a_new_leader_knows_long_steps_from_the_first_report_that_it_gets() -> None:
    cluster = first_step_takes(AUTO_FLOOR_S + 100).fails_over()
    cluster.reconnect()
    cluster.stands_still(AUTO_FLOOR_S + 100)
    assert cluster.decides() == []
    cluster.stands_still(AUTO_FACTOR * (AUTO_FLOOR_S + 100))
    assert cluster.decides() == ["HangSuspected"]


def test_a_job_may_wish_never_to_be_judged() -> None:
    cluster = training(hang_timeout_s=0)
    cluster.stands_still(AUTO_FLOOR_S * 2)
    assert cluster.decides() == []


@pytest.mark.parametrize("value", [-1.0, 0.5, 1e9, float("nan"), float("inf")])
def test_a_timeout_that_cannot_be_meant_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="hang-timeout"):
        spec(hang_timeout_s=value)


# -- the culprit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stacks", "steps", "culprit"),
    [
        ((IN_COLLECTIVE, IN_COLLECTIVE, IN_USER_CODE, IN_BACKWARD), (50, 50, 50, 50), 2),
        ((IN_USER_CODE, IN_USER_CODE, IN_USER_CODE, IN_USER_CODE), (50, 50, 50, 49), 3),
        ((IN_USER_CODE, IN_COLLECTIVE, IN_USER_CODE, IN_COLLECTIVE), (51, 51, 50, 50), 2),
        ((IN_COLLECTIVE, IN_COLLECTIVE, "no stack: the process is stopped", IN_COLLECTIVE), (50, 50, 50, 50), 2),
        ((IN_COLLECTIVE, IN_COLLECTIVE, IN_COLLECTIVE, IN_COLLECTIVE), (50, 50, 50, 50), -1),
        ((IN_BUFFERS, IN_USER_CODE, IN_BUFFERS, IN_BUFFERS), (50, 50, 50, 50), 1),
        ((IN_ITEM, IN_ITEM, IN_ITEM, IN_COLLECTIVE), (50, 50, 50, 50), -1),
        ((IN_ITEM, IN_ITEM, IN_ITEM, IN_USER_CODE), (50, 50, 50, 50), 3),
        (("no stack: its worker did not answer",) * 3 + (IN_COLLECTIVE,), (50, 50, 50, 50), 0),
    ],
    ids=[
        *("elsewhere", "behind", "behind and elsewhere", "stopped", "all alike"),
        *("buffers", "most wait for the GPU", "one does not", "silent worker"),
    ],
)
def test_the_culprit_is_the_rank_that_the_others_wait_for(
    stacks: tuple[str, ...], steps: tuple[int, ...], culprit: int
) -> None:
    cluster = training(workers=2)
    for rank, step in enumerate(steps):
        cluster.says(rank, completed_step=Step(step))
    cluster.stands_still(TIMEOUT_S)
    assert cluster.decides() == ["HangSuspected"]
    for rank, stack in enumerate(stacks):
        cluster.says(rank, stack=stack, stack_number=1)
    assert cluster.decides()[0] == "HangFound"
    assert found(cluster).culprit == culprit
    assert found(cluster).victims == tuple(rank for rank in range(4) if rank != culprit)


@pytest.mark.parametrize("exited", [True, False], ids=["ended with 0", "finished"])
def test_a_rank_that_ended_its_steps_before_its_peers_is_what_they_wait_for(exited: bool) -> None:
    cluster = training(workers=2)
    cluster.says(2, phase="finished", until_step=Step(100), stack_number=1, stack=IN_USER_CODE)
    if exited:
        cluster.exits(2, 0)
    cluster.stands_still(TIMEOUT_S)
    assert cluster.decides() == ["HangSuspected"]
    for rank in (0, 1, 3):
        cluster.says(rank, stack=IN_COLLECTIVE, stack_number=1)
    assert cluster.decides()[:2] == ["HangFound", "GenerationFailed"]
    assert (found(cluster).culprit, found(cluster).victims) == (2, (0, 1, 3))
    assert failed(cluster).reason == (
        "it hung: no rank completed a step for 20 s; rank 2 on w2 ended its steps after step 50, and its peers go on"
    )


@pytest.mark.parametrize(("step", "until"), [(51, 100), (50, 50)], ids=["further", "all steps done"])
def test_a_rank_that_has_ended_and_keeps_nobody_waiting_is_not_named(step: int, until: int) -> None:
    cluster = training()
    cluster.says(1, phase="finished", completed_step=Step(step), until_step=Step(until))
    cluster.exits(1, 0)
    cluster.stands_still(TIMEOUT_S)
    assert cluster.decides() == ["HangSuspected"]
    cluster.says(0, stack=IN_USER_CODE, stack_number=1)
    assert cluster.decides()[0] == "HangFound"
    assert (found(cluster).culprit, found(cluster).victims) == (0, ())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_copy_that_never_ends_is_an_excuse_for_as_long_as_its_attempt_is_waited_for(workers: int) -> None:
    """A state_dict() that waits for somebody, a device that is lost. With the others gone nothing else would end it."""
    cluster = training(workers=workers)
    cluster.asks_for_checkpoint()
    cluster.says(0, phase="checkpointing")
    for rank in range(1, 2 * workers):
        cluster.exits(rank, 0)
    cluster.stands_still(ATTEMPT_TIMEOUT_S - 1.0)
    assert "HangSuspected" not in cluster.decides()
    cluster.stands_still(2.0)
    assert "HangSuspected" in cluster.decides()
