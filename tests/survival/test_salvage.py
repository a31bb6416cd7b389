"""A trainer dies while its checkpoint is on its way to a slow store: the checkpoint is committed all the same."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from dtrain.coordinator.core.events import GenerationStarted, SalvageStarted
from tests.support.cluster import cluster
from tests.support.facts import wait_for
from tests.support.s3_server import S3Server
from tests.survival.conftest import STEPS, begin, check

SAVED = 50
# A step so long that so many of them are worth a wait of 7.5 s. It is given up half way if nothing moves, and a busy
# machine can keep that.
STEP_MS = "150"


def test_a_checkpoint_staged_before_a_kill_is_committed_and_the_next_generation_starts_from_it(
    server: S3Server, tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        rarely = ("--every-steps", str(SAVED))
        attack = begin(it, rng, store=server.uri("runs/salvage"), more=rarely, script=("--step-ms", STEP_MS))
        it.wait_for_event(attack.job, "CheckpointStarted")
        os.kill(server.pid, signal.SIGSTOP)  # from here on the store takes nothing
        try:
            wait_for("a step after the staged one", lambda: attack.furthest() >= SAVED + 2, deadline_s=60)
            os.kill(attack.steps(1)[-1]["pid"], signal.SIGKILL)
            it.wait_for_event(attack.job, "SalvageStarted")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        it.wait_for_event(attack.job, "GenerationStarted", count=2)
        attack.hurry()
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)
        history = it.history(attack.job)
        order = [e.type for e in history[: next(i for i, e in enumerate(history) if e.type == "GenerationFailed") + 2]]
        assert order[-4:] == ["SalvageStarted", "CheckpointCommitted", "GenerationFailed", "GenerationStarted"], order
        (salvage,) = [e.event for e in history if isinstance(e.event, SalvageStarted)]
        starts = [e.event for e in history if isinstance(e.event, GenerationStarted)]
        assert [start.restore.step if start.restore is not None else 0 for start in starts] == [0, salvage.step]
