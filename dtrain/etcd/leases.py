"""Leases: how etcd and others learn that this process is gone, and how this process learns that they think so.

A lease that etcd has dropped and its owner still believes in is the dangerous case, so the owner's deadline
is the earlier of the two by construction: it counts on the local monotonic clock from before each request was
sent, while etcd counts from when it arrived. When the deadline passes without an answer, the lease counts as
lost, whatever etcd thinks. A lease says who is alive; it never protects data.

After a restart etcd starts every lease again with its full time to live: a key may outlive its owner by twice
that time, never the other way round. etcd's smallest time to live is 2 s; :attr:`Lease.ttl_s` is what was granted.
"""

import asyncio
import contextlib
import logging
import math
import time
from typing import Self

import grpc
import grpc.aio

from dtrain.common.errors import PermanentError, RetryableError
from dtrain.etcd import wire_pb2 as wire
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import EtcdUnavailable, LeaseLost, NoSpace, OutcomeUnknown, translate
from dtrain.etcd.transport import STREAM_ENDED

logger = logging.getLogger(__name__)

BEATS_A_TTL = 3  # two beats may be lost before the lease is
_BEAT_TIMEOUT_PART = 4  # a beat waits a quarter of the time to live, so that a second member can still be asked
_BEAT_TIMEOUT_MIN_S = 0.05
_RETRY_S = 0.1  # after a failed beat: many tries fit into the smallest time to live, and none is a storm
_REVOKE_TIMEOUT_S = 1.0  # revoking is a courtesy; the lease ends by itself


class Lease:
    """One granted lease. Made by :meth:`grant`; kept by a task that runs :meth:`keep_alive`."""

    def __init__(self, client: EtcdClient, *, lease_id: int, ttl_s: int, deadline_s: float) -> None:
        self.id = lease_id
        self.ttl_s = ttl_s  # as granted, which may be more than was asked for
        self.lost = asyncio.Event()  # set once, never cleared: the lease is gone or must be thought gone
        self._client = client
        self._deadline_s = deadline_s  # local monotonic clock

    @classmethod
    async def grant(cls, client: EtcdClient, ttl_s: float) -> Self:
        """Ask for a lease of ``ttl_s`` seconds, rounded up. Raises EtcdUnavailable or NoSpace; safe to repeat."""
        sent_s = time.monotonic()
        request = wire.LeaseGrantRequest(TTL=math.ceil(ttl_s))
        try:
            response = await client.transport.call("Lease/LeaseGrant", request, wire.LeaseGrantResponse, write=True)
        except OutcomeUnknown as error:
            # A lease that nobody knows holds no key and ends by itself, so for the caller nothing has happened.
            raise EtcdUnavailable(f"no lease was granted: {error}") from error
        return cls(client, lease_id=response.ID, ttl_s=response.TTL, deadline_s=sent_s + response.TTL)

    def deadline(self) -> float:
        """Return the moment (``time.monotonic()``, seconds) from which the lease must be thought gone."""
        return self._deadline_s

    def alive(self) -> bool:
        """Whether the lease may still be relied on, judged by the local clock alone."""
        return not self.lost.is_set() and time.monotonic() < self._deadline_s

    async def keep_alive(self) -> None:
        """Renew until the lease is lost; then set :attr:`lost` and return. Never raises for the world's failures."""
        pause_s = self.ttl_s / BEATS_A_TTL
        while not self.lost.is_set():
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                self._lose(f"no answer for {self.ttl_s} s")
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(pause_s, left_s)):
                    await self.lost.wait()
            pause_s = await self._beat()

    async def revoke(self) -> None:
        """Give the lease back so that its keys vanish now. Best effort: it ends by itself otherwise."""
        self.lost.set()
        request = wire.LeaseRevokeRequest(ID=self.id)
        try:
            await self._client.transport.call(
                "Lease/LeaseRevoke", request, wire.LeaseRevokeResponse, write=True, timeout_s=_REVOKE_TIMEOUT_S
            )
        except (RetryableError, PermanentError) as error:
            logger.info("lease %x was not revoked (%s); it ends within %s s", self.id, error, self.ttl_s)

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            logger.warning("lease %x is lost: %s", self.id, why)
            self.lost.set()

    async def _beat(self) -> float:
        """Renew once if there is still time; return the seconds until the next beat."""
        sent_s = time.monotonic()
        left_s = self._deadline_s - sent_s
        if self.lost.is_set() or left_s <= 0:
            return 0.0
        timeout_s = min(left_s, max(_BEAT_TIMEOUT_MIN_S, self.ttl_s / _BEAT_TIMEOUT_PART))
        try:
            ttl_s = await renew(self._client, self.id, timeout_s=timeout_s)
        except LeaseLost as error:
            self._lose(str(error))
            return 0.0
        except RetryableError as error:
            logger.info("lease %x was not renewed, %.1f s left: %s", self.id, left_s, error)
            return _RETRY_S
        self._deadline_s = sent_s + ttl_s
        return ttl_s / BEATS_A_TTL


async def renew(client: EtcdClient, lease_id: int, *, timeout_s: float) -> int:
    """Renew any lease once; return its time to live in seconds. Raises LeaseLost, NoSpace or EtcdUnavailable.

    A stream a beat: nothing is left to go stale on a dead link.
    """
    transport = client.transport
    member = transport.member
    call = transport.stream(
        "Lease/LeaseKeepAlive", wire.LeaseKeepAliveRequest, wire.LeaseKeepAliveResponse, timeout_s=timeout_s
    )
    try:
        await call.write(wire.LeaseKeepAliveRequest(ID=lease_id))
        response = await call.read()
    except grpc.aio.AioRpcError as error:
        transport.leave(member)
        meaning = translate(error, write=False)
        # Only etcd's own "lease not found" ends a lease early; any other refusal is this member's trouble.
        if isinstance(meaning, (LeaseLost, NoSpace, EtcdUnavailable)):
            raise meaning from error
        raise EtcdUnavailable(str(meaning)) from error
    except asyncio.InvalidStateError as error:
        # grpc.aio says so when the stream had already ended before the write.
        transport.leave(member)
        raise EtcdUnavailable("the stream ended before the lease was renewed") from error
    finally:
        call.cancel()
    if response is STREAM_ENDED:
        transport.leave(member)
        raise EtcdUnavailable("the stream ended without an answer")
    assert isinstance(response, wire.LeaseKeepAliveResponse)
    if response.TTL <= 0:
        raise LeaseLost(f"etcd no longer knows lease {lease_id:x}")
    return response.TTL
