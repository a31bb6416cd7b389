"""A folder as an object store: the embedded default, and any file system that all nodes share.

A file system promises little by itself: a written file may be lost or torn by a crash, a rename may be lost,
and a link in the path may lead anywhere. So:

- bytes go to a temporary file in the object's own directory and are flushed (fsync) before they get their
  name: by ``link()`` for create-only, which fails if the name exists, by ``rename()`` otherwise; then the
  directory is flushed, and all above it once. A reader sees the whole object or none.
- the path is walked part by part with O_NOFOLLOW, each directory opened relative to the one before. A
  symbolic link below the root is refused, also one that appears meanwhile.
- temporary names start with ``.dtrain-tmp-``, which no key may use and no listing shows. Their writer holds a
  lock on them; whoever next writes to the directory removes those whose writer is gone.

The root may itself be, or lie behind, a symbolic link: that is the operator's choice.
"""

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.common.errors import DtrainError, ShardDamagedError
from dtrain.storage.durable import DIRECTORY, NoHardLinks, closing, flush, flush_path, place, place_file, sweep
from dtrain.storage.keys import RESERVED_PART, validate_key, validate_prefix
from dtrain.storage.metering import UNMETERED, Meter
from dtrain.storage.objects import (
    AlreadyExists,
    NotFound,
    ObjectInfo,
    StorageFull,
    StorageRefused,
    StorageUnavailable,
)
from dtrain.storage.parts import FileParts

READ_BYTES = 8 * 1024 * 1024  # read at a time: a bound on how long one call holds on
PREPARED_MAX = 4096  # directories remembered as flushed and swept; forgetting one costs only time
MAKE_PARENTS_TRIES = 3  # a directory may be removed between its making and its opening, but not for ever

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV}
_MISPLACED = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMLINK}  # O_NOFOLLOW met a link; a file where a folder is


class _ObjectInTheWay(NotADirectoryError):
    """A part of the path is an object: nothing can be below it, so a reader finds nothing there."""


class LocalFolder:
    """The objects below one directory, which is made at the first put. See the port for what each call does."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._prepared: set[str] = set()  # directories that are durable and swept, as key prefixes
        self._lock = threading.Lock()  # guards _prepared

    @property
    def root(self) -> Path:
        """The directory, absolute."""
        return self._root

    @property
    def uri(self) -> str:
        return self._root.as_uri()

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> None:
        with self._prepared_place(key) as (directory, name):
            place(directory, name, memoryview(data).cast("B"), if_absent=if_absent)

    def put_file(self, key: str, source: FileParts, *, meter: Meter = UNMETERED) -> None:
        with self._prepared_place(key) as (directory, name):
            place_file(directory, name, source, meter)

    def abandon(self, prefix: str) -> None:
        *folders, start = validate_prefix(prefix).split("/")
        with _translated(prefix, self._root):
            try:
                directory = self._open(folders)
            except (FileNotFoundError, _ObjectInTheWay):
                return
            with closing(directory):
                if not start:
                    sweep(directory)
                _sweep_folders(directory, start)

    def get(self, key: str) -> bytes:
        with _translated(key, self._root), self._opened(key) as descriptor:
            parts = []
            while part := os.read(descriptor, READ_BYTES):
                parts.append(part)
            return b"".join(parts)

    def read_into(self, key: str, target: memoryview, *, offset: int = 0) -> None:
        rest = target.cast("B")
        wanted = len(rest)
        with _translated(key, self._root), self._opened(key) as descriptor:
            size_bytes = os.fstat(descriptor).st_size
            if offset + wanted > size_bytes:
                raise ShardDamagedError(key, f"has {size_bytes} bytes, too few for {wanted} from {offset} on")
            while rest:
                count = os.preadv(descriptor, [rest[:READ_BYTES]], offset)
                if count == 0:
                    raise ShardDamagedError(key, f"ends at {offset}, before what it held when it was opened")
                rest = rest[count:]
                offset += count

    def local_path(self, key: str) -> Path | None:
        return self._root / validate_key(key)

    def head(self, key: str) -> ObjectInfo | None:
        with _translated(key, self._root):
            try:
                with self._opened(key) as descriptor:
                    return ObjectInfo(key=key, size_bytes=os.fstat(descriptor).st_size)
            except (FileNotFoundError, _ObjectInTheWay):
                return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        *folders, start = validate_prefix(prefix).split("/")
        with _translated(prefix, self._root):
            try:
                directory = self._open(folders)
            except (FileNotFoundError, _ObjectInTheWay):
                return
        try:
            yield from _walk(directory, "".join(part + "/" for part in folders), start, self._root)
        finally:
            os.close(directory)

    def delete(self, key: str) -> None:
        *folders, name = validate_key(key).split("/")
        with _translated(key, self._root):
            try:
                directory = self._open(folders)
            except (FileNotFoundError, _ObjectInTheWay):
                return
            try:
                # Absent may mean that an earlier try removed it and died: flush all the same.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
                flush(directory)
            finally:
                os.close(directory)

    @contextlib.contextmanager
    def _prepared_place(self, key: str) -> Iterator[tuple[int, str]]:
        """Yield (directory, name) for a put: the directory is open, durable and swept."""
        *folders, name = validate_key(key).split("/")
        with _translated(key, self._root, putting=True), closing(self._open_made(folders)) as directory:
            self._prepare("/".join(folders), directory)
            yield directory, name

    def _open(self, folders: Sequence[str]) -> int:
        """Return a descriptor of the directory; links below the root are refused by the kernel."""
        descriptor = os.open(self._root, DIRECTORY)
        for part in folders:
            try:
                inner = os.open(part, DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            except NotADirectoryError as error:
                if stat.S_ISREG(os.stat(part, dir_fd=descriptor, follow_symlinks=False).st_mode):
                    raise _ObjectInTheWay(*error.args) from error
                raise  # a symbolic link, by Linux's word for it
            finally:
                os.close(descriptor)
            descriptor = inner
        return descriptor

    def _open_made(self, folders: Sequence[str]) -> int:
        """Like :meth:`_open`, making what is missing; what is made is flushed in :meth:`_prepare`."""
        for _ in range(MAKE_PARENTS_TRIES):
            try:
                return self._open(folders)
            except FileNotFoundError:
                self._make(folders)
            except _ObjectInTheWay as error:
                key = "/".join(folders)
                raise StorageRefused(f"{key} in {self._root} is, or lies below, an object: use another key.") from error
        return self._open(folders)

    def _make(self, folders: Sequence[str]) -> None:
        with self._lock:
            self._prepared.clear()  # directories have gone or come: flush them again
        for folder in [*reversed(self._root.parents), self._root]:
            if not folder.is_dir():
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                flush_path(folder.parent)
        for depth, part in enumerate(folders):
            with closing(self._open(folders[:depth])) as parent, contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=parent)

    def _prepare(self, folder: str, directory: int) -> None:
        """Once for each directory: make its own entry durable, whoever made it, and sweep what crashes left."""
        with self._lock:
            if folder in self._prepared:
                return
        folders = folder.split("/") if folder else []
        for depth in range(len(folders)):
            with closing(self._open(folders[:depth])) as parent:
                flush(parent)
        sweep(directory)
        with self._lock:
            if len(self._prepared) >= PREPARED_MAX:
                self._prepared.clear()
            self._prepared.add(folder)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """Open the object for reading; raise FileNotFoundError if there is none."""
        *folders, name = validate_key(key).split("/")
        with closing(self._open(folders)) as directory:
            # O_NONBLOCK: opening a named pipe that somebody put there must not hang.
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
        with closing(descriptor):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a regular file", key)
            yield descriptor


def _walk(directory: int, prefix: str, start: str, root: Path) -> Iterator[ObjectInfo]:
    """Yield the objects below ``directory`` whose first part starts with ``start``, by the order of keys.

    A directory sorts as its name with a slash, which is where its keys belong: ``a-b`` comes before ``a/b``.
    """
    found: list[tuple[bytes, str, int | None]] = []  # sort key, name, size (None: a directory)
    with _translated(prefix, root), os.scandir(directory) as entries:
        for entry in entries:
            if not entry.name.startswith(start) or entry.name.startswith(RESERVED_PART):
                continue
            if entry.is_dir(follow_symlinks=False):
                found.append((os.fsencode(entry.name) + b"/", entry.name, None))
            elif entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    size_bytes = os.stat(entry.name, dir_fd=directory, follow_symlinks=False).st_size
                    found.append((os.fsencode(entry.name), entry.name, size_bytes))
    for _, name, size in sorted(found):
        if size is not None:
            yield ObjectInfo(key=prefix + name, size_bytes=size)
            continue
        with _translated(prefix + name, root):
            try:
                inner = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            except FileNotFoundError:
                continue
        with closing(inner):
            yield from _walk(inner, f"{prefix}{name}/", "", root)


def _sweep_folders(directory: int, start: str) -> None:
    """Sweep all folders below the directory, at its own level only those whose names start with ``start``."""
    for name in os.listdir(directory):
        if not name.startswith(start):
            continue
        try:
            inner = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
        except OSError:  # an object, a link, or removed meanwhile: nothing of ours lies below it
            continue
        with closing(inner):
            sweep(inner)
            _sweep_folders(inner, "")


@contextlib.contextmanager
def _translated(key: str, root: Path, *, putting: bool = False) -> Iterator[None]:
    """Turn the operating system's errors into the port's."""
    try:
        yield
    except DtrainError:
        raise
    except (FileNotFoundError, _ObjectInTheWay) as error:
        if putting:  # somebody removes folders under our feet
            raise StorageUnavailable(f"a folder in {root} vanished while {key} was put there") from error
        raise NotFound(f"{key} is not in {root}") from error
    except FileExistsError as error:
        raise AlreadyExists(f"{key} is already in {root}") from error
    except NoHardLinks as error:
        raise StorageRefused(
            f"the file system of {root} has no hard links, without which two coordinators could commit the same "
            "checkpoint twice: name a folder on another."
        ) from error
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL:
            raise StorageFull(f"no room in {root} for {key}: {why}") from error
        if error.errno in _MISPLACED:
            raise StorageRefused(
                f"{key} in {root} passes through something that is not a plain folder or file ({why}): "
                "remove the symbolic link or file in its way, or name another folder."
            ) from error
        if error.errno in _REFUSED:
            raise StorageRefused(
                f"folder {root} does not allow this for {key} ({why}): "
                "let the user that runs dtrain write there, or name another folder."
            ) from error
        raise StorageUnavailable(f"{root} cannot be used for {key}: {why}") from error
