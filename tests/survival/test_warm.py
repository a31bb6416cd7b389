"""Ranks forked from the warm process, killed and taken over as any others; and the warm process itself killed."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from tests.support.cluster import Cluster, cluster
from tests.support.facts import wait_for
from tests.support.processes import marked
from tests.survival.conftest import Attack, begin, check

STEPS = 200
READY = "the warm process is ready"


def wait_until_warm(attack: Attack, *, count: int = 1) -> None:
    """Wait for the warm process; meanwhile the ranks stand still, so that the run does not end before."""
    log = attack.cluster.workers[0].log
    ranks = [attack.steps(rank)[-1]["pid"] for rank in (0, 1)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    wait_for(f"{READY}, {count} times", lambda: log.read_text().count(READY) >= count, deadline_s=90)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)


def zygote_pid(it: Cluster) -> int:
    (pid,) = (pid for pid, command in marked(it.mark).items() if command.startswith("dtrain-zygote"))
    return pid


def kill_a_rank_and_wait_for_steps(attack: Attack, *, generation: int) -> dict[int, int]:
    """kill -9 of a rank; return the pids of the generation that replaces its own, by rank."""
    os.kill(attack.steps(attack.rng.randrange(2))[-1]["pid"], signal.SIGKILL)
    return attack.wait_until_training(generation=generation)


def test_warm_ranks_survive_what_others_survive(
    tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng, steps=STEPS)
        it.wait_for_event(attack.job, "CheckpointCommitted")
        wait_until_warm(attack)
        forked = kill_a_rank_and_wait_for_steps(attack, generation=2)
        assert "starts cold" not in it.workers[0].log.read_text(), "the first ranks wait for the warm process"

        os.kill(zygote_pid(it), signal.SIGKILL)
        wait_until_warm(attack, count=2)
        it.workers[0].kill()
        it.workers[0].start()
        wait_until_warm(attack, count=3)
        assert len(attack.started()) == 2, "the death of the warm process or of its agent cost a generation"
        assert {attack.steps(rank)[-1]["pid"] for rank in (0, 1)} == set(forked.values())

        kill_a_rank_and_wait_for_steps(attack, generation=3)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)
