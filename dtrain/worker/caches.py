"""The node's caches: what it fetched of the checkpoint that each of its jobs started from.

A generation that dies before its first own commit is followed by one that starts from the same checkpoint. Where the
store is a service, that would fetch the same bytes again, and again in a crash loop. So what a restore fetched goes to
the data folder's disk; the next restore of that checkpoint reads it from there (cache_files.py tells the files and why
nothing there is trusted).

Rules:
- nothing waits for it: a thread of low priority writes, after the ranks were given their bytes, and whatever goes
  wrong there costs a line in the log;
- the bytes come from the memory of the restore, which is held until they are written, but never while a stage slot or
  another restore wants for it: then what is written is kept, and the rest is let go;
- one checkpoint a job, the one restored last; it goes when the job can start from a newer one, and with its arena
  when the job leaves the node;
- it takes no room that the disk's other users may need: see ``_refusal``.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.common.names import JobName
from dtrain.storage.free_memory import Free, free_for
from dtrain.storage.indexes import Piece
from dtrain.storage.restore_files import PartOfImage
from dtrain.worker.cache_files import CacheFolder, Fetched, attempt_of, folder_name
from dtrain.worker.core.states import RestoreSource
from dtrain.worker.low_priority import yielding_threads
from dtrain.worker.rank_dirs import RankDirs

logger = logging.getLogger(__name__)

RESERVE_BYTES = 1024 * 1024 * 1024  # left on the disk at least: journal and logs of the node lie there too


class _Filling:
    """What is on its way to the disk. Until it is there, or was let go, it can be had from memory."""

    def __init__(
        self, job: JobName, folder: CacheFolder, texts: Mapping[str, bytes], shards: Mapping[int, Fetched]
    ) -> None:
        self.job = job
        self.folder = folder
        self.texts = dict(texts)
        self.shards = dict(shards)  # emptied at the end: the last references to the restore's memory
        self.stop = threading.Event()
        self.done = threading.Event()


@dataclass(frozen=True, slots=True)
class Cached:
    """What the node has of one checkpoint. For one restore, in any thread."""

    folder: CacheFolder
    fillings: tuple[_Filling, ...] = ()

    def text(self, name: str, digest: str) -> bytes | None:
        """Return the manifest or an index if it is here, with this digest."""
        return self.folder.text(name, digest)

    def part(self, shard: int) -> PartOfImage:
        """Return which ranges of the shard's image probably lie on the disk."""
        return self.folder.part(shard)

    def has(self, shard: int) -> bool:
        """Return whether anything of the shard is here."""
        return any(shard in filling.shards for filling in self.fillings) or bool(self.part(shard).spans)

    def copy(self, shard: int, pieces: Iterable[Piece], image: memoryview) -> set[Piece]:
        """Bring those of ``pieces`` that are here to their places; return those that are sound there."""
        left = set(pieces)
        sound: set[Piece] = set()
        for filling in self.fillings:
            fetched = filling.shards.get(shard)
            if fetched is not None:
                sound |= fetched.copy(left - sound, image)
        return sound | self.folder.copy(shard, left - sound, image)


class Caches:
    """All caches of the agent. Used in the event loop, unless it is said otherwise."""

    def __init__(self, dirs: RankDirs, free: Callable[[Path], Free] = free_for) -> None:
        self._dirs = dirs
        self._free = free
        self._lock = threading.Lock()  # guards what follows
        self._fillings: list[_Filling] = []  # in the order in which they are done
        self._threads = yielding_threads("cache", 1)  # one: files have one writer, and a removal comes in its turn

    def of(self, job: JobName, source: RestoreSource) -> Cached:
        """Return what is here of this checkpoint."""
        folder = CacheFolder(self._dirs.cache(job) / folder_name(source))
        with self._lock:
            return Cached(folder, tuple(filling for filling in self._fillings if filling.folder == folder))

    def keep(
        self, job: JobName, source: RestoreSource, texts: Mapping[str, bytes], shards: Mapping[int, Fetched]
    ) -> None:
        """Begin to write what a restore fetched, over what was there of it. Any other checkpoint of the job goes."""
        filling = _Filling(job, CacheFolder(self._dirs.cache(job) / folder_name(source)), texts, shards)
        with self._lock:
            self._fillings.append(filling)
        self._threads.submit(self._fill, filling)

    def make_room(self, needed_bytes: int) -> None:
        """Let go of what is being written if shared memory has too little room without it. In any thread; blocks."""
        with self._lock:
            fillings = list(self._fillings)
        if not fillings or self._free(self._dirs.root).size_bytes >= needed_bytes:
            return
        logger.info("memory is needed: what was not written to the cache yet is let go")
        for filling in fillings:
            filling.stop.set()
        for filling in fillings:
            filling.done.wait()

    def outdate(self, job: JobName, attempt: int) -> None:
        """Attempt ``attempt`` is what the job would start from now: older ones go."""
        self._stop(lambda filling: filling.job == job and attempt_of(filling.folder.path.name) < attempt)
        for folder in _folders(self._dirs.cache(job)):
            if attempt_of(folder.name) < attempt:
                self._threads.submit(_remove, folder)

    def remove(self, job: JobName) -> None:
        """The job has left this node."""
        self._stop(lambda filling: filling.job == job)
        folder = self._dirs.cache(job)
        if folder.exists():
            self._threads.submit(_remove, folder)

    def close(self) -> None:
        """What is on the disk stays there, for an agent that comes back."""
        self._stop(lambda filling: True)
        self._threads.shutdown()

    def _stop(self, which: Callable[[_Filling], bool]) -> None:
        with self._lock:
            for filling in self._fillings:
                if which(filling):
                    filling.stop.set()

    # ---- in the thread -----------------------------------------------------------------------------------

    def _fill(self, filling: _Filling) -> None:
        try:
            if not filling.stop.is_set():
                self._write(filling)
        except Exception as error:  # a cache spares time; whatever is wrong with it, training has its bytes
            logger.warning("%s: what was fetched is not kept on this node: %s", filling.job, error)
            _remove(filling.folder.path)  # no room, most probably: others need it too
        finally:
            with self._lock:
                self._fillings.remove(filling)
            filling.shards.clear()
            filling.done.set()

    def _write(self, filling: _Filling) -> None:
        """Raises OSError."""
        folder = filling.folder
        for other in _folders(folder.path.parent):
            if other != folder.path:
                _remove(other)
        folder.put_texts(filling.texts)
        missing_bytes = folder.missing_bytes(filling.shards)
        if why := _refusal(folder.path, missing_bytes):
            logger.warning("%s: what was fetched is not kept on this node: %s", filling.job, why)
            return
        for number, fetched in filling.shards.items():
            folder.put(number, fetched, filling.stop)
        if missing_bytes and not filling.stop.is_set():
            logger.info("%s: %d bytes of %s are kept", filling.job, missing_bytes, folder.path)


def _refusal(folder: Path, missing_bytes: int) -> str:
    """Return why a cache may not take so much of the disk; empty if it may.

    A cache spares time, so it never takes more than half of what is free: whoever else fills the disk, stage slots for
    want of memory among them, has as much room left as the cache took.
    """
    stats = os.statvfs(folder)
    free_bytes = stats.f_bavail * stats.f_frsize
    if free_bytes - missing_bytes >= max(missing_bytes, RESERVE_BYTES):
        return ""
    return f"{missing_bytes >> 20} MiB of the {free_bytes >> 20} MiB that are free on its disk would be too much"


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _folders(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
