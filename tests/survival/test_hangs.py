"""A rank that is stuck is found, named, and replaced; what merely takes long is left alone."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from dtrain.coordinator.core.events import GenerationFailed, HangFound
from tests.support.cluster import cluster
from tests.support.facts import wait_for
from tests.survival.conftest import EVERY, STEPS, begin, check

TIMEOUT_S = 3.0
LINGER_S = 3.5  # longer than the timeout
HANG_AT = 2 * EVERY + 5


def test_a_rank_that_is_stuck_is_named_and_its_generation_replaced(
    tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    """The same run lingers at its start, in its first step, in a checkpoint, in a pause, and then in a restore."""
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        script_args = ("--hang-at", str(HANG_AT), "--linger-s", str(LINGER_S))
        attack = begin(it, rng, more=("--hang-timeout", str(TIMEOUT_S)), script=script_args)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)
        events = [event.event for event in it.history(attack.job)]
        assert len(attack.started()) == 2
        # One only: whatever merely took long was not taken for a hang.
        (found,) = [event for event in events if isinstance(event, HangFound)]
        assert (found.culprit, found.victims) == (1, (0,))
        assert "wait_for_ever" in found.stacks[0].stack
        (failed,) = [event for event in events if isinstance(event, GenerationFailed)]
        assert "wait_for_ever" in failed.reason and "rank 1" in failed.reason
        log = (it.folder / "w0" / "logs" / attack.job / "generation-0001" / "rank-1.log").read_text()
        assert "wait_for_ever" in log, "a person finds the stacks in the rank's log"


def test_a_rank_that_was_stopped_is_named(tmp_path: Path, rng: random.Random) -> None:
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng, more=("--hang-timeout", str(TIMEOUT_S)))
        it.wait_for_event(attack.job, "CheckpointCommitted")
        os.kill(attack.steps(1)[-1]["pid"], signal.SIGSTOP)
        (event,) = it.wait_for_event(attack.job, "HangFound", deadline_s=30)
        assert isinstance(event.event, HangFound)
        assert event.event.culprit == 1
        assert "stopped" in event.event.stacks[0].stack
        wait_for("the next generation", lambda: len(attack.started()) == 2, deadline_s=20)
        attack.hurry()
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, None)
