"""What lies on a node's disk of a checkpoint: what is there is found, and nothing of it is believed."""

import mmap
import threading
from pathlib import Path

import pytest

from dtrain.common.digests import blob_digest
from dtrain.storage.indexes import IndexedShard, Piece, index_shard, open_index
from dtrain.storage.ranges import covers, joined_spans
from dtrain.worker import cache_files
from dtrain.worker.cache_files import RECORD_FILE, CacheFolder, Fetched, attempt_of
from tests.support.checkpoints import shard_of

PARTS = {"a": b"a" * 5000, "b": b"b" * 7000, "c": b"c" * 3000}
DATA = shard_of(b"payload" * 100, rank=0, world_size=1, step=5, beside=PARTS)
NAMES = ("a", "b", "c", "payload.0")
GO_ON = threading.Event()


@pytest.fixture
def shard() -> IndexedShard:
    index, _ = index_shard(memoryview(DATA))
    return open_index(index, key="index", shard_key="shard")


def pieces(shard: IndexedShard, *names: str) -> frozenset[Piece]:
    return frozenset(piece for name in names for piece in shard.pieces(name, 0, 1 << 40))


def fetched(shard: IndexedShard, *names: str) -> Fetched:
    """An image in which only these tensors are there."""
    page = mmap.mmap(-1, len(DATA))
    for piece in pieces(shard, *names):
        page[piece.begin : piece.end] = DATA[piece.begin : piece.end]
    return Fetched(page=page, pieces=pieces(shard, *names))


def filled(tmp_path: Path, shard: IndexedShard, *names: str) -> CacheFolder:
    folder = CacheFolder(tmp_path / "000001-00")
    folder.put_texts({})
    folder.put(0, fetched(shard, *names), GO_ON)
    return folder


def found(folder: CacheFolder, shard: IndexedShard, *names: str) -> set[str]:
    """The tensors of these that are sound here; checks that their bytes are where they belong."""
    image = memoryview(bytearray(len(DATA)))
    sound = folder.copy(0, pieces(shard, *(names or NAMES)), image)
    assert all(image[piece.begin : piece.end] == DATA[piece.begin : piece.end] for piece in sound)
    return {piece.tensor for piece in sound}


def test_what_was_put_is_found_and_holes_are_not_read(tmp_path: Path, shard: IndexedShard) -> None:
    folder = filled(tmp_path, shard, "a", "c")
    assert found(folder, shard) == {"a", "c"}
    part = folder.part(0)
    assert [part.holds(piece) for name in NAMES for piece in pieces(shard, name)] == [True, False, True, False]
    folder.put(0, fetched(shard, "b", "payload.0"), GO_ON)
    assert found(folder, shard) == set(NAMES)
    assert len(folder.part(0).spans) == 1, "ranges that touch are one"
    assert folder.part(1).spans == [] and not folder.copy(1, pieces(shard, "a"), memoryview(bytearray(len(DATA))))


def test_damaged_bytes_are_as_if_they_were_not_there_until_they_are_put_again(
    tmp_path: Path, shard: IndexedShard
) -> None:
    folder = filled(tmp_path, shard, *NAMES)
    (piece,) = pieces(shard, "b")
    with Path(folder.part(0).path).open("r+b") as file:
        file.seek(piece.begin + 100)
        file.write(b"x")
    assert found(folder, shard) == {"a", "c", "payload.0"}
    folder.put(0, fetched(shard, "b"), GO_ON)
    assert found(folder, shard) == set(NAMES)


@pytest.mark.parametrize("record", [b"", b"[[0,", b'{"a": 1}', b"[[9000, 1], [-5, 3], [0, 99999999]]"])
def test_a_record_that_is_wrong_costs_a_fetch_and_nothing_else(
    record: bytes, tmp_path: Path, shard: IndexedShard
) -> None:
    folder = filled(tmp_path, shard, *NAMES)
    (folder.path / RECORD_FILE.format(0)).write_bytes(record)
    found(folder, shard)
    Path(folder.part(0).path).write_bytes(DATA[:100])  # and the file is cut short
    assert found(folder, shard) == set()
    Path(folder.part(0).path).unlink()
    assert found(folder, shard) == set()


def test_a_writer_that_is_stopped_keeps_what_it_wrote_by_then(
    tmp_path: Path, shard: IndexedShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_files, "PART_BYTES", 4000)
    stop = threading.Event()
    written: list[int] = []

    def write(file: int, data: memoryview, offset: int) -> None:
        real(file, data, offset)
        written.append(len(data))
        if sum(written) >= 3 * 4000:  # all of a and b
            stop.set()

    real = cache_files._write
    monkeypatch.setattr(cache_files, "_write", write)
    folder = CacheFolder(tmp_path)
    folder.put(0, fetched(shard, *NAMES), stop)
    assert written == [4000] * 3
    assert found(folder, shard) == {"a", "b"}


def test_a_manifest_counts_only_with_the_digest_that_is_asked_for(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / "new")
    assert folder.text("manifest.json", blob_digest(b"text")) is None
    folder.put_texts({"manifest.json": b"text"})
    assert folder.text("manifest.json", blob_digest(b"text")) == b"text"
    assert folder.text("manifest.json", blob_digest(b"other")) is None


def test_room_is_counted_for_what_is_not_there_yet(tmp_path: Path, shard: IndexedShard) -> None:
    folder = filled(tmp_path, shard, "a")
    assert folder.missing_bytes({0: fetched(shard, "a", "b")}) == len(PARTS["b"])
    assert folder.missing_bytes({1: fetched(shard, "a", "b")}) == len(PARTS["a"]) + len(PARTS["b"])


def test_spans_are_joined_where_they_touch_and_cover_only_what_they_hold() -> None:
    spans = joined_spans([(30, 40), (0, 10), (10, 20), (15, 18)])
    assert spans == [(0, 20), (30, 40)]
    inside = {(begin, end) for begin in range(45) for end in range(begin + 1, 46) if covers(spans, begin, end)}
    assert inside == {(b, e) for low, high in spans for b in range(low, high) for e in range(b + 1, high + 1)}


def test_the_attempt_is_read_from_the_folders_name() -> None:
    assert attempt_of("000012-ab34") == 12
    assert [attempt_of(name) for name in ("", "x-1", "²-1", "-5")] == [0, 0, 0, 0]
