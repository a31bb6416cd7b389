"""What is sent from a stage slot, and that nothing is acknowledged which a trainer may have written over."""

import asyncio
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dtrain.common.digests import blob_digest
from dtrain.common.mailbox import pack
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, Step
from dtrain.storage.indexes import index_shard
from dtrain.storage.local import LocalFolder
from dtrain.storage.metering import Meter
from dtrain.storage.objects import ObjectInfo, StorageUnavailable
from dtrain.storage.parts import FileParts
from dtrain.worker.arenas import Kept, SlotMap
from dtrain.worker.bandwidth import MIB_BYTES, BandwidthCap
from dtrain.worker.core.actions import Upload
from dtrain.worker.core.inputs import UploadDone, UploadFailed
from dtrain.worker.core.states import BaseIndex, CheckpointRequest
from dtrain.worker.rank_dirs import RankId
from dtrain.worker.tasks import Tasks
from dtrain.worker.transfers import Transfer
from dtrain.worker.uploads import Uploads
from tests.worker.facts_of_trainers import JOB
from tests.worker.shards import VALUES, shard_bytes

WORD = pack(4, 10)


class Rank:
    """A rank's folder with a staged slot, what its mailbox says, and what the uploads answer."""

    def __init__(self, folder: Path, *, payload: bytes = VALUES) -> None:
        self.folder = folder
        self.data = shard_bytes(rank=1, step=10, payload=payload)
        self.bases: tuple[BaseIndex, ...] = ()
        self.cap = BandwidthCap(None)
        self.progress: dict[RankId, Transfer] = {}  # when the bytes were gone
        (folder / "slot1").write_bytes(self.data + b"what an earlier, longer state left")
        self.holds = {1: WORD}
        self.kept: list[tuple[int, Kept]] = []
        self.mapped: SlotMap | None = None
        self.answers: list[UploadDone | UploadFailed] = []
        self.looks = 0
        self.after_look = lambda: None
        self.see_progress = lambda: None

    def slot_holds(self, _: RankId, slot: int) -> int:
        self.looks += 1
        word = self.holds.get(slot, 0)
        self.after_look()
        return word

    def upload(self) -> UploadDone | UploadFailed:
        """Upload slot 1 as attempt 4 of step 10; return the answer."""
        request = CheckpointRequest(
            checkpoint=CheckpointNumber(2),
            attempt=AttemptNumber(4),
            step=Step(10),
            store=(self.folder / "store").as_uri(),
            bases=self.bases,
        )

        async def turn() -> None:
            tasks = Tasks()
            uploads = Uploads(
                self.answers.append,
                self.slot_holds,
                lambda _, *kept: self.kept.append(kept),
                lambda *_: self.mapped,
                tasks.begin,
                self.cap,
            )
            self.see_progress = lambda: self.progress.update(uploads.progress())
            async with asyncio.TaskGroup() as group:
                tasks.group = group
                act = Upload(
                    job=JOB, generation=Generation(1), rank=1, request=request, slot=1, size_bytes=len(self.data)
                )
                uploads.start(act, self.folder)
            assert uploads.progress() == {}
            uploads.close()

        asyncio.run(turn())
        (answer,) = self.answers
        return answer


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path)


def test_the_slots_bytes_are_stored_up_to_their_size_and_recorded(rank: Rank) -> None:
    answer = rank.upload()
    assert isinstance(answer, UploadDone)
    assert LocalFolder(rank.folder / "store").get(answer.key) == rank.data
    assert answer.digest == blob_digest(rank.data)
    assert rank.kept == [(1, Kept(attempt=4, step=10, size_bytes=len(rank.data), digest=answer.digest))]


def test_a_slot_that_is_mapped_already_is_read_through_its_map(rank: Rank) -> None:
    slot = rank.folder / "slot1"
    with slot.open("rb") as file:
        rank.mapped = SlotMap(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), slot.stat().st_ino)
    answer = rank.upload()
    assert isinstance(answer, UploadDone)
    assert LocalFolder(rank.folder / "store").get(answer.key) == rank.data


def test_a_map_of_a_file_that_is_no_longer_the_slot_is_left_alone(rank: Rank) -> None:
    older = rank.folder / "older"
    older.write_bytes(shard_bytes(rank=1, step=9, payload=b"older"))
    with older.open("rb") as file:
        rank.mapped = SlotMap(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), older.stat().st_ino)
    answer = rank.upload()
    assert isinstance(answer, UploadDone)
    assert LocalFolder(rank.folder / "store").get(answer.key) == rank.data
    assert answer.digest == blob_digest(rank.data)


def test_what_did_not_change_is_packed_and_the_slot_counts_as_a_whole(tmp_path: Path) -> None:
    rank = Rank(tmp_path, payload=bytes(2 * MIB_BYTES))
    store = LocalFolder(rank.folder / "store")
    index, _ = index_shard(memoryview(shard_bytes(rank=1, step=9, payload=bytes(2 * MIB_BYTES))))
    store.put("index", index)
    rank.bases = (BaseIndex(rank=1, index_key="index", index_digest=blob_digest(index)),)
    answer = rank.upload()
    assert isinstance(answer, UploadDone)
    [pack] = answer.packs
    assert store.get(pack.key) == bytes(2 * MIB_BYTES)
    assert store.head(answer.key) == ObjectInfo(key=answer.key, size_bytes=answer.size_bytes)
    assert answer.size_bytes < 2048 and answer.state_bytes == len(rank.data)
    assert rank.kept[0][1].size_bytes == len(rank.data), "a restore from memory finds all of it there"


def test_tries_with_and_without_the_base_meet_under_no_key(tmp_path: Path) -> None:
    keys = []
    for name in ("there", "lost"):
        folder = tmp_path / name
        folder.mkdir()
        rank = Rank(folder)
        index, _ = index_shard(memoryview(shard_bytes(rank=1, step=9)))
        if name == "there":
            LocalFolder(folder / "store").put("index", index)
        rank.bases = (BaseIndex(rank=1, index_key="index", index_digest=blob_digest(index)),)
        answer = rank.upload()
        assert isinstance(answer, UploadDone)
        keys += [answer.key, answer.index_key]
    assert len(set(keys)) == 4


def test_a_slot_that_holds_another_state_is_not_sent(rank: Rank) -> None:
    rank.holds[1] = pack(5, 11)
    answer = rank.upload()
    assert isinstance(answer, UploadFailed) and "a later attempt was staged" in answer.reason
    assert not (rank.folder / "store").exists() and not rank.kept


@pytest.mark.parametrize("word", [0, pack(5, 11)], ids=["being written", "written again"])
def test_a_slot_that_was_written_while_it_was_sent_is_not_acknowledged(rank: Rank, word: int) -> None:
    rank.after_look = lambda: rank.holds.update({1: word})
    answer = rank.upload()
    assert isinstance(answer, UploadFailed) and "a later attempt was staged" in answer.reason
    assert rank.looks == 2 and not rank.kept


@contextmanager
def busy_threads() -> Iterator[None]:
    """Only so that a niceness of this process's own threads would be seen."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_the_progress_of_an_upload_counts_its_bytes_while_it_is_under_way(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = LocalFolder.put_file

    def fail_once(self: LocalFolder, key: str, source: FileParts, *, meter: Meter) -> None:
        put_file(self, key, source, meter=meter)
        rank.see_progress()
        if not tries:
            tries.append(rank.progress.copy())
            raise StorageUnavailable("the answer was lost")

    tries: list[dict[RankId, Transfer]] = []
    monkeypatch.setattr(LocalFolder, "put_file", fail_once)
    assert isinstance(rank.upload(), UploadDone)
    of = RankId(job=JOB, generation=Generation(1), rank=1)
    whole = Transfer(bytes_done=len(rank.data), bytes_total=len(rank.data))
    assert (rank.progress, tries) == ({of: whole}, [{of: whole}]), "a second try begins at 0"


def test_a_capped_upload_takes_its_time(tmp_path: Path) -> None:
    rank = Rank(tmp_path, payload=bytes(6 * MIB_BYTES))
    rank.cap = BandwidthCap(4.0)
    started_s = time.monotonic()
    assert isinstance(rank.upload(), UploadDone)
    assert time.monotonic() - started_s >= 0.5, "4 MiB at once, the others at 4 MiB/s"
    assert LocalFolder(tmp_path / "store").get(rank.answers[0].key) == rank.data


def test_only_the_sending_threads_give_way(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    nice: list[int] = []
    put_file = LocalFolder.put_file

    def watched(self: LocalFolder, key: str, source: FileParts, *, meter: Meter) -> None:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        put_file(self, key, source, meter=meter)

    monkeypatch.setattr(LocalFolder, "put_file", watched)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with busy_threads():
        assert isinstance(rank.upload(), UploadDone)
    assert nice and min(nice) > before == os.getpriority(os.PRIO_PROCESS, 0)
