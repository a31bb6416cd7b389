"""Bytes into a directory so that they survive: written, flushed, and only then named.

The directory is an open descriptor, so that nobody can move it aside between two steps. A put goes

1. a temporary file, marked by a lock as a living writer's;
2. its bytes, past the page cache, or in chunks that the disk starts on while the next is copied; fsync;
3. its name: ``link()`` for create-only, which fails if the name exists, ``rename()`` otherwise;
4. fsync of the directory.

A writer killed before step 3 leaves a file that only :func:`sweep` cares about.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from dtrain.storage.direct_writes import BLOCK_BYTES, write_direct
from dtrain.storage.keys import RESERVED_PART
from dtrain.storage.metering import Meter
from dtrain.storage.parts import FileParts

CHUNK_BYTES = 8 * 1024 * 1024  # written at a time: the disk starts on one chunk while the next is copied
TEMPORARY = RESERVED_PART + "tmp-"  # no key may have such a part, and no listing shows it
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # flags for opening one

_NO_LOCK = {
    *(errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL),
    errno.EBADF,  # NFS, of what is open for reading only
    errno.ENOSYS,  # Lustre that is mounted with noflock
}
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}  # exFAT; many FUSE folders; some CIFS
_SYNC_FILE_RANGE_WRITE = 2  # start writing these pages out, do not wait


class NoHardLinks(OSError):
    """The file system has none, and without them it cannot be told which of two writers of a name came first."""


def place(directory: int, name: str, data: memoryview, *, if_absent: bool) -> None:
    """Write ``data`` beside its place, flush it, and only then give it its name."""
    _place(directory, name, len(data), lambda file: _write(file, data), if_absent=if_absent)


def place_file(directory: int, name: str, source: FileParts, meter: Meter) -> None:
    """Like :func:`place`, for parts of an open file: past the page cache where that goes, else within the kernel."""
    _place(directory, name, source.size_bytes, lambda file: _send_parts(file, source, meter), if_absent=False)


def _place(directory: int, name: str, size_bytes: int, fill: Callable[[int], None], *, if_absent: bool) -> None:
    if if_absent and _exists(directory, name):  # spares the writing; link() below decides
        flush(directory)
        raise FileExistsError(errno.EEXIST, "exists", name)
    temporary = TEMPORARY + secrets.token_hex(8)
    descriptor = _make_temporary(directory, temporary)
    named = False
    try:
        with closing(descriptor):
            _reserve(descriptor, size_bytes)
            fill(descriptor)
            flush(descriptor)
            if if_absent:
                try:
                    os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
                except FileExistsError:
                    flush(directory)  # whoever won: what we now call present is durable
                    raise
                except OSError as error:
                    if error.errno in _NO_LINKS:
                        raise NoHardLinks(error.errno, str(error)) from error
                    raise
            else:
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                named = True
    finally:
        if not named:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
    flush(directory)


def _make_temporary(directory: int, name: str) -> int:
    """Make the file and mark it as a living writer's, before any sweep can see it unmarked."""
    _lock(directory, fcntl.LOCK_SH)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(name, flags, 0o666, dir_fd=directory)
        _lock(descriptor, fcntl.LOCK_EX)
        return descriptor
    finally:
        _lock(directory, fcntl.LOCK_UN)


def _reserve(descriptor: int, size_bytes: int) -> None:
    if size_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)  # a full disk is noticed before anything is copied
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without it: writing will tell
                raise


def _send_parts(descriptor: int, source: FileParts, meter: Meter) -> None:
    position = len(source.head)
    meter.before(position)
    _write(descriptor, memoryview(source.head))
    meter.moved(position)
    for begin, end in source.ranges:
        done = 0
        if source.memory is not None and begin % BLOCK_BYTES == 0:
            done = write_direct(descriptor, source.memory[begin:end], position, meter)
        _send(descriptor, source.file, begin + done, end, position + done, meter)
        position += end - begin


def _send(descriptor: int, source: int, begin: int, end: int, position: int, meter: Meter) -> None:
    """Write a range of ``source`` to ``position``, which is where the target ends so far."""
    os.lseek(descriptor, position, os.SEEK_SET)
    at = begin
    while at < end:
        chunk_bytes = min(CHUNK_BYTES, end - at)
        meter.before(chunk_bytes)
        count = os.sendfile(descriptor, source, at, chunk_bytes)
        if count == 0:
            raise OSError(errno.EIO, f"the source ends at {at} of {end} bytes")
        _start_writeback(descriptor, position + at - begin, count)
        at += count
        meter.moved(count)


def _write(descriptor: int, data: memoryview) -> None:
    position = 0
    while position < len(data):
        count = os.write(descriptor, data[position : position + CHUNK_BYTES])
        _start_writeback(descriptor, position, count)
        position += count


def flush(descriptor: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone leaves the bytes in the drive's cache
    if full is not None:
        fcntl.fcntl(descriptor, full)
    else:
        os.fsync(descriptor)


def flush_path(folder: Path) -> None:
    with closing(os.open(folder, DIRECTORY)) as descriptor:
        flush(descriptor)


def sweep(directory: int) -> None:
    """Remove temporary files whose writer is gone. Skipped while others begin to write, or without locks."""
    if not _lock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return
    try:
        for name in os.listdir(directory):
            if not name.startswith(TEMPORARY):
                continue
            with contextlib.suppress(FileNotFoundError):  # its writer has just named or removed it
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                with closing(os.open(name, flags, dir_fd=directory)) as descriptor:
                    if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        os.unlink(name, dir_fd=directory)
    finally:
        _lock(directory, fcntl.LOCK_UN)


def _lock(descriptor: int, how: int) -> bool:
    """Return whether the lock was had; False if another holds it, or if the file system has none to give.

    Correctness never hangs on these locks, only that leftovers are swept and living writers let be.
    """
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno in _NO_LOCK:
            return False
        raise
    return True


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _find_sync_file_range() -> "ctypes._NamedFuncPointer | None":
    """Return Linux's sync_file_range, which Python does not offer, or None elsewhere."""
    function: ctypes._NamedFuncPointer | None = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function


_sync_file_range = _find_sync_file_range()


def _start_writeback(descriptor: int, position: int, count: int) -> None:
    """Let the disk begin. Only speed hangs on it: the fsync that follows reports every failure."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, position, count, _SYNC_FILE_RANGE_WRITE)
