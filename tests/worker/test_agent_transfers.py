"""How far uploads and restores are is in the snapshots, as long as they are under way."""

import fcntl
import os

from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName
from dtrain.proto import agent_pb2 as wire
from dtrain.storage.keys import attempt_prefix
from dtrain.storage.uris import open_store
from tests.support.checkpoints import write_checkpoint
from tests.worker.nodes import JOB, Node
from tests.worker.scripts.mailbox_trainer import payload, staged_bytes


def test_an_upload_that_waits_for_storage_is_seen_until_it_is_stored(node: Node) -> None:
    folder = node.folder / "store" / attempt_prefix(JobName(JOB), CheckpointNumber(1), AttemptNumber(1))
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # whoever writes there waits for it
    node.start()
    node.start_trainers()
    node.wait_training()
    step = max(node.steps().values()) + 50
    command = node.command(stage_checkpoint=wire.StageCheckpoint(checkpoint=1, attempt=1, step=step, store=node.store))

    def uploads(snapshot: wire.Snapshot) -> list[tuple[int, int]]:
        ranks = [rank for assignment in snapshot.assignments for rank in assignment.ranks]
        return [(rank.upload.bytes_done, rank.upload.bytes_total) for rank in ranks if rank.HasField("upload")]

    sizes = [len(staged_bytes(rank, step)) for rank in range(2)]
    node.wait("both uploads are seen", lambda s: uploads(s) == [(0, size) for size in sizes])
    os.close(held)
    node.wait_done(command)
    node.wait("no upload is seen any more", lambda s: uploads(s) == [])


def test_a_restore_that_waits_for_a_shard_is_seen_until_it_is_there(node: Node) -> None:
    marker = write_checkpoint(
        open_store(node.store), [payload(rank, 5) for rank in range(2)], job=JOB, checkpoint=1, attempt=1, step=5
    )
    restore = wire.Restore(
        checkpoint=CheckpointNumber(1),
        attempt=AttemptNumber(1),
        step=5,
        manifest_key=marker.manifest_key,
        manifest_digest=marker.manifest_digest,
    )
    [shard, _] = sorted((node.folder / "store").rglob("*.safetensors"))
    aside = node.folder / "aside"
    shard.rename(aside)
    shard.symlink_to(aside)  # refused: nothing is known of the shard, so it is asked for again and again
    node.start()
    node.start_trainers(restore=restore)

    def transfer(snapshot: wire.Snapshot) -> wire.Transfer | None:
        [assignment] = snapshot.assignments or [wire.Assignment()]
        return assignment.restore.transfer if assignment.restore.HasField("transfer") else None

    size = len(payload(0, 5))
    node.wait("the restore is seen", lambda s: (found := transfer(s)) is not None and found.bytes_total == size)
    shard.unlink()
    aside.rename(shard)
    node.wait_training()
    node.wait("no restore is seen any more", lambda s: transfer(s) is None)
