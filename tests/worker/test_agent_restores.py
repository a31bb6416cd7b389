"""What a generation starts from: verified, handed over, and never confused with a storage that is away."""

import os
import signal
from pathlib import Path

import pytest

from dtrain.common.digests import blob_digest
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, Step, job_name
from dtrain.proto import agent_pb2 as wire
from dtrain.storage.keys import manifest_key
from dtrain.storage.manifests import Manifest, encode
from dtrain.storage.restore_files import (
    MANIFEST_FILE,
    NEEDS_FILE,
    RESTORE_FOLDER,
    SOURCES_FILE,
    Sources,
    decode_sources,
)
from dtrain.storage.uris import open_store
from dtrain.worker.rank_dirs import CACHE
from tests.support.checkpoints import put_shard
from tests.support.facts import wait_for
from tests.support.s3_server import moto
from tests.worker.nodes import DEADLINE_S, JOB, Node
from tests.worker.scripts.mailbox_trainer import staged_bytes


def _committed(node: Node) -> tuple[wire.Restore, list[str]]:
    """A whole checkpoint in the node's store: what restores it, and its shards' keys."""
    job, checkpoint, attempt = job_name(JOB), CheckpointNumber(1), AttemptNumber(1)
    store = open_store(node.store)
    shards = [put_shard(store, staged_bytes(rank, 5), rank, job=JOB) for rank in range(2)]
    manifest = encode(
        Manifest(
            job=job,
            checkpoint=checkpoint,
            attempt=attempt,
            generation=Generation(1),
            step=Step(5),
            world_size=2,
            shards=tuple(shards),
        )
    )
    name = manifest_key(job, checkpoint, attempt)
    store.put(name, manifest)
    restore = wire.Restore(checkpoint=1, attempt=1, step=5, manifest_key=name, manifest_digest=blob_digest(manifest))
    return restore, [entry.key for entry in shards]


def test_a_restore_is_verified_and_handed_to_every_rank(node: Node) -> None:
    restore, keys = _committed(node)
    node.start()
    node.start_trainers(restore=restore)
    node.wait_training()
    for rank in range(2):
        assert f"restored b'rank {rank} at step 5" in node.log(rank)
    assert node.coordinator.snapshots[-1].assignments[0].restore.state == wire.READY
    flipped = bytearray(staged_bytes(1, 5))
    flipped[-100] ^= 1
    (node.folder / "store" / keys[1]).write_bytes(flipped)
    node.start_trainers(generation=2, restore=restore)
    report = node.wait(
        "the damage is told", lambda s: s.assignments[0].restore.state == wire.DAMAGED and s.assignments[0].restore
    )
    assert (report.key, report.checkpoint) == (keys[1], 1)
    assert report.reason == "tensor 'payload.1' does not match its digest"


def test_a_missing_shard_is_damage_and_a_storage_that_cannot_be_used_is_not(node: Node) -> None:
    restore, keys = _committed(node)
    store, aside = node.folder / "store", node.folder / "aside"
    store.rename(aside)
    store.write_text("a file is in the way")
    node.start()
    node.start_trainers(restore=restore)
    node.wait("the ranks wait for it", lambda s: [r.phase for a in s.assignments for r in a.ranks] == ["restoring"] * 2)
    seen = node.coordinator.snapshots[-1].number
    node.wait("some more heartbeats", lambda snapshot: snapshot.number > seen + 10)
    assert node.coordinator.snapshots[-1].assignments[0].restore.state == wire.FETCHING
    assert node.coordinator.snapshots[-1].assignments[0].phase == wire.RESTORING
    assert "dtrain: the restore waits: " in node.log(0), "who waits for the job is not told why"
    store.unlink()
    aside.rename(store)
    node.wait_training()
    assert not list((node.folder / "shm").rglob("rank-*.safetensors"))  # given back once they train
    (store / keys[0]).unlink()
    node.start_trainers(generation=2, restore=restore)
    node.wait("the loss is told", lambda s: s.assignments[0].restore.state == wire.DAMAGED)
    assert node.coordinator.snapshots[-1].assignments[0].restore.reason == "is missing"


def _start_slowly(node: Node, restore: wire.Restore) -> Path:
    """Start trainers that say nothing until the file is there that is returned."""
    go, script = node.folder / "go", node.folder / "slow_to_start.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "while not pathlib.Path(sys.argv[3]).exists(): time.sleep(0.01)\n"
        "from tests.worker.scripts.mailbox_trainer import main\nmain()\n"
    )
    node.start()
    node.start_trainers(
        restore=restore,
        script=str(script),
        args=[str(node.end_file), "0.01", str(go)],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return go


def test_the_bytes_come_while_the_trainers_start_and_before_any_has_asked(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        node.store = server.uri("store")
        restore, _ = _committed(node)
        go = _start_slowly(node, restore)
        folder = node.folder / "shm"

        def there() -> bool:
            images = sorted(folder.glob(f"dtrain-*/*.g1/{RESTORE_FOLDER}/rank-*.safetensors"))
            return [image.read_bytes() for image in images] == [staged_bytes(rank, 5) for rank in range(2)]

        wait_for("all bytes are there", there, deadline_s=DEADLINE_S)
        assert not list(folder.rglob(NEEDS_FILE)), "a trainer had asked"
        node.wait("the trainers start", lambda s: [r.phase for a in s.assignments for r in a.ranks] == ["starting"] * 2)
        go.touch()
        node.wait_training()
    assert "restored b'rank 1 at step 5" in node.log(1)


def test_a_generation_that_dies_before_its_first_commit_is_followed_by_one_that_fetches_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = node.folder / "node" / CACHE / JOB
    with moto() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        node.store = server.uri("store")
        restore, keys = _committed(node)
        node.start()
        node.start_trainers(restore=restore)
        pids = node.wait_training()
        wait_for("both shards are kept", lambda: len(list(cache.rglob("*.ranges.json"))) == 2, deadline_s=DEADLINE_S)
        for key in keys:
            server.client().delete_object(Bucket=server.bucket, Key=f"store/{key}")
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        node.start_trainers(generation=2, restore=restore)
        node.wait("generation 2 trains", lambda s: s.assignments[0].generation == 2 and _trains(s))
        pids = node.wait_training()
    for pid in pids.values():  # and now there is no store at all, and the agent is another one
        os.kill(pid, signal.SIGKILL)
    node.kill()
    node.start()
    node.start_trainers(generation=3, restore=restore)
    node.wait("generation 3 trains", lambda s: s.assignments[0].generation == 3 and _trains(s))
    for generation in (2, 3):
        for rank in (0, 1):
            assert f"restored b'rank {rank} at step 5" in node.log(rank, generation)
    node.wait_done(node.command(generation=3, stop_trainers=wire.StopTrainers(grace_s=0)))
    wait_for("the job has left the node, and its cache with it", lambda: not cache.exists(), deadline_s=DEADLINE_S)


def _trains(snapshot: wire.Snapshot) -> bool:
    ranks = [rank for assignment in snapshot.assignments for rank in assignment.ranks]
    return len(ranks) == 2 and all(rank.completed_step > 0 and rank.state == wire.RUNNING for rank in ranks)


def test_what_a_folder_holds_is_pointed_out_and_not_copied(node: Node) -> None:
    restore, keys = _committed(node)
    go = _start_slowly(node, restore)
    found = f"dtrain-*/*.g1/{RESTORE_FOLDER}/{MANIFEST_FILE}"
    manifest = wait_for(
        "the checkpoint is told", lambda: next((node.folder / "shm").glob(found), None), deadline_s=DEADLINE_S
    )
    folder = manifest.parent
    sources = decode_sources((folder / SOURCES_FILE).read_bytes())
    assert sources == Sources(objects={key: str(node.folder / "store" / key) for key in keys})
    assert not list(folder.glob("rank-*.safetensors"))
    go.touch()  # these trainers read nothing themselves: what they ask for is brought
    node.wait_training()
    assert "restored b'rank 1 at step 5" in node.log(1)
