"""What a failure costs a job, when it starts again, and when it is given up."""

from typing import Any

import pytest

from dtrain.coordinator.core.events import CheckpointQuarantined, FailureKind
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.facts import RankState
from dtrain.coordinator.core.observed import LOST_AFTER_S
from dtrain.coordinator.core.placement import waiting_for
from dtrain.coordinator.core.restarts import BACKOFF_FIRST_S, BACKOFF_MAX_S
from dtrain.coordinator.core.states import CANNOT_START_WITHIN_S, JobPhase, JobState
from tests.coordinator.support.clusters import Cluster, spec
from tests.coordinator.support.endings import failed, job_failed

RESTARTED = ["GenerationFailed", "GenerationStarted"]
GIVEN_UP = ["GenerationFailed", "JobFailed"]
NAN = "ValueError: loss is nan"


def one_node(*, step: int = 0, **changes: Any) -> Cluster:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(**changes), step=step)
    return cluster


def fails(cluster: Cluster, *, step: int, error: str = "boom", code: int = 1) -> list[str]:
    """The running generation gets to this step, where rank 0 ends; what is decided."""
    if step:
        cluster.trains(step=step)
    cluster.exits(0, code, error=error, traceback=f"Traceback\n{error}")
    return cluster.decides()


def goes_on(cluster: Cluster) -> None:
    """Whatever the job waits for passes, and its next generation runs."""
    cluster.passes(BACKOFF_MAX_S)
    cluster.decides()
    cluster.starts()


def restored(cluster: Cluster) -> int:
    restore = cluster.generation().restore
    return restore.checkpoint if restore is not None else 0


# -- the budget ---------------------------------------------------------------------------------------


def test_a_job_fails_when_its_restarts_are_used() -> None:
    cluster = one_node(max_restarts=2)
    for step in (5, 6):
        assert fails(cluster, step=step, code=3) == RESTARTED
        cluster.starts()
    assert fails(cluster, step=7, code=3) == GIVEN_UP
    assert job_failed(cluster).exit_code == 3
    assert job_failed(cluster).reason == "rank 0 on w1 exited with code 3: boom (all 2 restarts are used)"
    assert cluster.job().phase is JobPhase.FAILED


def test_restarts_are_counted_over_the_window() -> None:
    cluster = one_node(max_restarts=2, restart_window_s=100.0)
    for step in (5, 6, 7, 8):
        assert fails(cluster, step=step) == RESTARTED, "a failure that is longer ago than the window was counted"
        cluster.starts()
        cluster.passes(50.0)
    assert (cluster.job().restarts_used, cluster.job().restarts) == (2, 4)
    assert fails(cluster, step=9) == RESTARTED
    cluster.starts()
    cluster.passes(49.0)
    assert fails(cluster, step=10) == GIVEN_UP
    assert "all 2 restarts of 100 s are used" in job_failed(cluster).reason


def test_the_next_run_has_its_whole_budget_again() -> None:
    cluster = one_node(max_restarts=0)
    assert fails(cluster, step=5) == GIVEN_UP
    cluster.submits(spec(max_restarts=1), request="r2")
    goes_on(cluster)
    assert fails(cluster, step=6) == RESTARTED


def test_a_kill_from_outside_uses_a_restart_only_if_nothing_new_was_reached() -> None:
    cluster = one_node(max_restarts=1)
    for step in (5, 6, 7):
        assert fails(cluster, step=step, code=-9) == RESTARTED
        assert (failed(cluster).kind, failed(cluster).counted) == (FailureKind.KILLED, False)
        cluster.starts()
    assert fails(cluster, step=7, code=-9) == RESTARTED
    assert failed(cluster).counted, "the kernel may kill it at this very step for ever"
    cluster.starts()
    assert fails(cluster, step=7, code=-9) == GIVEN_UP
    assert job_failed(cluster).exit_code == 137


def test_a_kill_for_want_of_memory_uses_a_restart_as_every_other_kill() -> None:
    cluster = one_node(max_restarts=1)
    decided = []
    for step in (5, 6, 6, 6):
        cluster.trains(step=step)
        cluster.says(0, state=RankState.EXITED, exit_code=-9, out_of_memory="its process held 9 MiB at most")
        decided.append(cluster.decides())
        kind, counted = failed(cluster).kind, failed(cluster).counted
        assert (kind, counted) == (FailureKind.MEMORY, len(decided) > 2), "a leak that gets further stops nothing"
        if decided[-1] == RESTARTED:
            cluster.starts()
    assert decided == [RESTARTED, RESTARTED, RESTARTED, GIVEN_UP]
    assert job_failed(cluster).exit_code == 137


def test_a_checkpoint_is_progress_too() -> None:
    cluster = one_node(max_restarts=0)
    assert fails(cluster, step=20, code=-9) == RESTARTED
    cluster.starts()
    cluster.trains(step=10)
    cluster.commits()
    assert fails(cluster, step=15, code=-9) == RESTARTED
    assert not failed(cluster).counted


def test_a_script_that_may_not_be_restarted_and_cannot_start_is_given_up_at_once() -> None:
    cluster = one_node(max_restarts=0)
    assert fails(cluster, step=0, error="SyntaxError") == GIVEN_UP
    assert job_failed(cluster).exit_code == 1
    assert "no restarts allowed" in job_failed(cluster).reason


# -- the wait -----------------------------------------------------------------------------------------


def test_the_first_restart_comes_at_once_and_failures_without_progress_wait_longer_and_longer() -> None:
    cluster = one_node(max_restarts=100)
    waits = []
    for failure in range(9):
        decided = fails(cluster, step=0, error=f"failure {failure}")
        waited = 0.0
        while decided[-1] != "GenerationStarted":
            assert "further" in waiting_for(cluster.job(), cluster.observed, cluster.jobs, cluster.now)
            cluster.passes(0.25)
            waited += 0.25
            decided = [*decided, *cluster.decides()]
        waits.append(waited)
        cluster.starts()
    first = BACKOFF_FIRST_S
    assert waits == [0.0, *(min(first * 2**n, BACKOFF_MAX_S) for n in range(8))]
    assert fails(cluster, step=1) == RESTARTED, "it got further: no reason to wait"


def test_a_job_that_gets_further_each_time_never_waits() -> None:
    cluster = one_node(max_restarts=100)
    for step in range(1, 10):
        assert fails(cluster, step=step) == RESTARTED
        cluster.starts()


def test_another_leader_waits_out_the_same_wait() -> None:
    cluster = one_node(max_restarts=100)
    fails(cluster, step=0, error="one")
    cluster.starts()
    assert fails(cluster, step=0, error="two") == ["GenerationFailed"]
    cluster.passes(BACKOFF_FIRST_S / 2)
    successor = cluster.fails_over()
    successor.reconnect()
    assert successor.decides() == []
    successor.passes(BACKOFF_FIRST_S / 2)
    assert successor.decides() == ["GenerationStarted"]


# -- the same error again -----------------------------------------------------------------------------


def test_the_same_error_at_the_same_step_is_the_scripts_bug() -> None:
    cluster = one_node(max_restarts=10)
    assert fails(cluster, step=7, error="IndexError: at 0x7f11") == RESTARTED
    cluster.starts()
    assert fails(cluster, step=7, error="IndexError: at 0x7f22") == GIVEN_UP
    assert job_failed(cluster).exit_code == 1
    assert "2 times in a row after step 7 from the start" in job_failed(cluster).reason
    record = cluster.log[-1][0]
    assert (record.cause.fact, record.cause.traceback) == ("same_error_again", "Traceback\nIndexError: at 0x7f22")


def test_a_script_that_cannot_start_is_given_up_after_the_same_words_twice() -> None:
    cluster = one_node(max_restarts=10)
    error = "ModuleNotFoundError: No module named 'nothing'"
    assert fails(cluster, step=0, error=error) == RESTARTED
    cluster.starts()
    assert fails(cluster, step=0, error=error) == GIVEN_UP
    assert job_failed(cluster).exit_code == 1
    assert "2 times in a row before it got anywhere" in job_failed(cluster).reason


def test_a_script_that_got_somewhere_before_exits_with_its_own_code() -> None:
    cluster = one_node(max_restarts=10)
    assert fails(cluster, step=5, code=-9) == RESTARTED
    cluster.starts()
    error = "OSError: no such data set"
    assert fails(cluster, step=0, error=error) == RESTARTED
    goes_on(cluster)
    assert fails(cluster, step=0, error=error) == GIVEN_UP
    assert job_failed(cluster).exit_code == 1
    assert cluster.log[-1][0].cause.traceback == f"Traceback\n{error}"


def test_a_program_that_cannot_be_run_keeps_its_code() -> None:
    cluster = one_node(max_restarts=10)
    error = "dtrain: cannot run /no/such/python: No such file or directory"
    assert fails(cluster, step=0, error=error, code=127) == RESTARTED
    cluster.starts()
    assert fails(cluster, step=0, error=error, code=127) == GIVEN_UP
    assert job_failed(cluster).exit_code == 127


def test_a_script_that_counts_no_steps_may_have_come_far_before_the_same_error() -> None:
    cluster = one_node(max_restarts=3)
    for _ in range(3):
        cluster.passes(CANNOT_START_WITHIN_S)
        fails(cluster, step=0)
        goes_on(cluster)
    cluster.passes(CANNOT_START_WITHIN_S)
    assert fails(cluster, step=0) == GIVEN_UP
    assert "all 3 restarts are used" in job_failed(cluster).reason
    assert job_failed(cluster).exit_code == 1


@pytest.mark.parametrize(
    "second",
    [
        {"step": 8, "error": "boom"},
        {"step": 7, "error": "another"},
        {"step": 7, "error": "boom", "code": 4},
        {"step": 7, "error": "", "code": -9},
        {"step": 7, "error": "Connection closed by peer"},
    ],
    ids=str,
)
def test_another_error_or_another_step_is_not_the_same_again(second: dict[str, Any]) -> None:
    cluster = one_node(max_restarts=10)
    for given in ({"step": 7, "error": "boom"}, second):
        fails(cluster, **given)
        goes_on(cluster)
        assert cluster.job().phase is JobPhase.RUNNING


def test_the_same_crash_without_words_is_the_same_and_the_same_code_without_words_is_not() -> None:
    cluster = one_node(max_restarts=10)
    for _ in range(3):
        fails(cluster, step=7, error="", code=7)
        goes_on(cluster)
    fails(cluster, step=7, error="", code=-11)
    goes_on(cluster)
    assert fails(cluster, step=7, error="", code=-11) == GIVEN_UP


def test_a_preemption_in_between_excuses_nothing_unless_it_got_further() -> None:
    for between, expected in ((6, GIVEN_UP), (9, RESTARTED)):
        cluster = one_node(max_restarts=10)
        cluster.joins("w2")
        fails(cluster, step=7)
        cluster.starts()
        cluster.trains(step=between)
        cluster.loses(cluster.generation().members[0].worker)
        cluster.passes(LOST_AFTER_S)
        assert cluster.decides() == RESTARTED
        cluster.starts()
        assert fails(cluster, step=7)[: len(expected)] == expected


# -- a checkpoint in doubt ----------------------------------------------------------------------------


def poisoned(*, max_restarts: int = 10) -> Cluster:
    """Checkpoints 1 of step 10 or more and 2 of step 20 or more; two generations died right after restoring 2."""
    cluster = one_node(step=10, max_restarts=max_restarts)
    cluster.commits()
    cluster.trains(step=20)
    cluster.commits()
    saved = cluster.job().committed[max(cluster.job().committed)].step
    fails(cluster, step=saved + 5, error=NAN)
    cluster.starts()
    assert restored(cluster) == 2
    fails(cluster, step=saved, error=NAN)
    goes_on(cluster)
    assert restored(cluster) == 2
    fails(cluster, step=saved, error=NAN)
    return cluster


def test_a_checkpoint_that_leads_to_the_same_error_at_once_is_left_aside_and_the_older_one_taken() -> None:
    cluster = poisoned()
    event = cluster.last("CheckpointQuarantined")
    assert isinstance(event, CheckpointQuarantined)
    assert (event.checkpoint, event.suspect) == (2, True)
    assert NAN in event.reason
    goes_on(cluster)
    assert restored(cluster) == 1
    cluster.trains(step=40)
    cluster.commits()
    assert sorted(c.number for c in cluster.job().committed.values() if not c.quarantined) == [1, 3]


@pytest.mark.parametrize("where", ["at the same step", "right after its restore"])
def test_a_checkpoint_is_cleared_when_the_older_one_leads_to_the_same_error(where: str) -> None:
    cluster = poisoned()
    goes_on(cluster)
    first, second = (cluster.job().committed[n].step for n in sorted(cluster.job().committed))
    step = second if where == "at the same step" else first
    assert fails(cluster, step=step, error=NAN) == GIVEN_UP
    assert job_failed(cluster).exit_code == 1
    assert job_failed(cluster).cleared == 2
    assert "checkpoint 2 was not at fault" in job_failed(cluster).reason
    cluster.submits(spec(), request="r2")
    goes_on(cluster)
    assert restored(cluster) == 2, "the mended script does not continue from the newest checkpoint"


def test_only_one_checkpoint_is_left_aside_in_a_run() -> None:
    cluster = poisoned()
    goes_on(cluster)
    first = cluster.job().committed[min(cluster.job().committed)].step
    fails(cluster, step=first, error="another error")
    goes_on(cluster)
    assert fails(cluster, step=first, error="another error") == GIVEN_UP


def test_a_checkpoint_is_not_left_aside_when_no_restart_is_left_to_try_another() -> None:
    cluster = poisoned(max_restarts=2)
    assert cluster.job().phase is JobPhase.FAILED
    assert not any(c.quarantined for c in cluster.job().committed.values())


def test_an_error_steps_after_the_restore_does_not_put_the_checkpoint_in_doubt() -> None:
    cluster = one_node(step=10, max_restarts=10)
    cluster.commits()
    fails(cluster, step=50)
    for expected in (RESTARTED, GIVEN_UP):
        goes_on(cluster)
        assert fails(cluster, step=50)[0] == expected[0]
    assert cluster.job().phase is JobPhase.FAILED
    assert not any(c.quarantined for c in cluster.job().committed.values())


def test_a_script_that_never_joined_does_not_put_the_checkpoint_in_doubt() -> None:
    cluster = one_node(step=10, max_restarts=10)
    cluster.commits()
    cluster.finish()
    cluster.decides()
    cluster.submits(spec(max_restarts=10), request="r2")
    cluster.decides()
    cluster.starts()
    assert restored(cluster) == 1
    error = "SyntaxError: invalid syntax"
    assert fails(cluster, step=0, error=error) == RESTARTED
    cluster.starts()
    assert fails(cluster, step=0, error=error) == GIVEN_UP
    assert job_failed(cluster).exit_code == 1
    assert not any(c.quarantined for c in cluster.job().committed.values())


def test_all_counts_are_the_same_after_a_replay() -> None:
    cluster = poisoned()
    goes_on(cluster)
    fails(cluster, step=60, code=-9)
    state: JobState | None = None
    for record, _ in cluster.log:
        state = evolve(state, record)
    assert state == cluster.job()


def test_the_only_checkpoint_is_not_blamed() -> None:
    cluster = one_node(step=1000, max_restarts=10)
    cluster.commits()
    saved = cluster.job().committed[1].step
    decided = fails(cluster, step=saved + 5, error="RuntimeError: connection reset")
    for _ in range(2):
        goes_on(cluster)
        assert restored(cluster) == 1
        decided = fails(cluster, step=saved, error="FileNotFoundError: /data/train-0007.bin")
    assert decided == GIVEN_UP, "it began anew from step 0, and would have deleted all there is"
    assert "to continue from the newest checkpoint" in job_failed(cluster).reason
    newest = cluster.job().newest_restorable
    assert newest is not None and newest.step == saved
