"""Brings the shards that a generation starts from, and hands over only what was verified.

The trainers start meanwhile and wait for the word in their mailboxes. Two failures must never be confused: a
blob that is missing or has other bytes than the manifest says is **damaged** (the coordinator then chooses an
older checkpoint), while a storage that does not answer, or refuses us, says nothing about the blob: it is asked
again until it answers or the generation is over.
"""

import asyncio
import logging
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from dtrain.common.digests import blob_digest
from dtrain.common.errors import DtrainError, ShardDamagedError
from dtrain.storage.manifests import Manifest, ShardEntry, decode_manifest
from dtrain.storage.objects import NotFound, ObjectStore
from dtrain.storage.retrying import GaveUp, with_retries
from dtrain.worker.core.actions import FetchRestore
from dtrain.worker.core.inputs import RestoreDamaged, RestoreReady
from dtrain.worker.core.states import RestoreSource
from dtrain.worker.rank_dirs import RESTORE_FILE, RankDirs, RankId
from dtrain.worker.tasks import Begin
from dtrain.worker.uploads import shared_store, transfer_threads

logger = logging.getLogger(__name__)

ROUND_S = 60.0  # one round of tries; after it the reason is logged, and the next round begins
PAUSE_S = 2.0  # between rounds, so that a storage which refuses at once is not asked in a loop


_T = TypeVar("_T", covariant=True)


class _Part(Protocol[_T]):
    """One blob to be brought and verified."""

    store_uri: str
    give_up: threading.Event
    key: str

    def __call__(self, store: ObjectStore) -> _T: ...


class Restores:
    """All restores of the agent; at most one a job. Used in the event loop only."""

    def __init__(self, emit: Callable[[RestoreReady | RestoreDamaged], None], dirs: RankDirs, begin: Begin) -> None:
        self._emit = emit
        self._begin = begin
        self._dirs = dirs
        self._threads = transfer_threads("restore")
        self._running: dict[tuple[str, int], tuple[asyncio.Task[None], threading.Event]] = {}

    def start(self, fetch: FetchRestore) -> None:
        """Fetch what the local ranks start from. The answer comes through ``emit``, or not if it was dropped."""
        name = (fetch.job, fetch.generation)
        if name in self._running or fetch.spec.restore is None:
            return
        give_up = threading.Event()
        task = self._begin(self._run(fetch, fetch.spec.restore, give_up))
        self._running[name] = (task, give_up)

    def drop(self, job: str, generation: int) -> None:
        running = self._running.pop((job, generation), None)
        if running is not None:
            running[1].set()

    def close(self) -> None:
        for task, give_up in self._running.values():
            give_up.set()
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, fetch: FetchRestore, source: RestoreSource, give_up: threading.Event) -> None:
        loop = asyncio.get_running_loop()
        try:
            manifest = await loop.run_in_executor(self._threads, _patiently, _Manifest(source, give_up))
            first, count = fetch.spec.first_rank, fetch.spec.nproc
            ranks = [RankId(job=fetch.job, generation=fetch.generation, rank=first + local) for local in range(count)]
            entries = [manifest.shards[of.rank % manifest.world_size] for of in ranks]
            parts = [
                _Shard(source, entry, self._dirs.rank_dir(of), give_up)
                for of, entry in zip(ranks, entries, strict=True)
            ]
            await asyncio.gather(*(loop.run_in_executor(self._threads, _patiently, part) for part in parts))
        except (GaveUp, asyncio.CancelledError):
            return
        except ShardDamagedError as error:
            give_up.set()  # for the other ranks' shards
            self._running.pop((fetch.job, fetch.generation), None)
            self._emit(RestoreDamaged(job=fetch.job, generation=fetch.generation, key=error.key, reason=error.why))
            return
        self._running.pop((fetch.job, fetch.generation), None)
        if not give_up.is_set():
            self._emit(RestoreReady(job=fetch.job, generation=fetch.generation))


class _Manifest:
    """Reads and verifies the manifest."""

    def __init__(self, source: RestoreSource, give_up: threading.Event) -> None:
        self.store_uri = source.store
        self.give_up = give_up
        self.key = source.manifest_key
        self._digest = source.manifest_digest

    def __call__(self, store: ObjectStore) -> Manifest:
        data = store.get(self.key)
        if blob_digest(data) != self._digest:
            raise ShardDamagedError(self.key, "does not match the digest that the log recorded")
        return decode_manifest(data, key=self.key)


class _Shard:
    """Downloads and verifies one rank's shard into its folder."""

    def __init__(self, source: RestoreSource, entry: ShardEntry, folder: Path, give_up: threading.Event) -> None:
        self.store_uri = source.store
        self.give_up = give_up
        self.key = entry.key
        self._entry = entry
        self._folder = folder

    def __call__(self, store: ObjectStore) -> None:
        entry = self._entry
        info = store.head(entry.key)
        if info is None:
            raise ShardDamagedError(entry.key, "is missing")
        if info.size_bytes != entry.size_bytes:
            raise ShardDamagedError(entry.key, f"has {info.size_bytes} bytes, the manifest says {entry.size_bytes}")
        temporary = self._folder / f".{RESTORE_FILE}.new"
        with temporary.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, entry.size_bytes)  # a full disk is an error here, not a SIGBUS below
            with mmap.mmap(file.fileno(), entry.size_bytes) as page:
                view = memoryview(page)
                try:
                    store.read_into(entry.key, view)
                    if blob_digest(view) != entry.digest:
                        raise ShardDamagedError(entry.key, "does not match its digest in the manifest")
                finally:
                    view.release()
        temporary.rename(self._folder / RESTORE_FILE)


def _patiently(part: _Part[_T]) -> _T:
    """In a thread: do the part until it is done or known to be impossible."""
    while True:
        try:
            return with_retries(
                lambda: part(shared_store(part.store_uri)),
                deadline_s=ROUND_S,
                give_up=part.give_up,
            )
        except (GaveUp, ShardDamagedError):
            raise
        except NotFound as error:
            raise ShardDamagedError(part.key, "is missing") from error
        except (DtrainError, OSError) as error:
            logger.warning("the restore waits for storage: %s: %s", part.key, error)
        if part.give_up.wait(PAUSE_S):
            raise GaveUp("no longer wanted")
