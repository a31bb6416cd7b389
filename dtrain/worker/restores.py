"""Brings the bytes that a generation starts from, and hands over only what was verified.

The trainers start meanwhile; each reads the manifest and the indexes that are put into the generation's folder,
writes down what it needs, and waits for the word in its mailbox (trainer/restoring.py tells the order). While they
start, what they will most probably ask for is fetched already. What lies on this node as it is, in a stage slot, in
the node's cache or in a store that is a folder, is not fetched but pointed out: a trainer verifies it while it reads
it, in one pass, and asks for whatever it does not find sound. What had to be fetched goes to the cache afterwards,
whatever became of the restore. Unlike an upload, which yields to training, a restore
is what training waits for: its threads have the same claim on the processors as every other.

Two failures must never be confused: a blob that is missing or has other bytes than the manifest says is **damaged**
(the coordinator then chooses an older checkpoint), while a storage that does not answer, or refuses us, says nothing
about the blob: it is asked again until it answers or the generation is over. So is a store that shows no checkpoint of
the job at all, which is most probably a folder that is not mounted on this node.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.common.errors import DtrainError, PermanentError, ShardDamagedError, ShardMissingError
from dtrain.common.names import Generation, JobName
from dtrain.storage.catalogs import Catalog, IncompleteCheckpoint, catalog_of
from dtrain.storage.indexes import IndexedShard, Piece
from dtrain.storage.manifests import Manifest, ShardEntry, decode_manifest, encode
from dtrain.storage.objects import ObjectStore
from dtrain.storage.presence import shows_checkpoints
from dtrain.storage.ranges import NeededRange, Run, pieces_of, runs_of
from dtrain.storage.restore_files import (
    INDEX_FILE,
    MANIFEST_FILE,
    NEEDS_FILE,
    RESTORE_FOLDER,
    SHARD_FILE,
    SOURCES_FILE,
    PartOfImage,
    Sources,
    decode_needs,
    encode_sources,
)
from dtrain.storage.retrying import DAMAGED_READS, GaveUp, with_retries
from dtrain.storage.verify import open_entry, read_index, read_manifest
from dtrain.worker.caches import Caches
from dtrain.worker.core.actions import FetchRestore
from dtrain.worker.core.inputs import RestoreDamaged, RestoreReady
from dtrain.worker.core.states import RestoreSource
from dtrain.worker.rank_dirs import RankDirs, RankId, write_whole
from dtrain.worker.shard_images import ShardImage, probable_needs, staged_slot
from dtrain.worker.tasks import Begin
from dtrain.worker.transfers import Transfer
from dtrain.worker.uploads import shared_store

logger = logging.getLogger(__name__)

ROUND_S = 60.0  # one round of tries; after it the reason is logged, and the next round begins
THREADS = 4  # parts of shards that are fetched at once; each is a large read, and S3 splits it once more
PAUSE_S = 2.0  # between rounds, so that a storage which refuses at once is not asked in a loop
DAMAGED_PAUSE_S = 0.5  # between reads of what was damaged: what lies damaged in storage is found so after a second
SAID_MAX = 3  # reasons of one restore that are said in its rank's log; the agent's log has each of them
LOOK_S = 0.004  # between two looks for what a trainer needs: it is in the way of its first step


@dataclass(frozen=True, slots=True)
class _Running:
    task: asyncio.Task[None]
    give_up: threading.Event
    work: "_Restore"


class Restores:
    """All restores of the agent; at most one a job. Used in the event loop only."""

    def __init__(
        self,
        emit: Callable[[RestoreReady | RestoreDamaged], None],
        dirs: RankDirs,
        begin: Begin,
        caches: Caches,
        tell: Callable[[RankId, str], None] = lambda of, text: None,
    ) -> None:
        """``tell``: says why a restore waits, in the log of a rank; called in any thread."""
        self._emit = emit
        self._tell = tell
        self._caches = caches
        self._begin = begin
        self._dirs = dirs
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="restore")
        self._running: dict[tuple[JobName, Generation], _Running] = {}

    def start(self, fetch: FetchRestore) -> None:
        """Fetch what the local ranks start from. The answer comes through ``emit``, or not if it was dropped."""
        name = (fetch.job, fetch.generation)
        if name in self._running or fetch.spec.restore is None:
            return
        give_up = threading.Event()
        source = fetch.spec.restore
        first = RankId(job=fetch.job, generation=fetch.generation, rank=fetch.spec.first_rank)
        patience = _Patience(source.store, fetch.job, give_up, partial(self._tell, first))
        work = _Restore(self._dirs, fetch, source, patience, self._in_thread, self._caches)
        self._running[name] = _Running(self._begin(self._run(fetch, work, give_up)), give_up, work)

    def progress(self) -> dict[tuple[JobName, Generation], Transfer]:
        """How far those are that are under way."""
        return {name: running.work.progress for name, running in self._running.items()}

    def drop(self, job: JobName, generation: Generation) -> None:
        running = self._running.pop((job, generation), None)
        if running is not None:
            running.give_up.set()
            running.work.keep()  # now: the next generation may ask at once

    def close(self) -> None:
        for running in self._running.values():
            running.give_up.set()
            running.task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, fetch: FetchRestore, work: "_Restore", give_up: threading.Event) -> None:
        try:
            await work.run()
        except (GaveUp, asyncio.CancelledError):
            return
        except ShardDamagedError as error:
            give_up.set()  # for what else is under way
            self._running.pop((fetch.job, fetch.generation), None)
            self._emit(RestoreDamaged(job=fetch.job, generation=fetch.generation, key=error.key, reason=error.why))
            return
        self._running.pop((fetch.job, fetch.generation), None)
        if not give_up.is_set():
            self._emit(RestoreReady(job=fetch.job, generation=fetch.generation))
            work.keep()

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, work)


class _Patience:
    """Tries a part until it is done or known to be impossible. In a thread."""

    def __init__(self, store_uri: str, job: JobName, give_up: threading.Event, say: Callable[[str], None]) -> None:
        """``say``: where a person looks who waits for the job."""
        self._store_uri = store_uri
        self._job = job
        self.give_up = give_up
        self._say = say
        self._said: set[str] = set()

    def try_out(self, part: Callable[[ObjectStore], None]) -> None:
        damaged = 0
        while True:
            try:
                with_retries(lambda: part(shared_store(self._store_uri)), deadline_s=ROUND_S, give_up=self.give_up)
                return
            except GaveUp:
                raise
            except ShardDamagedError as error:
                damaged += 1
                if damaged < DAMAGED_READS:
                    logger.warning("read again, for it may have been damaged on its way: %s", error)
                    pause_s = DAMAGED_PAUSE_S
                elif isinstance(error, ShardMissingError) and not self._is_the_store():
                    damaged, pause_s = 0, PAUSE_S
                else:
                    raise
            except (DtrainError, OSError) as error:
                damaged = 0
                self._wait_for(str(error))
                pause_s = PAUSE_S
            if self.give_up.wait(pause_s):
                raise GaveUp("no longer wanted")

    def _is_the_store(self) -> bool:
        """Whether what is missing there is missing at all."""
        try:
            if shows_checkpoints(shared_store(self._store_uri), self._job):
                return True
            self._wait_for(f"{self._store_uri} shows no checkpoint of {self._job} on this node: is it mounted here?")
        except (DtrainError, OSError) as error:
            self._wait_for(str(error))
        return False

    def _wait_for(self, why: str) -> None:
        logger.warning("the restore waits: %s", why)
        if why not in self._said and len(self._said) < SAID_MAX:
            self._said.add(why)
            self._say(f"the restore waits: {why}")


class _Restore:
    """One restore, from the manifest to the last byte."""

    def __init__(
        self,
        dirs: RankDirs,
        fetch: FetchRestore,
        source: RestoreSource,
        patience: _Patience,
        in_thread: Callable[[Callable[[], None]], Coroutine[Any, Any, None]],
        caches: Caches,
    ) -> None:
        self._job = fetch.job
        self._source = source
        self._caches = caches
        self._cached = caches.of(fetch.job, source)
        self._texts: dict[str, bytes] = {}  # the manifest and the indexes, if they are worth keeping
        self._patience = patience
        self._in_thread = in_thread
        self._generation_dir = dirs.generation_dir(fetch.job, fetch.generation)
        self._folder = self._generation_dir / RESTORE_FOLDER
        self._arenas = (dirs.arena(fetch.job), dirs.arena_in_files(fetch.job))
        self._ranks = range(fetch.spec.first_rank, fetch.spec.first_rank + fetch.spec.nproc)
        self._world_size = fetch.spec.world_size
        self._images: dict[int, ShardImage] = {}
        self._sources = Sources()
        self._is_remote = False  # until it is known: its store has no files on this node
        self.progress = Transfer(bytes_done=0, bytes_total=0)

    async def run(self) -> None:
        """Return when all local ranks have said what they need, and it is there. Raises ShardDamagedError, GaveUp."""
        catalog = await self._read_catalog()
        probable = probable_needs(catalog, self._ranks, self._world_size)
        at_hand = {part for part in probable if _is_at_hand(part, catalog, self._sources)}
        places = (self._sources.place_of(number, piece) for number, piece in _pieces(catalog, at_hand))
        paths = {place[0] for place in places if place is not None}
        await self._in_thread(lambda: _read_ahead(paths))
        await self._fetch(catalog, probable - at_hand)
        for rank in self._ranks:
            await self._fetch(catalog, await self._needs_of(catalog, rank))

    def keep(self) -> None:
        """Have what was fetched so far written to the node's cache."""
        if self._is_remote:
            fetched = {number: found for number, image in self._images.items() if (found := image.fetched())}
            self._caches.keep(self._job, self._source, self._texts, fetched)

    async def _read_catalog(self) -> Catalog:
        found: list[Manifest] = []
        indexes: dict[int, IndexedShard] = {}

        def manifest(store: ObjectStore) -> None:
            key, digest = self._source.manifest_key, self._source.manifest_digest
            data = self._cached.text(MANIFEST_FILE, digest)
            found.append(read_manifest(store, key, digest) if data is None else decode_manifest(data, key=key))

        def index(entry: ShardEntry) -> Callable[[ObjectStore], None]:
            name = INDEX_FILE.format(entry.rank)

            def read(store: ObjectStore) -> None:
                data = self._cached.text(name, entry.index_digest)
                if data is None:
                    indexes[entry.rank], data = read_index(store, entry)
                else:
                    indexes[entry.rank] = open_entry(data, entry)
                write_whole(self._folder / name, data)
                self._texts[name] = data

            return read

        await self._patiently(lambda _: self._folder.mkdir(mode=0o700, exist_ok=True))
        await self._patiently(manifest)
        await asyncio.gather(*(self._patiently(index(entry)) for entry in found[0].shards))
        try:
            catalog = catalog_of([indexes[rank] for rank in range(found[0].world_size)])
        except IncompleteCheckpoint as error:
            raise ShardDamagedError(self._source.manifest_key, str(error)) from error
        self._texts[MANIFEST_FILE] = encode(found[0])
        await self._patiently(lambda store: self._point_out(catalog, store))
        # From now on the trainers read them.
        await self._patiently(lambda _: write_whole(self._folder / MANIFEST_FILE, self._texts[MANIFEST_FILE]))
        return catalog

    def _point_out(self, catalog: Catalog, store: ObjectStore) -> None:
        """Say what lies on this node already."""
        images: dict[int, str] = {}
        parts: dict[int, PartOfImage] = {}
        objects: dict[str, str] = {}
        for number, shard in enumerate(catalog.shards):
            if slot := staged_slot(self._slots(number), self._source.attempt, shard):
                images[number] = str(slot)
                continue
            for key in {shard.key, *(key for key, _ in shard.places.values())} - objects.keys():
                if path := store.local_path(key):
                    objects[key] = str(path)
            if (part := self._cached.part(number)).spans:
                parts[number] = part
        self._is_remote = store.local_path(self._source.manifest_key) is None
        self._sources = Sources(images=images, parts=parts, objects=objects)
        write_whole(self._folder / SOURCES_FILE, encode_sources(self._sources))

    def _slots(self, number: int) -> list[Path]:
        """Folders in which the shard of this number may have been staged."""
        return [arena / f"rank{number}" for arena in self._arenas]

    async def _needs_of(self, catalog: Catalog, rank: int) -> list[NeededRange]:
        """Wait until the trainer has said what it needs."""
        path = self._generation_dir / f"rank{rank}" / NEEDS_FILE
        told = False
        while not self._patience.give_up.is_set():
            try:
                return decode_needs(path.read_bytes(), catalog.shards)
            except FileNotFoundError:
                pass  # not yet
            except PermanentError as error:  # a script scribbled into the folder; its rank waits for ever
                if not told:
                    logger.warning("rank %d asks for what there is not: %s", rank, error)
                told = True
            await asyncio.sleep(LOOK_S)
        raise GaveUp("no longer wanted")

    async def _fetch(self, catalog: Catalog, needed: Iterable[NeededRange]) -> None:
        """Bring what is needed and not there yet."""
        wanted = pieces_of(catalog.shards, needed)
        for number in wanted.keys() - self._images.keys():
            self._images[number] = ShardImage(
                self._folder / SHARD_FILE.format(number),
                catalog.shards[number],
                slots=self._slots(number),
                attempt=self._source.attempt,
                cached=partial(self._cached.copy, number) if self._cached.has(number) else None,
            )
        missing_bytes = sum(_size_bytes(pieces - self._images[number].there) for number, pieces in wanted.items())
        self._expect(missing_bytes)
        await self._in_thread(lambda: self._caches.make_room(missing_bytes))
        await asyncio.gather(*(self._patiently(self._images[number].begin) for number in wanted))
        while missing := {n: left for n, pieces in wanted.items() if (left := pieces - self._images[n].there)}:
            self._still_missing(sum(map(_size_bytes, missing.values())))
            runs = [run for number, pieces in missing.items() for run in runs_of(number, pieces)]
            await asyncio.gather(*(self._bring(run) for run in runs))
        self._still_missing(0)

    async def _bring(self, run: Run) -> None:
        await self._patiently(self._images[run.shard].reader(run))
        self._still_missing(self.progress.bytes_total - self.progress.bytes_done - (run.end - run.begin))

    def _expect(self, more_bytes: int) -> None:
        before = self.progress
        self.progress = Transfer(bytes_done=before.bytes_done, bytes_total=before.bytes_total + more_bytes)

    def _still_missing(self, left_bytes: int) -> None:
        total = self.progress.bytes_total
        self.progress = Transfer(bytes_done=total - max(left_bytes, 0), bytes_total=total)

    async def _patiently(self, part: Callable[[ObjectStore], None]) -> None:
        await self._in_thread(lambda: self._patience.try_out(part))


def _read_ahead(paths: set[str]) -> None:
    """Let the kernel begin to read what trainers will read from this node's disk."""
    for path in paths:
        with contextlib.suppress(OSError):  # a hint: whoever reads it finds out what is wrong
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _is_at_hand(part: NeededRange, catalog: Catalog, sources: Sources) -> bool:
    pieces = catalog.shards[part.shard].pieces(part.tensor, part.begin, part.end)
    return all(sources.place_of(part.shard, piece) is not None for piece in pieces)


def _pieces(catalog: Catalog, needed: Iterable[NeededRange]) -> Iterable[tuple[int, Piece]]:
    """Yield the pieces that hold what is needed, each with its shard's number."""
    for number, pieces in pieces_of(catalog.shards, needed).items():
        for piece in pieces:
            yield number, piece


def _size_bytes(pieces: Iterable[Piece]) -> int:
    return sum(piece.end - piece.begin for piece in pieces)


def forget_needs(rank_dir: Path) -> None:
    """The rank has what it needs. When all of its node have, the memory is given back."""
    (rank_dir / NEEDS_FILE).unlink(missing_ok=True)
    generation_dir = rank_dir.parent
    if not any(generation_dir.glob(f"rank*/{NEEDS_FILE}")):
        shutil.rmtree(generation_dir / RESTORE_FOLDER, ignore_errors=True)
