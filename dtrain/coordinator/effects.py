"""Performs the effects the coordinator owes: manifests and commit markers, in storage.

Each effect runs once at a time, in a thread, and is tried until it is done or refused for good. What is written
is create-only and the same whoever writes them, so a second writer finds its own bytes there and is content.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import assert_never

import msgspec

from dtrain.common import failpoints
from dtrain.common.digests import blob_digest
from dtrain.common.errors import DtrainError, PermanentError, RetryableError, ShardDamagedError
from dtrain.common.failpoints import Point
from dtrain.common.packs import Pack
from dtrain.coordinator.codec import DATA_BYTES_MAX
from dtrain.coordinator.core.effects import DeleteAttempt, DeletePacks, Effect, ReadMarkers, WriteManifest, WriteMarker
from dtrain.coordinator.core.events import ShardRecord
from dtrain.coordinator.core.facts import (
    Fact,
    ManifestRefused,
    ManifestWritten,
    MarkersRead,
    MarkerWritten,
    ObjectsDeleted,
    PacksGone,
)
from dtrain.storage import keys, manifests
from dtrain.storage.catalogs import catalog_of
from dtrain.storage.objects import AlreadyExists, NotFound, ObjectStore, StorageUnavailable
from dtrain.storage.retrying import read_again_if_damaged
from dtrain.storage.uris import open_store
from dtrain.storage.verify import read_index

logger = logging.getLogger(__name__)

THREADS_MAX = 8  # for each store: effects are small objects; more at once would only queue there
READS_MAX = 16  # shards looked at together before a manifest: a commit of 1024 ranks waits for 64 turns, not 1024
DESKS_MAX = 8  # stores whose threads and client are kept while nothing is owed to them
LOOKS_MAX = 4  # at what is to be empty, before it is tried again after a pause
_RETRY_FIRST_S = 0.2
_RETRY_MAX_S = 10.0


class EffectRunner:
    """Runs effects and brings back facts through ``tell``."""

    def __init__(self, tell: Callable[[Fact], Awaitable[None]], is_owed: Callable[[Effect], bool]) -> None:
        self._tell = tell
        self._is_owed = is_owed
        self._running: dict[tuple[str, str, int], asyncio.Task[None]] = {}
        # By store, so that one that hangs holds up its own jobs only; the one used last is last.
        self._desks: dict[str, _Desk] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # an effect met a bug

    def perform(self, effects: list[Effect]) -> None:
        """Start those that are not running."""
        for effect in effects:
            if effect.key not in self._running:
                task = asyncio.create_task(self._run(effect), name=":".join(map(str, effect.key)))
                task.add_done_callback(self._ended)
                self._running[effect.key] = task

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def close(self) -> None:
        """Stop caring. A write under way may still be done, which harms nobody."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for desk in self._desks.values():
            desk.close()

    async def _run(self, effect: Effect) -> None:
        pause_s = _RETRY_FIRST_S
        writing = self._running.get(("manifest", effect.job, effect.key[2]))
        if isinstance(effect, DeleteAttempt) and writing is not None:
            await asyncio.wait({writing})  # or the manifest of an aborted attempt would be written behind its sweep
        while True:
            try:
                with self._desk(effect.store) as desk:
                    fact = await asyncio.get_running_loop().run_in_executor(desk.threads, _perform, desk, effect)
                break
            except RetryableError as error:
                logger.warning("%s is still owed: %s", effect.key, error)
            except DtrainError as error:
                logger.error("%s was refused: %s", effect.key, error)
                if isinstance(effect, WriteManifest):
                    fact = ManifestRefused(job=effect.job, attempt=effect.inflight.attempt, reason=str(error))
                    break
            await asyncio.sleep(pause_s)  # a refused marker stays owed: somebody may give the rights back
            pause_s = min(pause_s * 2, _RETRY_MAX_S)
            if not self._is_owed(effect):  # its attempt was aborted meanwhile
                del self._running[effect.key]
                return
        await self._tell(fact)
        del self._running[effect.key]

    @contextlib.contextmanager
    def _desk(self, uri: str) -> Iterator["_Desk"]:
        desk = self._desks.pop(uri, None) or _Desk(uri)
        self._desks[uri] = desk
        desk.users += 1
        try:
            yield desk
        finally:
            desk.users -= 1
            idle = [uri for uri, other in self._desks.items() if not other.users]
            for over in idle[: max(0, len(self._desks) - DESKS_MAX)]:
                self._desks.pop(over).close()


class _Desk:
    """The threads that speak to one store."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.users = 0  # effects that are under way
        self.threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="effect")
        # Their own: an effect that waited here for threads of its own pool could wait for ever.
        self.reads = ThreadPoolExecutor(READS_MAX, thread_name_prefix="effect-read")

    def close(self) -> None:
        for threads in (self.threads, self.reads):
            threads.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def store(self) -> ObjectStore:
        return open_store(self._uri)


def _perform(desk: _Desk, effect: Effect) -> Fact:
    match effect:
        case WriteManifest():
            return _write_manifest(desk.store, effect, desk.reads)
        case WriteMarker():
            return _write_marker(desk.store, effect)
        case ReadMarkers():
            return _read_markers(desk.store, effect)
        case DeleteAttempt():
            return _delete_attempt(desk.store, effect)
        case DeletePacks():
            return _delete_packs(desk.store, effect)
        case unreachable:
            assert_never(unreachable)


def _put_once(store: ObjectStore, key: str, data: bytes) -> None:
    """Create ``key``; content if exactly these bytes are there already."""
    try:
        store.put(key, data, if_absent=True)
    except AlreadyExists:
        if store.get(key) != data:
            raise


def _see(store: ObjectStore, shard: ShardRecord | Pack) -> None:
    """The worker's acknowledgement is believed for the digest; that the object is there is cheap to see."""
    info = store.head(shard.key)
    if info is None or info.size_bytes != shard.size_bytes:
        found = "nothing" if info is None else f"{info.size_bytes} bytes"
        raise NotFound(f"{shard.key}: acknowledged with {shard.size_bytes} bytes, storage has {found}")


def _write_manifest(store: ObjectStore, effect: WriteManifest, reads: ThreadPoolExecutor) -> ManifestWritten:
    inflight = effect.inflight
    record_bytes = len(msgspec.json.encode(effect.shards))
    if record_bytes > DATA_BYTES_MAX:  # its commit could never be appended
        raise PermanentError(
            f"the log would have to hold {record_bytes} bytes about its {len(effect.shards)} shards in one event, "
            f"and etcd takes {DATA_BYTES_MAX}"
        )
    named = {pack.key: pack for shard in effect.shards for pack in shard.packs}
    for _ in reads.map(lambda part: _see(store, part), (*effect.shards, *named.values())):
        pass  # the first that is missing raises
    manifest = manifests.Manifest(
        job=effect.job,
        checkpoint=inflight.number,
        attempt=inflight.attempt,
        generation=inflight.generation,
        step=inflight.step,
        world_size=effect.world_size,
        shards=tuple(
            manifests.ShardEntry(
                rank=s.rank,
                key=s.key,
                size_bytes=s.size_bytes,
                digest=s.digest,
                index_key=s.index_key,
                index_digest=s.index_digest,
                packs=s.packs,
            )
            for s in effect.shards
        ),
    )
    try:
        data = manifests.encode(manifest)
    except ValueError as error:  # a worker acknowledged what no shard can be: trying again cannot help
        raise PermanentError(f"the acknowledged shards make no manifest: {error}") from error
    looks = [partial(read_index, store, entry) for entry in manifest.shards]
    indexes = reads.map(read_again_if_damaged, looks)
    catalog_of([shard for shard, _ in indexes])  # refuses what is not whole
    key = keys.manifest_key(effect.job, inflight.number, inflight.attempt)
    failpoints.hit(Point.MANIFEST_BEFORE)
    _put_once(store, key, data)
    failpoints.hit(Point.MANIFEST_AFTER)
    return ManifestWritten(
        job=effect.job, attempt=inflight.attempt, manifest_key=key, manifest_digest=blob_digest(data)
    )


def _delete_attempt(store: ObjectStore, effect: DeleteAttempt) -> ObjectsDeleted:
    if effect.committed:
        store.delete(keys.marker_key(effect.job, effect.checkpoint))  # first: from here on nothing is promised
    store.delete(keys.manifest_key(effect.job, effect.checkpoint, effect.attempt))
    prefixes = (
        keys.attempt_prefix(effect.job, effect.checkpoint, effect.attempt),
        keys.pack_prefix(effect.job, effect.attempt),
    )
    _empty(store, prefixes, keep=effect.keep)
    return ObjectsDeleted(job=effect.job, attempt=effect.attempt)


def _empty(store: ObjectStore, prefixes: Sequence[str], *, keep: Collection[str]) -> None:
    """Delete what is below the prefixes until nothing is listed there: a put may arrive while the others are deleted.

    All are looked at again behind the last deletion. Raises :class:`StorageUnavailable` if the store goes on listing
    something, so that it is tried again later.
    """
    for prefix in prefixes:
        store.abandon(prefix)  # before the list, which so holds whatever was completed meanwhile
    left: list[str] = []
    for _ in range(LOOKS_MAX):
        left = [info.key for prefix in prefixes for info in store.list(prefix) if info.key not in keep]
        if not left:
            return
        for key in left:
            store.delete(key)
    raise StorageUnavailable(f"{left[0]} is still listed, though it was deleted {LOOKS_MAX} times")


def _delete_packs(store: ObjectStore, effect: DeletePacks) -> PacksGone:
    for key in effect.packs:
        store.delete(key)
    return PacksGone(job=effect.job, expired=effect.expired)


def _read_markers(store: ObjectStore, effect: ReadMarkers) -> MarkersRead:
    found = MarkersRead(job=effect.job, store=effect.store, position_seq=0, key="")
    known = {keys.marker_key(effect.job, number) for number in effect.known}
    for info in store.list(keys.job_prefix(effect.job)):
        key = info.key
        if not key.endswith("/" + keys.MARKER_NAME) or key in known:
            continue
        try:
            marker = manifests.decode_marker(store.get(key), key=key)
        except NotFound:  # its checkpoint was deleted meanwhile
            continue
        except ShardDamagedError as error:
            logger.warning("a commit marker says nothing about the log: %s", error)
            continue
        if marker.position_seq > found.position_seq:
            found = MarkersRead(job=effect.job, store=effect.store, position_seq=marker.position_seq, key=key)
        # A manifest is there before its marker and longer than it, unless the marker was put behind the deletion.
        if store.head(marker.manifest_key) is None:
            logger.warning("a commit marker came behind the deletion of its checkpoint, and goes too: %s", key)
            store.delete(key)
    return found


def _write_marker(store: ObjectStore, effect: WriteMarker) -> MarkerWritten:
    checkpoint = effect.checkpoint
    marker = manifests.CommitMarker(
        job=effect.job,
        checkpoint=checkpoint.number,
        attempt=checkpoint.attempt,
        step=checkpoint.step,
        manifest_key=checkpoint.manifest_key,
        manifest_digest=checkpoint.manifest_digest,
        position_seq=checkpoint.position.seq,
        position_digest=checkpoint.position.digest,
    )
    failpoints.hit(Point.MARKER_BEFORE)
    _put_once(store, keys.marker_key(effect.job, checkpoint.number), manifests.encode(marker))
    failpoints.hit(Point.MARKER_AFTER)
    return MarkerWritten(job=effect.job, checkpoint=checkpoint.number)
