"""A folder keeps whole objects only, whatever happens to the writer, the disk or the path."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from dtrain.common.errors import UserError
from dtrain.storage import durable
from dtrain.storage.durable import TEMPORARY
from dtrain.storage.local import LocalFolder
from dtrain.storage.objects import NotFound, StorageRefused, StorageUnavailable
from dtrain.storage.parts import FileParts
from dtrain.storage.uris import probe

# Stops for ever at a chosen call within a put, after saying so; the test kills it there.
HALTING_WRITER = """
import sys
from pathlib import Path
from dtrain.storage import durable, local
root, where, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
original = getattr(durable, where)
def halt(*args):
    global calls
    calls -= 1
    if calls == 0:
        print("halted", flush=True)
        sys.stdin.read()
    return original(*args)
store = local.LocalFolder(Path(root))
store.put("a/before", b"x")
setattr(durable, where, halt)
store.put("a/blob", bytes(40 * 1024 * 1024), if_absent=len(sys.argv) > 4)
"""

# A file-size limit is what an ordinary user can set; the system's answer is as of a full disk: the write fails.
LIMITED_WRITER = """
import os, resource, sys
from pathlib import Path
from dtrain.storage.local import LocalFolder
from dtrain.storage.objects import StorageFull
if sys.argv[2] == "late":
    del os.posix_fallocate
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store = LocalFolder(Path(sys.argv[1]))
try:
    store.put("a/blob", bytes(4 << 20))
except StorageFull as error:
    print("full:", error)
store.put("a/blob", b"a small one fits")
"""


@contextmanager
def halted_writer(root: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HALTING_WRITER, str(root), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "halted\n"
            yield writer
        finally:
            writer.kill()


def temporaries(root: Path) -> list[Path]:
    return list(root.rglob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("create_only", [(), ("create-only",)], ids=["replace", "create-only"])
@pytest.mark.parametrize(("where", "calls"), [("_start_writeback", "1"), ("_start_writeback", "3"), ("flush", "1")])
def test_a_writer_killed_in_mid_put_leaves_nothing_to_be_seen(
    tmp_path: Path, where: str, calls: str, create_only: tuple[str, ...]
) -> None:
    with halted_writer(tmp_path, where, calls, *create_only) as writer:
        assert temporaries(tmp_path)  # it was in the middle indeed
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=60)
    store = LocalFolder(tmp_path)
    assert [info.key for info in store.list("")] == ["a/before"]
    assert store.head("a/blob") is None
    store.put("a/blob", b"the next one", if_absent=True)
    assert store.get("a/blob") == b"the next one"
    assert temporaries(tmp_path) == []  # the next writer swept up


def test_a_living_writer_is_not_swept_away(tmp_path: Path) -> None:
    with halted_writer(tmp_path, "flush", "1") as writer:
        LocalFolder(tmp_path).put("a/other", b"y")
        assert len(temporaries(tmp_path)) == 1
        writer.communicate("", timeout=60)
        assert writer.returncode == 0
    assert [info.key for info in LocalFolder(tmp_path).list("")] == ["a/before", "a/blob", "a/other"]


def test_abandoning_a_prefix_removes_what_killed_writers_left_below_it_and_nothing_of_living_ones(
    tmp_path: Path,
) -> None:
    for root in ("1", "1/deeper", "2"):
        with halted_writer(tmp_path / root, "flush", "1") as writer:
            writer.send_signal(signal.SIGKILL)
    with halted_writer(tmp_path / "1/living", "flush", "1") as writer:
        store = LocalFolder(tmp_path)
        store.abandon("1/")
        assert {path.parent for path in temporaries(tmp_path)} == {tmp_path / "1/living/a", tmp_path / "2/a"}
        writer.communicate("", timeout=60)
        assert writer.returncode == 0
    store.abandon("2/a/b")
    assert len(temporaries(tmp_path)) == 1, "that is no folder's beginning"
    store.abandon("2/a")
    assert temporaries(tmp_path) == []
    assert store.head("1/living/a/blob") is not None


def test_many_stores_that_begin_in_one_folder_do_not_sweep_each_other_away(tmp_path: Path) -> None:
    keys = [f"a/{number}" for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: LocalFolder(tmp_path).put(key, b"x"), keys))
    assert [info.key for info in LocalFolder(tmp_path).list("")] == sorted(keys)
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("when", ["early", "late"])
def test_no_room_is_said_and_leaves_nothing_behind(tmp_path: Path, when: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED_WRITER, str(tmp_path), when], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"full: no room in {tmp_path} for a/blob")
    assert [(info.key, info.size_bytes) for info in LocalFolder(tmp_path).list("")] == [("a/blob", 16)]
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("if_absent", [False, True])
def test_bytes_are_flushed_before_they_get_their_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, if_absent: bool
) -> None:
    store = LocalFolder(tmp_path)
    store.put("a/first", b"x")
    happened: list[str] = []

    def record(module: object, name: str, word: str) -> None:
        original = getattr(module, name)

        def recording(*args: object, **kwargs: object) -> object:
            happened.append(word)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, recording)

    record(durable, "_write", "write")
    record(os, "fsync", "flush")
    record(os, "link", "name")
    record(os, "rename", "name")
    store.put("a/second", b"y", if_absent=if_absent)
    assert happened == ["write", "flush", "name", "flush"]


def test_every_new_folder_is_flushed_into_the_one_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    original = os.fsync

    def recording(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    root = tmp_path / "new" / "root"
    LocalFolder(root).put("a/b/blob", b"x")
    folders = [tmp_path, tmp_path / "new", root, root / "a", root / "a" / "b"]
    assert {folder.stat().st_ino for folder in folders} <= flushed


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: original(descriptor, bytes(data[:1000])))
    data = os.urandom(12_345)
    store = LocalFolder(tmp_path)
    store.put("blob", data)
    assert store.get("blob") == data


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    return folder


def test_a_symbolic_link_to_a_folder_leads_nowhere(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "root"
    (root / "jobs").mkdir(parents=True)
    (root / "jobs" / "link").symlink_to(outside)
    store = LocalFolder(root)
    for call in (
        lambda: store.put("jobs/link/secret", b"mine"),
        lambda: store.put("jobs/link/new/blob", b"mine"),
        lambda: store.get("jobs/link/secret"),
        lambda: store.head("jobs/link/secret"),
        lambda: store.delete("jobs/link/secret"),
        lambda: list(store.list("jobs/link/")),
    ):
        with pytest.raises(StorageRefused, match="symbolic link"):
            call()
    assert list(store.list("")) == []
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_symbolic_link_in_an_objects_place_is_not_followed(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "blob").symlink_to(outside / "secret")
    store = LocalFolder(root)
    with pytest.raises(StorageRefused):
        store.get("blob")
    store.put("blob", b"mine")
    assert store.get("blob") == b"mine"
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_root_behind_a_symbolic_link_is_the_operators_choice(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "root").symlink_to(outside)
    store = LocalFolder(tmp_path / "root")
    store.put("a/b", b"x")
    assert (outside / "a" / "b").read_bytes() == b"x"


def test_an_object_is_not_a_folder_of_others(tmp_path: Path) -> None:
    store = LocalFolder(tmp_path)
    store.put("a", b"x")
    store.put("b/c", b"x")
    with pytest.raises(StorageRefused):
        store.put("a/b", b"y")
    with pytest.raises(StorageRefused):
        store.put("b", b"y")
    assert temporaries(tmp_path) == []


def test_a_folder_removed_under_a_living_store_is_made_again(tmp_path: Path) -> None:
    store = LocalFolder(tmp_path / "root")
    store.put("a/b", b"x")
    shutil.rmtree(tmp_path / "root")
    with pytest.raises(NotFound):
        store.get("a/b")
    store.put("a/b", b"y")
    assert store.get("a/b") == b"y"


def test_a_named_pipe_in_an_objects_place_does_not_hang_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    store = LocalFolder(tmp_path)
    assert store.head("pipe") is None
    assert list(store.list("")) == []


def test_a_file_that_ends_too_early_leaves_no_object(tmp_path: Path) -> None:
    store = LocalFolder(tmp_path / "store")
    (tmp_path / "file").write_bytes(b"short")
    with (tmp_path / "file").open("rb") as file, pytest.raises(StorageUnavailable):
        store.put_file("a/blob", FileParts(file=file.fileno(), ranges=((0, 6),)))
    assert store.head("a/blob") is None
    assert not list((tmp_path / "store").rglob(f"{TEMPORARY}*"))


def test_a_file_system_that_knows_no_locks_takes_objects_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # Lustre, mounted with noflock

    monkeypatch.setattr(durable.fcntl, "flock", flock)
    store = LocalFolder(tmp_path)
    store.put("a/b", b"x")
    assert store.get("a/b") == b"x"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_hard_links_is_refused_before_a_job_counts_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable.os, "link", link)
    with pytest.raises(UserError, match="has no hard links"):
        probe(LocalFolder(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
