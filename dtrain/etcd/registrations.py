"""A key that says "I am here" for as long as this process lives, whatever happens to etcd meanwhile.

The key is bound to a lease. When the lease is lost (etcd was away, this process was paused), a new one is
taken and the key is put again. The key is also compared, when it changes and now and then, with what it should be: a
put whose answer was lost may be applied late and bind the key to an older lease, an operator may delete it, a restored
etcd may have forgotten it. So this is a level that is held, not an edge that fires once.

The key is never taken back but at the end. A put whose answer was lost is read back at once, and tried again while
its lease lives. A lease that must be thought lost is left alone, not revoked: after an outage etcd starts it again,
and until the key is bound to the next lease it tells the truth. Either would delete a key that is there, and its
owner would be a lost worker for whoever looks in between.

Nor is it let go before it is put anew. Until a put is known to be done, which may take longer than a lease lives, the
lease that the key is bound to now is renewed: an older one of this process, or that of its earlier life, which
``is_own`` recognises. So the key of a process that was killed and is back does not vanish in between; where a late put
bound it to a lease that ends before anybody can renew it, it is put at once, whatever else is under way.

A name has one owner: the newest process that registered it. One that finds its key held by a lease that was
never its own has been replaced, and is told so by :class:`RegistrationTaken`.

Each put holds only while the key is as it was read before: what a killed process had on its way cannot bind the key of
its next life to a dead lease. Where the key was absent in between, such a put may still be applied late, of an earlier
life, perhaps one whose machine lost its disk, so that nothing tells it from a stranger. So a few are put right. A dead
process puts no more; of two that live, the one that was replaced counts first and leaves.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

from dtrain.common.errors import PermanentError, RetryableError
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import LeaseLost
from dtrain.etcd.keyvalues import KeyValue
from dtrain.etcd.leases import BEATS_A_TTL, Lease, renew
from dtrain.etcd.transactions import mod_revision_is, put
from dtrain.etcd.watches import watch

logger = logging.getLogger(__name__)

_RETRY_FIRST_S = 0.1  # an etcd that was merely restarted is back within tenths of a second
_RETRY_MAX_S = 3.0  # after a long outage all workers come back spread over a few seconds, not as one storm
_LATE_PUTS_MAX = 3  # an earlier life had one on its way when it was killed, and so had those before it
_CARRY_TIMEOUT_S = 1.0  # of one renewal of the older lease, or of the put in its place
_CHECK_MIN_S = 1.0  # the key is compared once a time to live, and never more often than this


class RegistrationTaken(PermanentError):
    """Another process has registered the same name since. This one is not the owner any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationChange:
    """What ``on_change`` is told: the key was put, or its lease was lost."""

    registered: bool
    lease: int  # id of the lease in question
    revision: int  # of the store when the key was put; 0 when lost


OnChange = Callable[[RegistrationChange], None]
IsOwn = Callable[[bytes], bool]


async def keep_registered(
    client: EtcdClient,
    key: str,
    value: Callable[[], bytes],
    ttl_s: float,
    *,
    is_own: IsOwn = lambda _: False,
    on_change: OnChange | None = None,
) -> None:
    """Hold ``key`` = ``value()`` under a lease of ``ttl_s`` seconds until cancelled; then take it back.

    ``value`` is asked anew at each put and each comparison, so a changed value reaches etcd within about
    ``ttl_s``. ``is_own`` says of a value found under the key whether an earlier life of this process put it, which
    must be dead by now. ``on_change`` is called in the event loop and must not block. Raises :class:`RegistrationTaken`
    and :class:`~dtrain.etcd.errors.EtcdRefused`; everything else is waited out.
    """
    registration = _Registration(client, key, value, on_change, is_own)
    pause_s = _RETRY_FIRST_S
    try:
        while True:
            try:
                if await registration.hold(await Lease.grant(client, ttl_s)):
                    pause_s = _RETRY_FIRST_S
            except (RetryableError, LeaseLost) as error:
                logger.info("%s is not registered: %s", key, error)
            await asyncio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(pause_s * 2, _RETRY_MAX_S)
    finally:
        await registration.give_back()


class _Registration:
    def __init__(
        self,
        client: EtcdClient,
        key: str,
        value: Callable[[], bytes],
        on_change: OnChange | None,
        is_own: IsOwn = lambda _: False,
    ) -> None:
        self._client = client
        self._key = key
        self._value = value
        self._on_change = on_change
        self._is_own = is_own
        self._leases: set[int] = set()  # every lease this process ever put the key with
        self._bound: list[Lease] = []  # those that the key may be bound to now: the newest, and the one before
        self._late_puts = 0  # found under the key since it was last left alone for a whole time to live
        self._claimed = False  # a put of ours was acknowledged, so that a foreign key is a newer owner's

    async def hold(self, lease: Lease) -> bool:
        """Put the key and keep it until the lease is lost; return whether the key was ever put."""
        self._leases.add(lease.id)
        self._bound = [*self._bound[-1:], lease]
        beating = asyncio.create_task(lease.keep_alive())
        changed, moved = asyncio.Event(), asyncio.Event()
        carrying = asyncio.create_task(self._carry(lease, moved))
        noticing = asyncio.create_task(self._notice(changed, moved))
        beating.add_done_callback(lambda _: changed.set())  # the lease is lost
        registered = False
        try:
            revision = await self._begin(lease)
            carrying.cancel()
            self._bound = [lease]
            while not lease.lost.is_set():
                if revision:
                    registered = True
                    self._tell(RegistrationChange(registered=True, lease=lease.id, revision=revision))
                try:
                    async with asyncio.timeout(max(_CHECK_MIN_S, lease.ttl_s)):
                        await changed.wait()
                except TimeoutError:
                    self._late_puts = 0
                changed.clear()
                if lease.lost.is_set():
                    break
                revision = await self._check(lease)
        finally:
            beating.cancel()
            carrying.cancel()
            noticing.cancel()
            if registered:
                self._tell(RegistrationChange(registered=False, lease=lease.id, revision=0))
        return registered

    async def give_back(self) -> None:
        """Take the key back."""
        await asyncio.gather(*(lease.revoke() for lease in self._bound))

    def _tell(self, change: RegistrationChange) -> None:
        if self._on_change is not None:
            self._on_change(change)

    async def _begin(self, lease: Lease) -> int:
        """Put the key; return its revision. Raises RetryableError when the lease is over before that is done."""
        pause_s, in_doubt = _RETRY_FIRST_S, False
        while True:
            try:
                found = await self._client.get(self._key) if in_doubt else None
                if found is not None and found.lease == lease.id:  # only this process knows this lease
                    self._claimed = True
                    return found.mod_revision
                return await self._restore(lease) if self._claimed else await self._claim(lease)
            except RetryableError as error:
                if not lease.alive():
                    raise
                logger.info("%s may not be registered yet, looking again: %s", self._key, error)
            in_doubt = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s * (0.5 + random.random())):
                    await lease.lost.wait()
            pause_s = min(pause_s * 2, _RETRY_MAX_S)

    async def _carry(self, lease: Lease, moved: asyncio.Event) -> None:
        """Until cancelled, renew the lease that the key is bound to, if it is not ``lease`` and was our own.

        ``moved``: the key was changed, as by a late put of a still earlier life; now another lease may have to be kept.
        If that one was over before anybody could renew it, the key is put without waiting for the put under way.
        """
        was_there = False
        while True:
            pause_s = lease.ttl_s / BEATS_A_TTL
            try:
                found = await self._client.get(self._key)
                if found is None and was_there:
                    async with asyncio.timeout(_CARRY_TIMEOUT_S):
                        await self._put(None, lease, self._value())
                was_there = was_there or found is not None
                if found is not None and found.lease not in (0, lease.id) and self._was_ours(found):
                    pause_s = await renew(self._client, found.lease, timeout_s=_CARRY_TIMEOUT_S) / BEATS_A_TTL
            except LeaseLost as error:
                logger.info("%s ends before it is put anew: %s", self._key, error)
            except (RetryableError, PermanentError, TimeoutError) as error:
                logger.info("%s may end before it is put anew: %s", self._key, error or "no answer yet")
                pause_s = _RETRY_FIRST_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await moved.wait()
            moved.clear()

    async def _notice(self, *changed: asyncio.Event) -> None:
        """Until cancelled, set ``changed`` when the key was changed: a hint that it is to be looked at, and no more."""
        while True:
            try:
                async for batch in watch(self._client, self._key, from_revision=0):
                    if any(change.kv.key == self._key for change in batch.events):
                        for event in changed:
                            event.set()
            except (RetryableError, PermanentError) as error:
                logger.info("%s is not watched for now: %s", self._key, error)
            await asyncio.sleep(_RETRY_MAX_S)

    def _was_ours(self, found: KeyValue) -> bool:
        return found.lease in self._leases or self._is_own(found.value)

    async def _claim(self, lease: Lease) -> int:
        """Take the name from whoever had it: a restarted process replaces its older self at once."""
        while True:
            revision = await self._put(await self._client.get(self._key), lease, self._value())
            if revision:
                self._claimed = True
                return revision

    async def _check(self, lease: Lease) -> int:
        """Compare, and restore what differs. An etcd that is away is no reason to give up a living lease."""
        try:
            return await self._restore(lease)
        except RetryableError as error:
            logger.info("%s could not be compared: %s", self._key, error)
            return 0

    async def _restore(self, lease: Lease) -> int:
        """Make the key what it should be, unless it is another's; return the revision, 0 if it already was."""
        wanted = self._value()
        while True:
            found = await self._client.get(self._key)
            if found is not None and found.lease not in self._leases:
                self._late_puts += 1
                if self._late_puts > _LATE_PUTS_MAX:
                    raise RegistrationTaken(f"{self._key} was registered by another process since.")
            if found is not None and found.lease == lease.id and found.value == wanted:
                return 0
            if revision := await self._put(found, lease, wanted):
                return revision

    async def _put(self, found: KeyValue | None, lease: Lease, value: bytes) -> int:
        """Put the key if nobody has since it was ``found``; return the revision, 0 if somebody has."""
        unchanged = mod_revision_is(self._key, 0 if found is None else found.mod_revision)
        done = await self._client.txn([unchanged], [put(self._key, value, lease.id)])
        return done.revision if done.succeeded else 0
