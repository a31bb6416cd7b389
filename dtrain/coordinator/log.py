"""The event log: a fenced, contiguous append, and replay.

One transaction carries everything decided in a round, for all jobs. It succeeds only while the leader key's
create revision is still this leader's term and the first new sequence number of each job is still free; the
numbers after it are then free too, because events are only ever appended in order and in whole transactions.
What is too much for one transaction is cut into several, if need be between two events of a job: each event folds
on its own, so a successor that finds only the first of them goes on from there. Nothing is acted upon before all
are durable.

A lost answer is resolved by reading back: the transaction is atomic, so if the first event is there with
exactly these bytes, all of it is; if the key is absent it was not applied, or not yet, and trying again is
safe, since a late first try makes the second one's compare fail and the bytes are then found to be ours. The
bytes of another mean that another leads.
"""

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from itertools import groupby

from dtrain.common import failpoints
from dtrain.common.errors import DtrainError, InvariantError, LogDamagedError, RetryableError
from dtrain.common.failpoints import Point
from dtrain.common.names import JobName, Term
from dtrain.coordinator.codec import Entry
from dtrain.coordinator.core.events import CheckpointCommitted
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.states import JobState
from dtrain.coordinator.election import Leadership
from dtrain.coordinator.history import in_slices, read_all
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import EtcdRefused
from dtrain.etcd.transactions import absent, create_revision_is, put

logger = logging.getLogger(__name__)

# Below etcd's 128 operations and 1.5 MiB, with room for what surrounds them.
TXN_EVENTS_MAX = 100
TXN_BYTES_MAX = 1_000_000
# Compares are kept few: old etcd releases lost acknowledged transactions with many of them.
TXN_JOBS_MAX = 16
_RETRY_FIRST_S = 0.05
_RETRY_MAX_S = 1.0


class Deposed(DtrainError):
    """This process does not lead any more. Everything it knows is thrown away."""


class EventLog:
    """Appends for one leadership."""

    def __init__(self, client: EtcdClient, leadership: Leadership) -> None:
        self._client = client
        self._leadership = leadership

    @property
    def term(self) -> Term:
        return self._leadership.term

    async def revision(self) -> int:
        """Newest revision of this etcd. Raises RetryableError."""
        return (await self._client.status()).revision

    async def require_newest(self) -> None:
        """Return if the leader key in etcd is still of this term; raise Deposed otherwise.

        The local clock cannot say so: it stood still while this machine did.
        """
        while True:
            self._require_leadership()
            try:
                kv = await self._client.get(self._leadership.key)
            except RetryableError as error:
                logger.warning("cannot read who leads: %s", error)
                await asyncio.sleep(_RETRY_FIRST_S)
                continue
            if kv is None or kv.create_revision != self.term:
                raise Deposed(f"the leader key is not of term {self.term} any more")
            return

    async def append(self, entries: Sequence[Entry]) -> None:
        """Make all entries durable, in order. Raises Deposed; then some, and only a prefix, may be durable."""
        for batch in _batches(entries):
            await self._append_one(batch)

    async def _append_one(self, batch: Sequence[Entry]) -> None:
        firsts = {entry.record.job: entry for entry in reversed(batch)}
        compares = [create_revision_is(self._leadership.key, self.term)]
        compares += [absent(entry.record.key) for entry in firsts.values()]
        writes = [put(entry.record.key, entry.value) for entry in batch]
        commits = any(isinstance(entry.record.event, CheckpointCommitted) for entry in batch)
        pause_s = _RETRY_FIRST_S
        while True:
            self._require_leadership()
            try:
                failpoints.hit(Point.COMMIT_BEFORE if commits else Point.APPEND_BEFORE)
                result = await self._client.txn(compares, writes)
                if result.succeeded:
                    failpoints.hit(Point.COMMIT_AFTER if commits else Point.APPEND_AFTER)
                    return
                if await self._is_there(batch[0]):
                    return
                raise Deposed(f"another leader has appended {batch[0].record.key}, or holds the leader key")
            except EtcdRefused as error:
                raise InvariantError(
                    f"etcd refuses {len(batch)} events from {batch[0].record.key} on: {error}"
                ) from error
            except RetryableError as error:
                logger.warning("append of %s is not confirmed: %s", batch[0].record.key, error)
            await asyncio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(pause_s * 2, _RETRY_MAX_S)
            if await self._is_there(batch[0]):
                return

    async def _is_there(self, entry: Entry) -> bool:
        """True if the entry is in the log by its content, False if its key is absent. Raises Deposed otherwise."""
        while True:
            self._require_leadership()
            try:
                kv = await self._client.get(entry.record.key)
            except RetryableError as error:
                logger.warning("cannot read back %s: %s", entry.record.key, error)
                await asyncio.sleep(_RETRY_FIRST_S)
                continue
            if kv is None:
                return False
            if kv.value == entry.value:
                return True
            raise Deposed(f"{entry.record.key} was written by another leader")

    def _require_leadership(self) -> None:
        if not self._leadership.alive():
            raise Deposed(f"the lease of term {self.term} is over")


def _size_bytes(events: Sequence[Entry]) -> int:
    return sum(len(entry.value) + len(entry.record.key) for entry in events)


def _pieces(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Each job's events, cut where they are too many or too large for any transaction."""
    for _, group in groupby(entries, key=lambda entry: entry.record.job):
        piece: list[Entry] = []
        piece_bytes = 0
        for entry in group:
            entry_bytes = _size_bytes([entry])
            if piece and (len(piece) == TXN_EVENTS_MAX or piece_bytes + entry_bytes > TXN_BYTES_MAX):
                yield piece
                piece, piece_bytes = [], 0
            piece.append(entry)
            piece_bytes += entry_bytes
        yield piece


def _batches(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Cut into transactions within etcd's limits. A job's events stay in one where they fit."""
    batches: list[list[Entry]] = [[]]
    jobs = size_bytes = 0
    for events in _pieces(entries):
        group_bytes = _size_bytes(events)
        full = len(batches[-1]) + len(events) > TXN_EVENTS_MAX
        if batches[-1] and (full or jobs == TXN_JOBS_MAX or size_bytes + group_bytes > TXN_BYTES_MAX):
            batches.append([])
            jobs = size_bytes = 0
        batches[-1].extend(events)
        jobs += 1
        size_bytes += group_bytes
    return batches if batches[0] else []


async def replay(client: EtcdClient, prefix: str) -> dict[JobName, JobState]:
    """Fold every job's log, and let others run meanwhile: a lease must live through a log of any length.

    Raises LogDamagedError naming the key of the first event that does not fit, and Compacted.
    """
    found = await read_all(client, prefix)
    jobs: dict[JobName, JobState] = {}
    async for name, event in in_slices((name, event) for name, events in found.items() for event in events):
        try:
            jobs[name] = evolve(jobs.get(name), event)
        except InvariantError as error:
            raise LogDamagedError(event.key, str(error)) from error
    return jobs
