"""The same on S3: a trainer's death, a dead agent in the middle of an upload, a store that goes away for a while."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from dtrain.coordinator.core.events import CheckpointCommitted
from dtrain.worker.rank_dirs import ARENAS, CACHE
from tests.support.cluster import cluster
from tests.support.facts import wait_for
from tests.support.s3_server import S3Server
from tests.survival.conftest import STEPS, begin, check
from tests.survival.test_kills import kill_trainer, kill_worker


def test_trainer_and_agent_die_with_checkpoints_on_s3(
    server: S3Server, tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng, store=server.uri("runs/one"))
        it.wait_for_event(attack.job, "CheckpointCommitted")
        kill_trainer(attack)
        it.wait_for_event(attack.job, "GenerationStarted", count=2)
        it.wait_for_event(attack.job, "CheckpointStarted", count=len(attack.committed()) + 1)
        kill_worker(attack)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)


def test_training_goes_on_while_the_store_is_away(
    server: S3Server, tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng, store=server.uri("runs/two"))
        it.wait_for_event(attack.job, "CheckpointCommitted")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            it.wait_for_event(attack.job, "CheckpointStarted", count=len(attack.committed()) + 1)
            before = attack.furthest()
            it_moved = before + 10
            wait_for("ten more steps without a store", lambda: attack.furthest() >= it_moved, deadline_s=30)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)
        assert len(attack.started()) == 1
        steps = [e.event.step for e in it.history(attack.job) if isinstance(e.event, CheckpointCommitted)]
        assert steps[-1] > before, "no checkpoint was committed after the store came back"


def test_a_node_that_fetched_its_checkpoint_starts_again_while_the_store_is_away(
    server: S3Server, tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        rarely = ("--every-steps", "30")
        attack = begin(it, rng, store=server.uri("runs/three"), more=rarely, script=("--step-ms", "150"))
        it.wait_for_event(attack.job, "CheckpointCommitted")
        (worker,) = it.workers
        worker.kill()
        for root in it.shared_folders():
            shutil.rmtree(root / ARENAS)  # as on another node: nothing of the checkpoint is in memory
        kill_trainer(attack)
        worker.start()
        it.wait_for_event(attack.job, "GenerationStarted", count=2)
        cache = it.folder / "w0" / CACHE / attack.job
        wait_for("both shards are kept", lambda: len(list(cache.rglob("*.ranges.json"))) == 2, deadline_s=60)
        attack.wait_until_training(generation=2)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            point = len(attack.started())
            os.kill(attack.steps(0)[-1]["pid"], signal.SIGKILL)
            it.wait_for_event(attack.job, "GenerationStarted", count=point + 1)
            attack.wait_until_training(generation=point + 1, deadline_s=30)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        attack.hurry()
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)
