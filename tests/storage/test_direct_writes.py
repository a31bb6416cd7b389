"""Writing past the page cache: what goes this way, and that the rest follows in the other."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.storage import direct_writes
from dtrain.storage.direct_writes import BLOCK_BYTES, write_direct
from dtrain.storage.local import LocalFolder
from dtrain.storage.objects import StorageFull
from dtrain.storage.parts import FileParts

CHUNK_BYTES = 4 * BLOCK_BYTES
SIZE_BYTES = 3 * CHUNK_BYTES + BLOCK_BYTES + 77


class Counting:
    """A meter that knows what was let go, and what was sent."""

    def __init__(self) -> None:
        self.let_go_bytes = self.sent_bytes = 0

    def before(self, count_bytes: int) -> None:
        self.let_go_bytes += count_bytes

    def moved(self, count_bytes: int) -> None:
        self.sent_bytes += count_bytes


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileParts]:
    """A file of which every byte has its place, mapped, as a stage slot is."""
    monkeypatch.setattr(direct_writes, "CHUNK_BYTES", CHUNK_BYTES)
    (tmp_path / "slot").write_bytes(os.urandom(SIZE_BYTES))
    with (tmp_path / "slot").open("rb") as file:
        page = mmap.mmap(file.fileno(), SIZE_BYTES, prot=mmap.PROT_READ)
        yield FileParts(file=file.fileno(), ranges=((0, SIZE_BYTES),), memory=memoryview(page))


def can_write_direct(folder: Path) -> bool:
    """Whether the file system of the tests does it at all."""
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("size_bytes", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, CHUNK_BYTES, SIZE_BYTES])
@pytest.mark.parametrize("begin", [0, BLOCK_BYTES])
def test_an_object_of_any_size_is_what_lay_in_memory(
    begin: int, size_bytes: int, staged: FileParts, tmp_path: Path
) -> None:
    assert staged.memory is not None
    store, meter, end = LocalFolder(tmp_path / "store"), Counting(), min(begin + size_bytes, SIZE_BYTES)
    for head in (b"", b"head", bytes(BLOCK_BYTES)):
        parts = FileParts(file=staged.file, ranges=((begin, end), (5, 9)), head=head, memory=staged.memory)
        store.put_file("blob", parts, meter=meter)
        assert store.get("blob") == head + staged.memory[begin:end] + staged.memory[5:9]
    assert meter.let_go_bytes == meter.sent_bytes == 3 * (end - begin + 4) + BLOCK_BYTES + 4


def test_whole_blocks_go_past_the_cache_and_only_to_a_whole_place(staged: FileParts, tmp_path: Path) -> None:
    assert staged.memory is not None
    can = can_write_direct(tmp_path)
    with (tmp_path / "file").open("wb") as file:
        assert write_direct(file.fileno(), staged.memory, 100, Counting()) == 0
        assert write_direct(file.fileno(), staged.memory, 0, Counting()) == (SIZE_BYTES - 77 if can else 0)
        assert not fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT, "what is written next may be of any size"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize("after", [0, 2])
def test_where_the_file_system_cannot_the_rest_goes_the_other_way(
    after: int, code: int, staged: FileParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = os.pwrite, []

    def refusing(descriptor: int, data: memoryview, position: int) -> int:
        tries.append(position)
        if len(tries) > after:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", refusing)
    store = LocalFolder(tmp_path / "store")
    store.put_file("blob", staged)
    assert store.get("blob") == staged.memory
    assert tries in ([], [CHUNK_BYTES * n for n in range(after + 1)]), "refused once is enough"


def test_a_write_that_stops_within_a_block_is_finished_the_other_way(
    staged: FileParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def short(descriptor: int, data: memoryview, position: int) -> int:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return real(descriptor, data[: BLOCK_BYTES + 100], position)

    monkeypatch.setattr(os, "pwrite", short)
    store = LocalFolder(tmp_path / "store")
    store.put_file("blob", staged)
    assert store.get("blob") == staged.memory


def test_a_full_disk_is_said_and_leaves_no_object(
    staged: FileParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "sendfile", full)
    store = LocalFolder(tmp_path / "store")
    with pytest.raises(StorageFull):
        store.put_file("blob", staged)
    assert store.head("blob") is None and not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
