"""Watches the workers' registrations in etcd and turns them into facts.

The truth is a listing; the watch only tells sooner. Every few seconds, and when the watch breaks for good (its
revision was compacted), the prefix is listed again and the difference becomes facts.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from dtrain.common.errors import PermanentError, RetryableError, UserError
from dtrain.common.names import WorkerId, worker_id
from dtrain.coordinator.core.facts import Fact, Registration, RegistrationsListed, WorkerRegistered, WorkerUnregistered
from dtrain.etcd.client import EtcdClient, KeyValue
from dtrain.etcd.watches import ChangeKind, watch_a_while

logger = logging.getLogger(__name__)

_RETRY_S = 0.5


def workers_prefix(prefix: str) -> str:
    return f"{prefix}/workers/"


def _registration(prefix: str, kv: KeyValue) -> Registration | None:
    """The registration under this key; None, and a warning, if it is not one."""
    try:
        name = worker_id(kv.key.removeprefix(workers_prefix(prefix)))
        found = msgspec.json.decode(kv.value, type=Registration)
    except (msgspec.DecodeError, UnicodeDecodeError, UserError) as error:
        logger.warning("%s is not a registration: %s", kv.key, error)
        return None
    if found.worker != name:
        logger.warning("%s says it is the registration of %s", kv.key, found.worker)
        return None
    return found


async def follow_registrations(client: EtcdClient, prefix: str, tell: Callable[[Fact], Awaitable[None]]) -> None:
    """Tell of every registration that appears, changes or goes, until cancelled."""
    known: dict[WorkerId, Registration] = {}
    start = workers_prefix(prefix)
    while True:
        try:
            kvs, revision = await client.range_prefix(start)
            present = {r.worker: r for kv in kvs if (r := _registration(prefix, kv)) is not None}
            for registration in present.values():
                if known.get(registration.worker) != registration:
                    await tell(WorkerRegistered(registration=registration))
            for worker in sorted(known.keys() - present.keys()):
                await tell(WorkerUnregistered(worker=worker))
            known = present
            await tell(RegistrationsListed())
            async for batch in watch_a_while(client, start, from_revision=revision + 1):
                for change in batch.events:
                    if change.kind is ChangeKind.DELETE:
                        worker = WorkerId(change.kv.key.removeprefix(start))
                        known.pop(worker, None)
                        await tell(WorkerUnregistered(worker=worker))
                    elif (found := _registration(prefix, change.kv)) is not None:
                        known[found.worker] = found
                        await tell(WorkerRegistered(registration=found))
        except (RetryableError, PermanentError) as error:
            logger.warning("registrations are listed again: %s", error)
            await asyncio.sleep(_RETRY_S)
