"""Reading what lies on this node straight into tensors: once, and verified on the way.

A file that the node has already, a stage slot in shared memory or a store's own file, need not be copied for a
trainer and read once more to be verified. Each part is read to where it belongs and hashed right after, while it is
still in the cache; so memory is read once and written once, by as many threads as this rank has cores.

Nothing is trusted before its digest says so: what is missing, too short, unreadable or not what its index says is
left to the worker, which knows what each of these means. No step runs meanwhile, so a tensor that was filled with
damaged bytes is filled again before anybody sees it.
"""

import ctypes
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import xxhash

from dtrain.storage.indexes import IndexedShard
from dtrain.storage.restore_files import Sources
from dtrain.storage.tensor_codes import view_bytes
from dtrain.trainer.resharding import Move

READ_BYTES = 256 * 1024  # read, then hashed while it lies in the cache; a MiB at a time measured a sixth slower
THREADS_MAX = 16  # a few cores fill any memory's bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The bytes of a piece: where they lie, and what they are."""

    path: str
    at: int  # position in the file
    size_bytes: int
    digest: str  # 32 hex digits


class DirectReader:
    """Makes the moves whose bytes lie on this node. For one restore."""

    def __init__(
        self, shards: Sequence[IndexedShard], sources: Sources, *, threads: int, told: Callable[[int], None]
    ) -> None:
        """``told`` hears how many bytes were read so far, from any thread."""
        self._shards = shards
        self._sources = sources
        self._threads = max(1, min(threads, THREADS_MAX))
        self._told = told
        self._lock = threading.Lock()  # guards what follows
        self._done_bytes = 0
        self._files: dict[str, int] = {}  # path -> descriptor

    def take(self, moves: Sequence[Move]) -> list[Move]:
        """Make what moves can be made; return the others, whose targets may hold anything."""
        parts = [self._parts_of(move) for move in moves]
        left = {number for number, found in enumerate(parts) if found is None}
        works = iter(
            [
                (number, work)
                for number, (move, found) in enumerate(zip(moves, parts, strict=True))
                if found is not None
                for work in self._works(move, found)
            ]
        )  # shared by the threads: taking the next one of a list is one step under the GIL
        try:
            with ThreadPoolExecutor(self._threads, thread_name_prefix="dtrain-read") as pool:
                for failed in [pool.submit(_work_off, works) for _ in range(self._threads)]:
                    left.update(failed.result())
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()
        return [move for number, move in enumerate(moves) if number in left]

    def _parts_of(self, move: Move) -> list[_Part] | None:
        """Return what the move reads, in order; None if some of it lies elsewhere."""
        chunk, found = move.chunk, []
        for piece in self._shards[chunk.shard].pieces(move.name, 0, chunk.end - chunk.begin):
            place = self._sources.place_of(chunk.shard, piece)
            if place is None:
                return None
            found.append(_Part(path=place[0], at=place[1], size_bytes=piece.end - piece.begin, digest=piece.digest))
        return found

    def _works(self, move: Move, parts: list[_Part]) -> list[Callable[[], bool]]:
        """Return what makes the move, each work of it in any thread and any order."""
        if not move.is_dense:
            return [partial(self._convert, move, parts)]
        address = move.into.data_ptr()
        works: list[Callable[[], bool]] = []
        for part in parts:
            target = memoryview((ctypes.c_char * part.size_bytes).from_address(address)).cast("B")
            works.append(partial(self._read, part, target))
            address += part.size_bytes
        return works

    def _convert(self, move: Move, parts: list[_Part]) -> bool:
        """Read to memory of its own, and let torch bring it to where it belongs."""
        memory = memoryview(bytearray(sum(part.size_bytes for part in parts)))
        start = 0
        for part in parts:
            if not self._read(part, memory[start : start + part.size_bytes]):
                return False
            start += part.size_bytes
        with torch.no_grad():
            move.into.copy_(view_bytes(memory, move.dtype, move.chunk.shape, 0))
        return True

    def _read(self, part: _Part, target: memoryview) -> bool:
        """Fill ``target``; return whether it now holds what it should."""
        hasher = xxhash.xxh3_128()
        try:
            descriptor = self._open(part.path)
            done = 0
            while done < part.size_bytes:
                here = target[done : done + READ_BYTES]
                count = os.preadv(descriptor, [here], part.at + done)
                if count == 0:
                    return False
                hasher.update(here[:count])
                done += count
        except OSError:
            return False
        with self._lock:
            self._done_bytes += part.size_bytes
            self._told(self._done_bytes)
        return hasher.hexdigest() == part.digest

    def _open(self, path: str) -> int:
        with self._lock:
            if path not in self._files:
                # Neither a link nor a named pipe that somebody put there: the one leads away, the other hangs.
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                self._files[path] = descriptor
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise OSError(f"{path} is no regular file")
            return self._files[path]


def _work_off(works: Iterator[tuple[int, Callable[[], bool]]]) -> set[int]:
    """Do works until none is left; return the numbers of the moves of which one failed."""
    return {number for number, work in works if not work()}
