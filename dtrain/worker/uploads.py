"""Sends staged shards from shared memory to storage, and says when storage has confirmed them.

The trainer trains on meanwhile, so nothing here may hold it: uploads run in threads of lower priority (on Linux
a thread has a nice value of its own), read the stage slot through a map without a copy, and are bounded in time,
since a checkpoint that is late is better aborted than pursued.

An agent killed after storage confirmed and before its journal knew it uploads again when it comes back: the same
bytes under the same key, which changes nothing.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dtrain.common.digests import blob_digest
from dtrain.common.errors import PermanentError, RetryableError
from dtrain.common.mailbox import pack
from dtrain.storage.keys import shard_key
from dtrain.storage.objects import ObjectStore
from dtrain.storage.retrying import GaveUp, with_retries
from dtrain.storage.uris import open_store
from dtrain.worker.core.actions import Upload
from dtrain.worker.core.inputs import UploadDone, UploadFailed
from dtrain.worker.rank_dirs import RankId
from dtrain.worker.tasks import Begin

logger = logging.getLogger(__name__)

DEADLINE_S = 300.0  # for one shard, all tries together: then the attempt fails and a later one is made
THREADS = 4  # shards of one node that travel at once; more only share the same network
NICENESS = 10  # below every trainer
STORES_MAX = 8  # stores kept open: a node sees few, and an open one costs a connection pool


@lru_cache(maxsize=STORES_MAX)
def shared_store(uri: str) -> ObjectStore:
    """Return the store of this URI, the same one for every transfer."""
    return open_store(uri)


def transfer_threads(name: str) -> ThreadPoolExecutor:
    """Threads that give way to the trainers."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix=name, initializer=_give_way)


def _give_way() -> None:
    with contextlib.suppress(OSError):  # a sandbox may forbid even this; then uploads compete, and still work
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


@dataclass(frozen=True, slots=True)
class _Running:
    upload: Upload
    task: asyncio.Task[None]
    give_up: threading.Event


class Uploads:
    """All uploads of the agent; at most one a rank. Used in the event loop only."""

    def __init__(
        self,
        emit: Callable[[UploadDone | UploadFailed], None],
        staged_word: Callable[[RankId], int],
        begin: Begin,
    ) -> None:
        self._emit = emit
        self._begin = begin
        self._staged_word = staged_word
        self._threads = transfer_threads("upload")
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
        task = self._begin(self._run(of, upload, folder, give_up))
        self._running[of] = _Running(upload, task, give_up)

    def drop(self, job: str, generation: int) -> None:
        """Give up the uploads of a generation."""
        for of in [of for of in self._running if of.job == job and of.generation == generation]:
            self._running.pop(of).give_up.set()

    def close(self) -> None:
        for running in self._running.values():
            running.give_up.set()
            running.task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, of: RankId, upload: Upload, folder: Path, give_up: threading.Event) -> None:
        request = upload.request
        try:
            answer: UploadDone | UploadFailed = await asyncio.get_running_loop().run_in_executor(
                self._threads, _send, upload, folder / f"slot{upload.slot}", give_up
            )
        except (GaveUp, asyncio.CancelledError):
            return
        except (PermanentError, RetryableError, OSError, ValueError) as error:
            answer = _failed(upload, f"{type(error).__name__}: {error}")
        if give_up.is_set():
            return
        # What was sent is only what was staged if no later attempt was copied over it meanwhile.
        if isinstance(answer, UploadDone) and self._staged_word(of) != pack(request.attempt, request.step):
            answer = _failed(upload, "a later attempt was staged before this one was stored")
        running = self._running.get(of)
        if running is not None and running.give_up is give_up:
            del self._running[of]
        if isinstance(answer, UploadFailed):
            logger.warning("shard of %s rank %d, attempt %d: %s", of.job, of.rank, request.attempt, answer.reason)
        self._emit(answer)


def _send(upload: Upload, slot: Path, give_up: threading.Event) -> UploadDone:
    """In a thread: digest the slot's bytes and put them. Returns when storage has confirmed them."""
    request = upload.request
    key = shard_key(upload.job, request.checkpoint, request.attempt, upload.rank)
    store = shared_store(request.store)
    with slot.open("rb") as file, mmap.mmap(file.fileno(), upload.size_bytes, access=mmap.ACCESS_READ) as page:
        view = memoryview(page)
        try:
            digest = blob_digest(view)
            with_retries(lambda: store.put(key, view), deadline_s=DEADLINE_S, give_up=give_up)
        finally:
            view.release()
    return UploadDone(
        job=upload.job,
        generation=upload.generation,
        rank=upload.rank,
        attempt=request.attempt,
        key=key,
        size_bytes=upload.size_bytes,
        digest=digest,
    )


def _failed(upload: Upload, reason: str) -> UploadFailed:
    return UploadFailed(
        job=upload.job,
        generation=upload.generation,
        rank=upload.rank,
        attempt=upload.request.attempt,
        reason=reason,
    )
