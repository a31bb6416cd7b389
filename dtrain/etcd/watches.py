"""Watches: every change of a prefix from a revision on, once and in order, across failures of etcd.

What etcd's stream does not give by itself, and is kept here:

- After a failure the watch resumes behind the last event that was *delivered*. The header's revision will not
  do: in catch-up it is the store's, far ahead of the events.
- A member that lags may repeat older events after a failover; those below the resume point are dropped.
- The events of one revision are one batch, whole: fragments of a large answer are joined first.

A watch catches up slowly (5,000 events/s were measured; paged ranges read 136,000/s): list the prefix with
:meth:`~dtrain.etcd.client.EtcdClient.range_prefix` and watch from its revision + 1.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import Enum

import grpc
import grpc.aio

from dtrain.etcd import wire_pb2 as wire
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import Compacted, EtcdRefused, EtcdUnavailable, translate
from dtrain.etcd.keyvalues import KeyValue, from_wire, prefix_end
from dtrain.etcd.transport import STREAM_ENDED

logger = logging.getLogger(__name__)

_CREATE_TIMEOUT_S = 3.0  # a living member confirms a new watch at once; a silent one is left
_RESUME_FIRST_S = 0.05  # the first pause after a failure; a restarted etcd is back within tenths of a second
_RESUME_MAX_S = 1.0  # the longest pause: an outage of hours ends for the watch one second late
# A watch may stay open and tell nothing: etcd has had such faults, and so have proxies. Drawn between half and one and
# a half. As long as a lease lives, so what a silent watch hides costs about as much again; a listing costs one read.
LOOK_AGAIN_S = 5.0


class ChangeKind(Enum):
    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    kind: ChangeKind
    kv: KeyValue  # after the change; a deleted key has its name and mod_revision only


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchBatch:
    """Changes of one or more whole revisions, in order; never empty."""

    revision: int  # mod_revision of the last event; a new watch would go on from revision + 1
    events: tuple[WatchEvent, ...]


async def watch(client: EtcdClient, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
    """Yield the changes of keys that start with ``prefix`` from ``from_revision`` on (0: from now on), for ever.

    Failures of etcd or the network delay it, and nothing else. Raises :class:`~dtrain.etcd.errors.Compacted`
    when the next revision it needs is no longer kept, and :class:`~dtrain.etcd.errors.EtcdRefused`.
    """
    resume_at = from_revision
    pause_s = _RESUME_FIRST_S
    while True:
        member = client.transport.member
        stream = _Stream(client)
        try:
            opened_at = await stream.open(prefix, resume_at)
            # Asked for "from now on": pin what that means, or a failure right here would skip changes.
            resume_at = resume_at or opened_at + 1
            pause_s = _RESUME_FIRST_S
            while True:
                response = await stream.read()
                events = tuple(_event(event) for event in response.events if event.kv.mod_revision >= resume_at)
                if events:
                    resume_at = events[-1].kv.mod_revision + 1
                    yield WatchBatch(revision=resume_at - 1, events=events)
                elif not response.events:
                    # A progress mark: all up to the header's revision was sent. It keeps an idle watch from
                    # resuming at a revision that has been compacted meanwhile.
                    resume_at = max(resume_at, response.header.revision + 1)
        except EtcdUnavailable as error:
            logger.info("watch of %s resumes at revision %d: %s", prefix, resume_at, error)
            client.transport.leave(member)
        finally:
            stream.close()
        await asyncio.sleep(pause_s * (0.5 + random.random()))
        pause_s = min(pause_s * 2, _RESUME_MAX_S)


async def watch_a_while(client: EtcdClient, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
    """As :func:`watch`, but end after LOOK_AGAIN_S: whoever must not miss a change lists again, and goes on from there.

    So listing and watch take turns, and neither can undo what the other told later.
    """
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + LOOK_AGAIN_S * (0.5 + random.random())
    async with contextlib.aclosing(watch(client, prefix, from_revision=from_revision)) as batches:
        while True:
            try:
                async with asyncio.timeout_at(ends_s):
                    batch = await anext(batches)
            except TimeoutError:
                return
            yield batch


class _Stream:
    """One attempt at a watch, on one member, until it fails. All failures are EtcdUnavailable or for good."""

    def __init__(self, client: EtcdClient) -> None:
        self._call = client.transport.stream("Watch/Watch", wire.WatchRequest, wire.WatchResponse)

    def close(self) -> None:
        self._call.cancel()

    async def open(self, prefix: str, start_revision: int) -> int:
        """Create the watch; return the store's revision at that moment."""
        create = wire.WatchCreateRequest(
            key=prefix.encode(),
            range_end=prefix_end(prefix),
            start_revision=start_revision,
            progress_notify=True,
            fragment=True,
        )
        try:
            async with asyncio.timeout(_CREATE_TIMEOUT_S):
                await self._write(wire.WatchRequest(create_request=create))
                response = await self._read_one()
        except TimeoutError as error:
            raise EtcdUnavailable(f"the watch was not confirmed within {_CREATE_TIMEOUT_S} s") from error
        if not response.created:
            raise EtcdUnavailable("the member answered a new watch with something else")
        return response.header.revision

    async def read(self) -> wire.WatchResponse:
        """Return the next answer, joined from its fragments."""
        whole = await self._read_one()
        more = whole.fragment
        while more:
            part = await self._read_one()
            whole.events.extend(part.events)
            more = part.fragment
        return whole

    async def _write(self, request: wire.WatchRequest) -> None:
        try:
            await self._call.write(request)
        except grpc.aio.AioRpcError as error:
            raise translate(error, write=False) from error
        except asyncio.InvalidStateError as error:
            # grpc.aio says so when the stream had already ended before the write.
            raise EtcdUnavailable("the stream ended before the watch was asked for") from error

    async def _read_one(self) -> wire.WatchResponse:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise translate(error, write=False) from error
        if response is STREAM_ENDED:
            raise EtcdUnavailable("the stream ended")
        assert isinstance(response, wire.WatchResponse)
        if response.compact_revision:
            raise Compacted(
                f"revisions before {response.compact_revision} are compacted",
                compact_revision=response.compact_revision,
            )
        if response.canceled:
            if "no leader" in response.cancel_reason:
                raise EtcdUnavailable(response.cancel_reason)
            raise EtcdRefused(f"etcd ended the watch: {response.cancel_reason or 'no reason given'}")
        return response


def _event(event: wire.Event) -> WatchEvent:
    kind = ChangeKind.DELETE if event.type == wire.Event.DELETE else ChangeKind.PUT
    return WatchEvent(kind=kind, kv=from_wire(event.kv))
