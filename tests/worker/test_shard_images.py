"""An image of a shard: the stage slot itself where it is sound, and a file of its own where it is not."""

import os
from pathlib import Path

import msgspec
import pytest

from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName, Step
from dtrain.storage.indexes import IndexedShard, index_shard, open_index
from dtrain.storage.keys import shard_key
from dtrain.storage.ranges import NeededRange, pieces_of, runs_of
from dtrain.worker import shard_images
from dtrain.worker.arenas import Kept
from dtrain.worker.shard_images import ShardImage
from tests.support.memory_store import MemoryStore
from tests.worker.shards import VALUES, shard_bytes

KEY = shard_key(JobName("job"), CheckpointNumber(1), AttemptNumber(1), 0)


@pytest.fixture
def stored() -> tuple[MemoryStore, IndexedShard, bytes]:
    data = shard_bytes(rank=0, step=5)
    store = MemoryStore()
    store.put(KEY, data)
    index, _ = index_shard(memoryview(data), key=KEY)
    return store, open_index(index, key=KEY, shard_key=KEY), data


def staged(folder: Path, data: bytes, *, attempt: int = 1) -> Path:
    folder.mkdir()
    slot = folder / "slot1"
    slot.write_bytes(data + bytes(100))  # a slot may be larger than what it holds
    kept = Kept(attempt=AttemptNumber(attempt), step=Step(5), size_bytes=len(data), digest="")
    (folder / "slot1.json").write_bytes(msgspec.json.encode(kept))
    return slot


def bring(image: ShardImage, store: MemoryStore, shard: IndexedShard) -> int:
    """Bring everything; return the number of rounds."""
    wanted = pieces_of([shard], [NeededRange(shard=0, tensor="weight", begin=0, end=len(VALUES))])[0]
    image.begin(store)
    rounds = 0
    while missing := wanted - image.there:
        rounds += 1
        for run in runs_of(0, missing):
            image.reader(run)(store)
    return rounds


def test_a_sound_slot_is_the_image_itself_and_nothing_is_copied(
    tmp_path: Path, stored: tuple[MemoryStore, IndexedShard, bytes]
) -> None:
    store, shard, data = stored
    slot = staged(tmp_path / "rank0", data)
    image = ShardImage(tmp_path / "image", shard, slots=[slot.parent], attempt=1)
    store.delete(KEY)
    assert bring(image, store, shard) == 1
    assert (tmp_path / "image").samefile(slot)


@pytest.mark.parametrize("same_file_system", [True, False])
def test_where_memory_holds_none_the_slot_in_the_data_folder_serves(
    tmp_path: Path,
    stored: tuple[MemoryStore, IndexedShard, bytes],
    monkeypatch: pytest.MonkeyPatch,
    same_file_system: bool,
) -> None:
    store, shard, data = stored
    slot = staged(tmp_path / "rank0", data)
    if not same_file_system:  # as a disk is not the shared memory that the image lies in
        monkeypatch.setattr(shard_images, "_link", lambda slot, image: False)
    image = ShardImage(tmp_path / "image", shard, slots=[tmp_path / "memory" / "rank0", slot.parent], attempt=1)
    store.delete(KEY)
    assert bring(image, store, shard) == 1
    assert (tmp_path / "image").read_bytes()[: len(data)] == data


def test_a_damaged_slot_is_left_alone_and_storage_is_read(
    tmp_path: Path, stored: tuple[MemoryStore, IndexedShard, bytes]
) -> None:
    store, shard, data = stored
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    slot = staged(tmp_path / "rank0", damaged)
    image = ShardImage(tmp_path / "image", shard, slots=[slot.parent], attempt=1)
    assert bring(image, store, shard) == 2
    assert (tmp_path / "image").read_bytes() == data
    assert slot.read_bytes() == damaged + bytes(100)


def test_another_attempts_slot_is_not_used(tmp_path: Path, stored: tuple[MemoryStore, IndexedShard, bytes]) -> None:
    store, shard, data = stored
    slot = staged(tmp_path / "rank0", data, attempt=2)
    image = ShardImage(tmp_path / "image", shard, slots=[slot.parent], attempt=1)
    bring(image, store, shard)
    assert not (tmp_path / "image").samefile(slot)


def test_what_an_earlier_agent_linked_is_not_written_through(
    tmp_path: Path, stored: tuple[MemoryStore, IndexedShard, bytes]
) -> None:
    store, shard, data = stored
    slot = staged(tmp_path / "rank0", bytes(len(data)), attempt=2)
    os.link(slot, tmp_path / "image")
    image = ShardImage(tmp_path / "image", shard, slots=[slot.parent], attempt=1)
    bring(image, store, shard)
    assert slot.read_bytes() == bytes(len(data) + 100)
    assert (tmp_path / "image").read_bytes() == data
