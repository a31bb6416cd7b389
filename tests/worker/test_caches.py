"""How long a node keeps what it fetched, and that nothing waits for it or suffers from it."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.common.names import AttemptNumber, Generation, JobName
from dtrain.storage.free_memory import Free
from dtrain.storage.indexes import IndexedShard
from dtrain.worker import cache_files, caches
from dtrain.worker.caches import Caches
from dtrain.worker.core.states import RestoreSource
from dtrain.worker.rank_dirs import RankDirs
from tests.support.facts import wait_for
from tests.worker.facts_of_trainers import spec
from tests.worker.test_cache_files import DATA, NAMES, fetched, pieces, shard

__all__ = ["shard"]  # the fixture
JOB = JobName("digits")
DEADLINE_S = 20.0
PLENTY = Free(size_bytes=1 << 40, where="this test")


@pytest.fixture
def dirs(tmp_path: Path) -> RankDirs:
    (tmp_path / "shm").mkdir()
    return RankDirs(tmp_path / "shm", tmp_path / "data", "journal-of-this-node")


@pytest.fixture
def kept(dirs: RankDirs) -> Iterator[Caches]:
    it = Caches(dirs, lambda _: PLENTY)
    yield it
    it.close()


def source(attempt: int) -> RestoreSource:
    given = spec(restore=True).restore
    assert given is not None
    return replace(given, attempt=AttemptNumber(attempt), manifest_digest=f"xxh3-128:{attempt:032x}")


def names(dirs: RankDirs, job: JobName = JOB) -> list[str]:
    folder = dirs.cache(job)
    return sorted(path.name[:6] for path in folder.iterdir()) if folder.is_dir() else []


def keep(it: Caches, shard: IndexedShard, attempt: int, *, job: JobName = JOB) -> None:
    """Keep all of the shard, and wait until it is there."""
    it.keep(job, source(attempt), {}, {0: fetched(shard, *NAMES)})
    wait_for("it is written", lambda: not it._fillings, deadline_s=DEADLINE_S)


def have(it: Caches, shard: IndexedShard, attempt: int) -> int:
    """How many of the shard's pieces can be had here."""
    image = memoryview(bytearray(len(DATA)))
    return len(it.of(JOB, source(attempt)).copy(0, pieces(shard, *NAMES), image))


def test_only_the_checkpoint_that_was_restored_last_is_kept(dirs: RankDirs, kept: Caches, shard: IndexedShard) -> None:
    keep(kept, shard, 3)
    keep(kept, shard, 3, job=JobName("other"))
    assert have(kept, shard, 3) == len(NAMES) and have(kept, shard, 4) == 0
    keep(kept, shard, 5)
    assert have(kept, shard, 5) == len(NAMES) and have(kept, shard, 3) == 0
    assert names(dirs) == ["000005"] and names(dirs, JobName("other")) == ["000003"]


def test_another_checkpoint_of_the_same_number_is_not_taken_for_it(kept: Caches, shard: IndexedShard) -> None:
    keep(kept, shard, 3)
    other = replace(source(3), manifest_digest="xxh3-128:" + "f" * 32)  # of a store that began anew
    assert not kept.of(JOB, other).has(0)


def test_it_goes_when_the_job_can_start_from_a_newer_one_or_leaves(
    dirs: RankDirs, kept: Caches, shard: IndexedShard
) -> None:
    keep(kept, shard, 3)
    for older in (0, 2, 3):
        kept.outdate(JOB, older)
    keep(kept, shard, 1, job=JobName("other"))  # by the same thread: what was asked of it before is done
    assert names(dirs) == ["000003"]
    kept.outdate(JOB, 4)
    wait_for("the older one is gone", lambda: not names(dirs), deadline_s=DEADLINE_S)
    keep(kept, shard, 4)
    kept.remove(JOB)
    wait_for("all of it is gone", lambda: not dirs.cache(JOB).exists(), deadline_s=DEADLINE_S)


def test_it_outlives_its_agent_and_the_next_one_sweeps_what_it_does_not_know(
    dirs: RankDirs, shard: IndexedShard
) -> None:
    first = Caches(dirs)
    keep(first, shard, 3)
    keep(first, shard, 3, job=JobName("stranger"))
    first.close()
    dirs.sweep([(JOB, Generation(1))])
    second = Caches(dirs)
    assert have(second, shard, 3) == len(NAMES)
    assert not dirs.cache(JobName("stranger")).exists()
    second.close()


def test_a_disk_without_room_is_left_alone(
    dirs: RankDirs,
    kept: Caches,
    shard: IndexedShard,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(caches, "RESERVE_BYTES", 1 << 60)
    keep(kept, shard, 3)
    assert have(kept, shard, 3) == 0
    assert "would be too much" in caplog.text
    assert not list(dirs.cache(JOB).rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_costs_a_line_in_the_log(
    dirs: RankDirs, kept: Caches, shard: IndexedShard, caplog: pytest.LogCaptureFixture
) -> None:
    dirs.cache(JOB).parent.parent.mkdir()
    dirs.cache(JOB).parent.write_text("a file is in the way")
    keep(kept, shard, 3)
    assert have(kept, shard, 3) == 0
    assert "is not kept on this node" in caplog.text


@pytest.fixture
def dawdling(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that writes nothing until this is set."""
    go, real = threading.Event(), cache_files._write

    def write(file: int, data: memoryview, offset: int) -> None:
        go.wait(DEADLINE_S)
        real(file, data, offset)

    monkeypatch.setattr(cache_files, "_write", write)
    yield go
    go.set()


def test_what_is_on_its_way_to_the_disk_can_be_had_already(
    kept: Caches, shard: IndexedShard, dawdling: threading.Event
) -> None:
    kept.keep(JOB, source(3), {}, {0: fetched(shard, *NAMES)})
    of = kept.of(JOB, source(3))
    assert of.has(0) and not of.part(0).spans
    assert have(kept, shard, 3) == len(NAMES)
    dawdling.set()
    wait_for("it is written", lambda: not kept._fillings, deadline_s=DEADLINE_S)
    image = memoryview(bytearray(len(DATA)))
    assert len(of.copy(0, pieces(shard, *NAMES), image)) == len(NAMES), "also for who asked before"


def test_memory_that_is_needed_is_let_go(
    dirs: RankDirs, shard: IndexedShard, dawdling: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_files, "PART_BYTES", 4096)
    it = Caches(dirs, lambda _: Free(size_bytes=1000, where="this test"))
    it.keep(JOB, source(3), {}, {0: fetched(shard, *NAMES)})
    it.keep(JOB, source(3), {}, {1: fetched(shard, *NAMES)})
    it.make_room(1000)
    assert all(not filling.stop.is_set() for filling in it._fillings), "there is as much"
    (first, second) = it._fillings
    asking = threading.Thread(target=it.make_room, args=(1001,))
    asking.start()
    wait_for("it is told to stop", lambda: first.stop.is_set() and second.stop.is_set(), deadline_s=DEADLINE_S)
    dawdling.set()
    asking.join(DEADLINE_S)
    assert not asking.is_alive() and not it._fillings and not first.shards and not second.shards
    part = it.of(JOB, source(3)).part(0)
    assert sum(end - begin for begin, end in part.spans) <= 4096, "at most the part that was being written"
    assert not it.of(JOB, source(3)).has(1)
    it.close()
