"""Damaged memory: a flipped bit in a checkpoint, an edited or missing event. Never trusted, always named."""

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from dtrain.coordinator.core.events import CheckpointQuarantined, GenerationStarted
from dtrain.etcd.client import EtcdClient
from dtrain.storage.shards import parse_header
from dtrain.storage.uris import open_store
from tests.support.cluster import PREFIX, Cluster, cluster
from tests.support.facts import wait_for
from tests.survival.conftest import EVERY, STEPS, begin, check


def flip_one_bit(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def only_here(path: Path, others: list[Path]) -> list[int]:
    """Return where the shard's bytes are that no other shard has a copy of: a restore needs each of them.

    The header is in the index too, and is not read again; of copies that several ranks stored, one is read.
    """
    header = parse_header(path.read_bytes())
    elsewhere = {name for other in others for name in parse_header(other.read_bytes()).tensors}
    needed = [span for name, span in header.tensors.items() if name not in elsewhere]
    return [at for span in needed for at in range(header.data_start + span.begin, header.data_start + span.end)]


def forget_staged_bytes(it: Cluster) -> None:
    """Make the nodes as if they had been restarted: what they staged is not in memory any more."""
    for folder in it.shared_folders():
        for record in folder.glob("arenas/*/rank*/slot*.json"):
            record.unlink()


def test_bytes_in_memory_make_up_for_damage_in_storage(
    tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng)
        it.wait_for_event(attack.job, "CheckpointCommitted", count=2)
        pids = {attack.steps(rank)[-1]["pid"] for rank in (0, 1)}
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        newest = attack.committed()[-1]
        for shard in newest.shards:
            (tmp_path / "cluster" / "store" / shard.key).write_bytes(b"gone")
        attack.hurry()
        os.kill(min(pids), signal.SIGKILL)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        tried = [e.event.restore for e in it.history(attack.job) if isinstance(e.event, GenerationStarted)]
        assert [point.checkpoint if point is not None else 0 for point in tried] == [0, newest.checkpoint]
        assert attack.final.read_bytes() == expected


def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng)
        it.wait_for_event(attack.job, "CheckpointCommitted", count=2)
        pids = {attack.steps(rank)[-1]["pid"] for rank in (0, 1)}
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that no newer checkpoint is committed before the damage is done
        newest = attack.committed()[-1]
        shard = rng.choice(newest.shards)
        paths = {each.key: tmp_path / "cluster" / "store" / each.key for each in newest.shards}
        others = [path for key, path in paths.items() if key != shard.key]
        flip_one_bit(paths[shard.key], rng.choice(only_here(paths[shard.key], others)))
        forget_staged_bytes(it)
        attack.hurry()
        os.kill(min(pids), signal.SIGKILL)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        events = it.history(attack.job)
        (quarantined,) = [e.event for e in events if isinstance(e.event, CheckpointQuarantined)]
        assert quarantined.checkpoint == newest.checkpoint
        assert quarantined.key == shard.key
        tried = [e.event.restore for e in events if isinstance(e.event, GenerationStarted)]
        numbers = [point.checkpoint if point is not None else 0 for point in tried]
        assert numbers == [0, newest.checkpoint, newest.checkpoint - 1]
        assert attack.final.read_bytes() == expected
        words = it.run("history", attack.job).stdout
        assert shard.key in words, "the history does not name the damaged shard"


def test_a_lost_event_stops_the_coordinator_and_names_the_key(tmp_path: Path, rng: random.Random) -> None:
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng)
        it.wait_for_event(attack.job, "CheckpointCommitted")
        coordinator = it.coordinators[0]
        coordinator.kill()
        key = f"{PREFIX}/jobs/{attack.job}/events/{rng.randint(1, 2):012d}"

        async def lose() -> None:
            async with EtcdClient((it.etcd.endpoint,)) as client:
                assert await client.delete(key)

        asyncio.run(lose())
        coordinator.start()
        assert coordinator.process is not None
        assert coordinator.process.wait(60) == 2
        said = coordinator.log.read_text()
        assert key in said
        assert "Traceback" not in said
        read = it.run("history", attack.job)
        assert read.returncode == 2
        assert key in read.stderr
        it.coordinators.clear()


def test_a_log_that_lost_its_end_is_noticed(tmp_path: Path, rng: random.Random) -> None:
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng)
        it.wait_for_event(attack.job, "CheckpointMarked", count=2)
        coordinator = it.coordinators[0]
        coordinator.kill()
        last = it.history(attack.job)[-1].seq

        async def lose() -> None:
            async with EtcdClient((it.etcd.endpoint,)) as client:
                for seq in range(4, last + 1):
                    assert await client.delete(f"{PREFIX}/jobs/{attack.job}/events/{seq:012d}")

        asyncio.run(lose())
        before = {info.key: info.size_bytes for info in open_store(attack.store).list("jobs/")}
        coordinator.start()
        assert coordinator.process is not None
        assert coordinator.process.wait(60) == 2
        assert f"{PREFIX}/jobs/{attack.job}/events/{4:012d}" in coordinator.log.read_text()
        assert before.items() <= {i.key: i.size_bytes for i in open_store(attack.store).list("jobs/")}.items()
        it.coordinators.clear()


def test_a_used_store_is_not_taken_for_a_new_job(tmp_path: Path, rng: random.Random) -> None:
    with cluster(tmp_path / "cluster") as it:
        attack = begin(it, rng, steps=3 * EVERY)
        assert it.wait_for_end(attack.job).type == "JobSucceeded"
        check(attack, None)

        async def forget() -> None:
            async with EtcdClient((it.etcd.endpoint,)) as client:
                await client.delete_prefix(f"{PREFIX}/jobs/")

        it.coordinators[0].kill()
        asyncio.run(forget())
        worker = it.workers[0]
        assert worker.terminate() == 0
        it.coordinators[0].start()
        it.wait_for_worker(it.add_worker())  # another node: it remembers nothing
        it.workers.remove(worker)
        options = ("--name", attack.job, "--store", attack.store, "--every-steps", "10")
        # Until the new leader is there, a submission is refused as well, for another reason.
        wait_for(
            "the coordinator's refusal of a used store",
            lambda: (
                (r := it.run("submit", *options, str(Path(__file__)))).returncode == 2
                and "already holds checkpoints" in r.stderr
            ),
            deadline_s=30,
        )
