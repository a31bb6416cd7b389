"""What every store does, whatever it is made of."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dtrain.common.errors import ShardDamagedError
from dtrain.storage.keys import InvalidKey
from dtrain.storage.objects import AlreadyExists, NotFound, ObjectInfo, ObjectStore, StorageUnavailable
from dtrain.storage.parts import FileParts
from dtrain.storage.uris import probe

WRITERS = 12
BAD_KEYS = ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/", ".", "a/.", "a\\b", "a\x00b", "a\nb", "k" * 1025]


def test_gives_back_what_was_put(store: ObjectStore) -> None:
    data = os.urandom(100_000)
    store.put("jobs/a/blob", data)
    assert store.get("jobs/a/blob") == data


def test_takes_a_view_of_writable_memory(store: ObjectStore) -> None:
    data = bytearray(os.urandom(3_000_000))
    store.put("blob", memoryview(data)[5:-5])
    assert store.get("blob") == data[5:-5]


@pytest.mark.parametrize("size_bytes", [0, 1, 3_000_000])
def test_takes_the_beginning_of_an_open_file(store: ObjectStore, tmp_path: Path, size_bytes: int) -> None:
    data = os.urandom(3_000_100)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        file.seek(77)  # where the descriptor stands plays no part
        for _ in range(2):  # again, as after a lost answer
            store.put_file("blob", FileParts(file=file.fileno(), ranges=((0, size_bytes),)))
        assert file.tell() == 77
    assert store.get("blob") == data[:size_bytes]


def test_joins_a_head_and_ranges_of_an_open_file(store: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(12_000_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        ranges = ((5, 5), (4_000_001, 11_000_000), (100, 101), (7, 3_000_000))
        store.put_file("blob", FileParts(file=file.fileno(), ranges=ranges, head=b"head"))
        store.put_file("head", FileParts(file=file.fileno(), ranges=(), head=b"head"))
    assert store.get("blob") == b"head" + data[4_000_001:11_000_000] + data[100:101] + data[7:3_000_000]
    assert store.get("head") == b"head"


def test_keeps_an_empty_object(store: ObjectStore) -> None:
    store.put("empty", b"")
    store.read_into("empty", memoryview(bytearray()))
    assert store.get("empty") == b""
    assert store.head("empty") == ObjectInfo(key="empty", size_bytes=0)


def test_a_second_put_replaces_the_whole_object(store: ObjectStore) -> None:
    store.put("blob", b"the first and longer one")
    store.put("blob", b"second")
    assert store.get("blob") == b"second"


def test_a_create_only_put_keeps_what_is_there(store: ObjectStore) -> None:
    store.put("blob", b"first", if_absent=True)
    with pytest.raises(AlreadyExists):
        store.put("blob", b"second", if_absent=True)
    assert store.get("blob") == b"first"


def test_of_many_create_only_writers_exactly_one_wins(store: ObjectStore) -> None:
    start = threading.Barrier(WRITERS)

    def write(number: int) -> bool:
        start.wait(timeout=60)
        try:
            store.put("prize", b"writer %d" % number, if_absent=True)
        except AlreadyExists:
            return False
        return True

    store.put("warm-up", b"", if_absent=True)  # the server's abilities are tried out before the race
    with ThreadPoolExecutor(WRITERS) as pool:
        won = list(pool.map(write, range(WRITERS)))
    assert won.count(True) == 1
    assert store.get("prize") == b"writer %d" % won.index(True)


def test_reads_any_part_into_a_buffer(store: ObjectStore) -> None:
    data = os.urandom(50_000)
    store.put("blob", data)
    target = bytearray(1_000)
    for offset in (0, 1, 20_000, 49_000):
        store.read_into("blob", memoryview(target), offset=offset)
        assert target == data[offset : offset + 1_000]


def test_a_buffer_that_the_object_cannot_fill_is_an_error_that_names_it(store: ObjectStore) -> None:
    store.put("blob", bytes(100))
    for size, offset in ((101, 0), (50, 51), (1, 100), (1, 1_000)):
        with pytest.raises(ShardDamagedError, match="blob") as caught:
            store.read_into("blob", memoryview(bytearray(size)), offset=offset)
        assert caught.value.key == "blob"


def test_an_absent_object_is_not_found(store: ObjectStore) -> None:
    store.put("present/one", b"x")
    assert store.head("absent") is None
    assert store.head("present") is None
    assert store.head("present/two") is None
    for key in ("absent", "present/two"):
        with pytest.raises(NotFound):
            store.get(key)
        with pytest.raises(NotFound):
            store.read_into(key, memoryview(bytearray(1)))
        with pytest.raises(NotFound):
            store.read_into(key, memoryview(bytearray()))


def test_lists_by_the_order_of_keys_whatever_part_of_one_is_given(store: ObjectStore) -> None:
    sizes = {"a-b": 1, "a/b-c/x": 2, "a/b/c": 3, "a/b/d": 4, "a0": 5, "b": 6, "é/ü": 7}
    for key, size in reversed(sizes.items()):
        store.put(key, bytes(size))
    for prefix in ("", "a", "a/", "a/b", "a/b/", "a/b/c", "a-", "é", "c", "a/b/c/d", "none/such/"):
        expected = [(key, size) for key, size in sizes.items() if key.startswith(prefix)]
        assert [(info.key, info.size_bytes) for info in store.list(prefix)] == expected, prefix


def test_lists_more_than_one_page(store: ObjectStore) -> None:
    keys = [f"many/{number:05d}" for number in range(1_050)]  # S3 gives 1,000 at a time
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), keys))
    assert [info.key for info in store.list("many/")] == keys


def test_a_deleted_object_is_gone_and_deleting_again_is_fine(store: ObjectStore) -> None:
    store.put("a/b", b"x")
    store.put("a/c", b"y")
    for _ in range(2):
        store.delete("a/b")
    store.delete("never/was")
    assert [info.key for info in store.list("")] == ["a/c"]


def test_refuses_a_bad_key_everywhere(store: ObjectStore) -> None:
    calls: list[Callable[[str], object]] = [
        lambda key: store.put(key, b""),
        lambda key: store.get(key),
        lambda key: store.read_into(key, memoryview(bytearray(1))),
        lambda key: store.head(key),
        lambda key: store.delete(key),
    ]
    for key in BAD_KEYS:
        for call in calls:
            with pytest.raises(InvalidKey):
                call(key)


def test_refuses_to_list_outside_of_itself(store: ObjectStore) -> None:
    for prefix in ("../", "/", "a/../..", "a/..", "a//"):
        with pytest.raises(InvalidKey):
            list(store.list(prefix))


def test_a_probe_leaves_nothing_behind(store: ObjectStore) -> None:
    probe(store)
    assert list(store.list("")) == []


def test_the_meter_of_an_upload_is_asked_for_every_byte_and_told_of_it(store: ObjectStore, tmp_path: Path) -> None:
    asked, told = [], []

    class Recording:
        def before(self, count_bytes: int) -> None:
            asked.append(count_bytes)

        def moved(self, count_bytes: int) -> None:
            told.append(count_bytes)

    data = os.urandom(20_000_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        store.put_file("blob", FileParts(file=file.fileno(), ranges=((0, len(data)),)), meter=Recording())
    assert sum(asked) == sum(told) == len(data)
    assert store.get("blob") == data


def test_an_upload_ends_by_what_its_meter_raises_and_leaves_no_object(store: ObjectStore, tmp_path: Path) -> None:
    class Refusing:
        def before(self, count_bytes: int) -> None:
            raise StorageUnavailable("not now")

        def moved(self, count_bytes: int) -> None:
            raise AssertionError("nothing was sent")

    (tmp_path / "file").write_bytes(b"data")
    with (tmp_path / "file").open("rb") as file, pytest.raises(StorageUnavailable, match="not now"):
        store.put_file("blob", FileParts(file=file.fileno(), ranges=((0, 4),)), meter=Refusing())
    assert store.head("blob") is None


def test_abandoning_a_prefix_takes_no_object_away(store: ObjectStore) -> None:
    store.put("jobs/a/blob", b"x")
    for prefix in ("", "jobs/", "jobs/a/", "jobs/a/b", "jobs/none/"):
        store.abandon(prefix)
    assert store.get("jobs/a/blob") == b"x"
