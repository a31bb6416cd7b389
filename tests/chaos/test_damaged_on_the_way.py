"""A way to storage that flips bits damages no checkpoint, and has none quarantined."""

import os
import random
import signal
from pathlib import Path

from tests.chaos.storage_proxy import StorageProxy
from tests.support.cluster import cluster
from tests.support.s3_server import S3Server
from tests.survival.conftest import begin, check, server  # noqa: F401
from tests.survival.test_damage import forget_staged_bytes


def test_bits_that_flip_on_the_way_damage_nothing(
    server: S3Server,  # noqa: F811
    tmp_path: Path,
    rng: random.Random,
) -> None:
    with StorageProxy(server.endpoint.removeprefix("http://")) as proxy, cluster(tmp_path / "cluster") as it:
        store = f"s3://{server.bucket}/runs?endpoint=http://{proxy.endpoint}&region=us-east-1"
        attack = begin(it, rng, store=store)
        it.wait_for_event(attack.job, "CheckpointCommitted", count=2)
        pids = {attack.steps(rank)[-1]["pid"] for rank in (0, 1)}
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        forget_staged_bytes(it)  # so that all is read from storage
        proxy.flip_bits(True)
        before = proxy.damaged
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        it.wait_for_event(attack.job, "GenerationStarted", count=2)
        attack.hurry()
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        proxy.flip_bits(False)
        assert proxy.damaged > before
        assert not [event for event in it.history(attack.job) if event.type == "CheckpointQuarantined"]
        check(attack, None)
