"""kill -9 of anything, at moments drawn at random: the run ends with the weights of an uninterrupted one."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cluster import cluster
from tests.support.facts import wait_for
from tests.survival.conftest import EVERY, STEPS, Attack, begin, check

KILLS_SLOW = 5
STEPS_SLOW = 250


def kill_trainer(attack: Attack) -> None:
    """kill -9 of one of the two trainers."""
    rank = attack.rng.randrange(2)
    pid = wait_for("a step of the rank", lambda: attack.steps(rank), deadline_s=30)[-1]["pid"]
    os.kill(pid, signal.SIGKILL)


def kill_worker(attack: Attack) -> None:
    """kill -9 of the agent, and its restart as any supervisor would do it."""
    service = attack.cluster.workers[0]
    service.kill()
    service.start()


def kill_coordinator(attack: Attack) -> None:
    service = attack.cluster.coordinators[0]
    service.kill()
    service.start()


def kill_etcd(attack: Attack) -> None:
    attack.cluster.etcd.kill()
    attack.cluster.etcd.start()


KILLS: dict[str, Callable[[Attack], None]] = {
    "trainer": kill_trainer,
    "worker": kill_worker,
    "coordinator": kill_coordinator,
    "etcd": kill_etcd,
}
# Whose death must cost no training step: the job is never restarted.
COSTS_NOTHING = ("worker", "coordinator", "etcd")


def wait_for_moment(attack: Attack, *, part: float) -> None:
    """Wait for a moment drawn at random, about ``part`` of the way through: a step begun, or an event appended."""
    steps = STEPS if part <= 0 else max(1, int(part))
    step = attack.rng.randint(max(1, steps - EVERY), steps)
    wait_for(f"step {step}", lambda: attack.furthest() >= step, deadline_s=90)
    if attack.rng.random() < 0.5:
        # Into the middle of a checkpoint: between its start and its commit, or right after.
        count = len(attack.committed()) + 1
        attack.cluster.wait_for_event(attack.job, "CheckpointStarted", count=count, deadline_s=60)


@pytest.mark.parametrize("victim", KILLS)
def test_a_run_survives_one_kill(
    victim: str, tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng)
        wait_for_moment(attack, part=rng.randint(EVERY + 2, STEPS - 2 * EVERY))
        KILLS[victim](attack)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)
        if victim in COSTS_NOTHING:
            assert len(attack.started()) == 1, "the job was restarted though no trainer failed"
        else:
            assert len(attack.started()) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", KILLS)
def test_a_run_survives_five_kills(
    victim: str, tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS_SLOW)
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng, steps=STEPS_SLOW)
        for kill in range(KILLS_SLOW):
            wait_for_moment(attack, part=(kill + 1) * (STEPS_SLOW - 2 * EVERY) / (KILLS_SLOW + 1))
            KILLS[victim](attack)
        assert it.wait_for_end(attack.job, deadline_s=300).type == "JobSucceeded", it.logs()
        check(attack, expected)
        if victim in COSTS_NOTHING:
            assert len(attack.started()) == 1, "the job was restarted though no trainer failed"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_survives_kills_of_everything_in_any_order(
    tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS_SLOW)
    victims = [*KILLS, *KILLS]
    rng.shuffle(victims)
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng, steps=STEPS_SLOW)
        for number, victim in enumerate(victims):
            wait_for_moment(attack, part=(number + 1) * (STEPS_SLOW - 2 * EVERY) / (len(victims) + 1))
            KILLS[victim](attack)
        assert it.wait_for_end(attack.job, deadline_s=300).type == "JobSucceeded", it.logs()
        check(attack, expected)
