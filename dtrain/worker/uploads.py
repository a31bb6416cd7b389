"""Sends staged shards from shared memory to storage, and says when storage has confirmed them.

The trainer trains on meanwhile, so nothing here may hold it: uploads run in threads of lower priority (on Linux
a thread has a nice value of its own), send the stage slot without a copy, and are given up when they do not advance.

A slot is shared with a trainer that may write into it again. So the mailbox must say that it holds this attempt's
state before its digest is taken, and still say so when storage has confirmed: then nobody wrote in between.

An agent killed after storage confirmed and before its journal knew it uploads again when it comes back: the same
bytes under the same key, which changes nothing; or, if the second time its base cannot be had, other bytes under
another key. One killed in the middle goes on where the store can: S3 is asked for the parts that it has.

All uploads of an agent share one cap on what they send a second, if there is one.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from dtrain.common import failpoints
from dtrain.common.digests import blob_digest
from dtrain.common.errors import PermanentError, RetryableError
from dtrain.common.failpoints import Point
from dtrain.common.mailbox import pack
from dtrain.common.names import JobName
from dtrain.storage.indexes import IndexedShard
from dtrain.storage.keys import index_key, pack_key, shard_key
from dtrain.storage.objects import ObjectStore
from dtrain.storage.packing import StoredShard, store_image
from dtrain.storage.parts import FileParts
from dtrain.storage.retrying import GaveUp, with_retries
from dtrain.storage.uris import open_store
from dtrain.worker.arenas import Kept, SlotMap
from dtrain.worker.bandwidth import BandwidthCap
from dtrain.worker.bases import Bases
from dtrain.worker.core.actions import Upload
from dtrain.worker.core.inputs import UploadDone, UploadFailed
from dtrain.worker.low_priority import yielding_threads
from dtrain.worker.rank_dirs import RankId
from dtrain.worker.tasks import Begin
from dtrain.worker.transfers import Transfer, UploadMeter

logger = logging.getLogger(__name__)

DEADLINE_S = 300.0  # without any advance: then the attempt fails and a later one is made
THREADS = 4  # shards of one node that travel at once; more only share the same network
STORES_MAX = 8  # stores kept open: a node sees few, and an open one costs a connection pool


@lru_cache(maxsize=STORES_MAX)
def shared_store(uri: str) -> ObjectStore:
    """Return the store of this URI, the same one for every transfer."""
    return open_store(uri)


@dataclass(frozen=True, slots=True)
class _Running:
    upload: Upload
    task: asyncio.Task[None]
    give_up: threading.Event
    meter: UploadMeter


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a shard is staged."""

    path: Path
    mapped: SlotMap | None  # if it is already

    @contextlib.contextmanager
    def memory(self, file: int, size_bytes: int) -> Iterator[memoryview]:
        """The first bytes of the open slot."""
        if self.mapped is not None and self.mapped.inode == os.fstat(file).st_ino:
            page = self.mapped.page
        else:  # all page tables at once, instead of fault by fault
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            page = mmap.mmap(file, size_bytes, flags=flags, prot=mmap.PROT_READ)
        with memoryview(page) as view:
            yield view[:size_bytes]


class Uploads:
    """All uploads of the agent; at most one a rank. Used in the event loop only."""

    def __init__(
        self,
        emit: Callable[[UploadDone | UploadFailed], None],
        slot_holds: Callable[[RankId, int], int],
        keep: Callable[[RankId, int, Kept], None],
        mapped: Callable[[RankId, int, int], SlotMap | None],
        begin: Begin,
        cap: BandwidthCap,
    ) -> None:
        """``slot_holds``: the word of the state in a rank's slot; ``keep``: takes note of what storage confirmed;
        ``mapped``: a rank's slot as memory of so many bytes, if it is mapped already.

        ``cap`` is for all uploads together.
        """
        self._cap = cap
        self._emit = emit
        self._begin = begin
        self._slot_holds = slot_holds
        self._keep = keep
        self._mapped = mapped
        self._threads = yielding_threads("upload", THREADS)
        self._bases = Bases()
        self._running: dict[RankId, _Running] = {}

    def start(self, upload: Upload, folder: Path) -> None:
        """Upload the slot. The answer comes through ``emit``, or not at all if the upload was dropped."""
        of = RankId(job=upload.job, generation=upload.generation, rank=upload.rank)
        old = self._running.get(of)
        if old is not None:
            if old.upload == upload:
                return
            old.give_up.set()
        give_up = threading.Event()
        meter = UploadMeter(self._cap, give_up)
        meter.begin(upload.size_bytes)
        task = self._begin(self._run(of, upload, folder, give_up, meter))
        self._running[of] = _Running(upload, task, give_up, meter)

    def progress(self) -> dict[RankId, Transfer]:
        """How far those are that are under way."""
        return {of: running.meter.progress for of, running in self._running.items()}

    def drop(self, job: str, generation: int) -> None:
        """Give up the uploads of a generation."""
        for of in [of for of in self._running if of.job == job and of.generation == generation]:
            self._running.pop(of).give_up.set()

    def forget(self, job: JobName) -> None:
        """The job has left this node."""
        self._bases.forget(job)

    def close(self) -> None:
        for running in self._running.values():
            running.give_up.set()
            running.task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self, of: RankId, upload: Upload, folder: Path, give_up: threading.Event, meter: UploadMeter
    ) -> None:
        request = upload.request
        word = pack(request.attempt, request.step)
        answer: UploadDone | UploadFailed
        try:
            if self._slot_holds(of, upload.slot) != word:
                raise SlotTaken
            answer = await asyncio.get_running_loop().run_in_executor(
                self._threads,
                _send,
                upload,
                _Slot(path=folder / f"slot{upload.slot}", mapped=self._mapped(of, upload.slot, upload.size_bytes)),
                give_up,
                meter,
                self._bases,
            )
            if self._slot_holds(of, upload.slot) != word:
                raise SlotTaken
        except (GaveUp, asyncio.CancelledError):
            return
        except (PermanentError, RetryableError, OSError, ValueError) as error:
            answer = _failed(upload, f"{type(error).__name__}: {error}")
        if give_up.is_set():
            return
        running = self._running.get(of)
        if running is not None and running.give_up is give_up:
            del self._running[of]
        if isinstance(answer, UploadFailed):
            logger.warning("shard of %s rank %d, attempt %d: %s", of.job, of.rank, request.attempt, answer.reason)
        else:
            kept = Kept(attempt=request.attempt, step=request.step, size_bytes=upload.size_bytes, digest=answer.digest)
            self._keep(of, upload.slot, kept)
        self._emit(answer)


class SlotTaken(PermanentError):
    """The slot does not hold this attempt's state, or not any more."""

    def __str__(self) -> str:
        return "a later attempt was staged before this one was stored"


def _send(upload: Upload, slot: _Slot, give_up: threading.Event, meter: UploadMeter, bases: Bases) -> UploadDone:
    """In a thread: digest the slot's bytes and put those that storage lacks. Returns when it has confirmed them."""
    request = upload.request
    store = shared_store(request.store)
    retry = partial(with_retries, deadline_s=DEADLINE_S, give_up=give_up, advance=lambda: meter.furthest)
    base = bases.find(upload, store, give_up)
    baseless = base is None and any(named.rank == upload.rank for named in request.bases)
    key = shard_key(upload.job, request.checkpoint, request.attempt, upload.rank, baseless=baseless)
    beside = index_key(upload.job, request.checkpoint, request.attempt, upload.rank, baseless=baseless)
    with slot.path.open("rb") as file, slot.memory(file.fileno(), upload.size_bytes) as memory:
        made = _packed(memory, upload, base, key)
        packed = FileParts(file=file.fileno(), ranges=made.fresh_ranges, memory=memory)
        shard = FileParts(file=file.fileno(), ranges=made.ranges, head=made.head, memory=memory)

        total_bytes = packed.size_bytes + shard.size_bytes

        def put_pack(name: str) -> None:
            meter.begin(total_bytes)
            store.put_file(name, packed, meter=meter)

        def put_shard() -> None:
            failpoints.hit(Point.UPLOAD_BEFORE)
            meter.begin(total_bytes, done_bytes=packed.size_bytes)
            store.put_file(key, shard, meter=meter)
            failpoints.hit(Point.UPLOAD_WITHIN)

        if made.fresh is not None:
            name = made.fresh.key
            retry(lambda: put_pack(name))
        retry(put_shard)

    def put_index() -> None:
        meter.before(len(made.index))
        store.put(beside, made.index)
        failpoints.hit(Point.UPLOAD_AFTER)

    retry(put_index)
    bases.keep(upload, made.index)
    return UploadDone(
        job=upload.job,
        generation=upload.generation,
        rank=upload.rank,
        attempt=request.attempt,
        key=key,
        size_bytes=made.size_bytes,
        digest=made.digest,
        index_key=beside,
        index_digest=blob_digest(made.index),
        packs=made.packs,
        state_bytes=upload.size_bytes,
    )


def _packed(memory: memoryview, upload: Upload, base: IndexedShard | None, key: str) -> StoredShard:
    return store_image(
        memory,
        pack_key=lambda digest: pack_key(upload.job, upload.request.attempt, upload.rank, digest),
        base=base,
        key=key,
    )


def _failed(upload: Upload, reason: str) -> UploadFailed:
    return UploadFailed(
        job=upload.job,
        generation=upload.generation,
        rank=upload.rank,
        attempt=upload.request.attempt,
        reason=reason,
    )
