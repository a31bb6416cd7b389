"""Reading a job's log, with every event checked against the one before it.

A log that was edited, reordered or lost an event in the middle is refused at the first event that does not
fit, by the name of its key. Nothing is skipped and nothing is guessed.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TypeVar

from dtrain.common.errors import LogDamagedError, UserError
from dtrain.common.names import JobName, job_name
from dtrain.coordinator.codec import GENESIS_DIGEST, decode, event_key, events_prefix
from dtrain.coordinator.core.events import RecordedEvent
from dtrain.etcd.client import EtcdClient, KeyValue
from dtrain.etcd.watches import ChangeKind, watch

# Events checked or folded before the loop may run again: at 0.1 ms each, far less than a lease's beat may be late.
SLICE_EVENTS = 256
_Item = TypeVar("_Item")


class ChainReader:
    """Checks one job's events as they come, in order."""

    def __init__(self, prefix: str, job: JobName) -> None:
        self._prefix = prefix
        self._job = job
        self.seq = 0  # of the last event that fitted
        self._digest = GENESIS_DIGEST
        self._term = 0

    def read(self, kv: KeyValue) -> RecordedEvent:
        """Return the next event, or raise LogDamagedError."""
        expected = event_key(self._prefix, self._job, self.seq + 1)
        if kv.key != expected:
            raise LogDamagedError(expected, f"missing: the next key is {kv.key}")
        event = decode(kv.key, kv.value, self._job)
        if event.seq != self.seq + 1:
            raise LogDamagedError(kv.key, f"it says it is event {event.seq}")
        if event.prev != self._digest:
            raise LogDamagedError(kv.key, "it does not follow the event before it: one of the two was changed")
        if event.term < self._term:
            raise LogDamagedError(kv.key, f"its term {event.term} is older than the one before it ({self._term})")
        if kv.version != 1:
            raise LogDamagedError(kv.key, "it was written more than once")
        self.seq, self._digest, self._term = event.seq, event.digest, event.term
        return event


def split_by_job(prefix: str, kvs: Iterable[KeyValue]) -> Iterator[tuple[JobName, KeyValue]]:
    """Give each key under ``<prefix>/jobs/`` that is an event its job."""
    start = f"{prefix}/jobs/"
    for kv in kvs:
        name, _, rest = kv.key.removeprefix(start).partition("/")
        if not rest.startswith("events/"):
            continue
        try:
            yield job_name(name), kv
        except UserError as error:
            raise LogDamagedError(kv.key, "not the key of a valid job name") from error


async def read_history(client: EtcdClient, prefix: str, job: JobName) -> list[RecordedEvent]:
    """Return all events of a job, checked; empty if there is no such job."""
    kvs, _ = await client.range_prefix(events_prefix(prefix, job))
    reader = ChainReader(prefix, job)
    return [reader.read(kv) for kv in kvs]


async def in_slices(items: Iterable[_Item]) -> AsyncIterator[_Item]:
    """Yield the items and let the loop run after each slice of them, or a long log would cost the lease."""
    for number, item in enumerate(items, 1):
        yield item
        if number % SLICE_EVENTS == 0:
            await asyncio.sleep(0)


async def read_all(client: EtcdClient, prefix: str) -> dict[JobName, list[RecordedEvent]]:
    """Return the checked events of all jobs, at one revision. Others may run meanwhile, however many there are."""
    kvs, _ = await client.range_prefix(f"{prefix}/jobs/")
    readers: dict[JobName, ChainReader] = {}
    found: dict[JobName, list[RecordedEvent]] = {}
    async for job, kv in in_slices(split_by_job(prefix, kvs)):
        reader = readers.setdefault(job, ChainReader(prefix, job))
        found.setdefault(job, []).append(reader.read(kv))
    return found


async def follow_history(client: EtcdClient, prefix: str, job: JobName) -> AsyncIterator[RecordedEvent]:
    """Yield all events of a job, those to come included, for ever."""
    kvs, revision = await client.range_prefix(events_prefix(prefix, job))
    reader = ChainReader(prefix, job)
    for kv in kvs:
        yield reader.read(kv)
    async for batch in watch(client, events_prefix(prefix, job), from_revision=revision + 1):
        for change in batch.events:
            if change.kind is ChangeKind.PUT:
                yield reader.read(change.kv)
