"""How restores share the node with what trains on it, and when they believe that a checkpoint is damaged."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from dtrain.common.errors import ShardDamagedError, ShardMissingError
from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName
from dtrain.storage import keys
from dtrain.storage.objects import ObjectStore, StorageUnavailable
from dtrain.worker import restores as module
from dtrain.worker.caches import Caches
from dtrain.worker.rank_dirs import RankDirs
from dtrain.worker.restores import Restores
from dtrain.worker.tasks import Tasks


def test_a_restore_does_not_give_way_for_training_waits_for_it(tmp_path: Path) -> None:
    dirs = RankDirs(tmp_path, tmp_path, "journal")
    restores = Restores(lambda fact: None, dirs, Tasks().begin, Caches(dirs))
    nice: list[int] = []

    def look() -> None:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    asyncio.run(restores._in_thread(look))
    restores.close()
    assert nice == [os.getpriority(os.PRIO_PROCESS, 0)]


@pytest.mark.parametrize(
    ("reads", "is_damaged"),
    [
        ("damaged damaged sound", False),
        ("damaged damaged damaged", True),
        ("damaged damaged away damaged damaged sound", False),
    ],
)
def test_what_the_way_from_storage_damaged_is_read_again_before_anything_is_called_damaged(
    reads: str, is_damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("PAUSE_S", "DAMAGED_PAUSE_S", "ROUND_S"):
        monkeypatch.setattr(module, pause, 0.0)
    answers = reads.split()

    def part(store: ObjectStore) -> None:
        match answers.pop(0):
            case "damaged":
                raise ShardDamagedError("a shard", "a flipped bit")
            case "away":
                raise StorageUnavailable("storage is away")

    patience = module._Patience(f"file://{tmp_path}", JobName("job"), threading.Event(), lambda text: None)
    if is_damaged:
        with pytest.raises(ShardDamagedError):
            patience.try_out(part)
    else:
        patience.try_out(part)
    assert not answers


def test_a_folder_that_shows_no_checkpoint_of_the_job_is_waited_for_as_one_that_is_not_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("PAUSE_S", "DAMAGED_PAUSE_S", "ROUND_S"):
        monkeypatch.setattr(module, pause, 0.0)
    job, number, attempt = JobName("job"), CheckpointNumber(1), AttemptNumber(1)
    own = tmp_path / keys.shard_key(job, number, attempt, 0)  # this node once stored it here, into the empty folder
    own.parent.mkdir(parents=True)
    own.touch()
    reads = 0

    def part(store: ObjectStore) -> None:
        nonlocal reads
        reads += 1
        if reads == 10:  # it is mounted: what is missing now is missing
            (tmp_path / keys.marker_key(job, number)).touch()
        raise ShardMissingError("a shard")

    said: list[str] = []
    with pytest.raises(ShardMissingError):
        module._Patience(f"file://{tmp_path}", job, threading.Event(), said.append).try_out(part)
    assert reads >= 10, "a checkpoint was called damaged because its store was not mounted"
    assert said == [
        f"the restore waits: file://{tmp_path} shows no checkpoint of job on this node: is it mounted here?"
    ]
