"""One leader at a time: a key bound to a lease, and the term that its create revision gives.

The term grows with each leader, since revisions do. It fences everything: an append compares it inside etcd,
and workers refuse commands of an older one. So the lease only has to bring a new leader soon, never to keep
the old one out.

A leader that died leaves its key for the rest of its lease. If the newcomer runs on the same machine and sees
that the process named in the key is gone, it removes exactly that key and need not wait: a fact, not a guess.
"""

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dtrain.common.errors import RetryableError
from dtrain.common.names import Term
from dtrain.etcd.client import EtcdClient, KeyValue
from dtrain.etcd.errors import Compacted, LeaseLost
from dtrain.etcd.leases import Lease
from dtrain.etcd.transactions import absent, create_revision_is, delete, put
from dtrain.etcd.watches import ChangeKind, watch

logger = logging.getLogger(__name__)

LEASE_TTL_S = 5  # a leader that died with its machine is replaced within this and an election's few milliseconds
_RETRY_S = 0.2
_LOOK_AGAIN_S = 2.0  # a watch is a hint: the key is read again at least this often


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """Which process on which machine, so that others on that machine can see whether it still runs."""

    boot: str  # of the kernel; differs between machines and between boots
    pid_namespace: int
    pid: int
    start_ticks: int  # of the kernel's clock since boot at the process's start, to tell a reused pid


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRecord:
    """The value of the leader key."""

    id: str
    address: str
    started: float  # unix time
    process: ProcessIdentity


def this_process() -> ProcessIdentity:
    """Identity of the calling process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    pid = os.getpid()
    return ProcessIdentity(
        boot=boot.read_text().strip() if boot.exists() else "",
        pid_namespace=namespace.stat().st_ino if namespace.exists() else 0,
        pid=pid,
        start_ticks=(_start_ticks(pid) or 0) if boot.exists() else 0,
    )


def _start_ticks(pid: int) -> int | None:
    """When the process started, in ticks since boot; None if only its remains are there. Raises OSError.

    Not as unix time, which is computed from the wall clock: after a step of that clock two processes would
    disagree about it, and a living leader would look like a reused pid.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()  # what follows the name, which may hold anything
    return None if fields[0] in ("Z", "X") else int(fields[19])


def is_gone(process: ProcessIdentity) -> bool:
    """True only if it is certain that the process has ended: same machine, same pids, and it is not there."""
    here = this_process()
    if not here.boot or (here.boot, here.pid_namespace) != (process.boot, process.pid_namespace):
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody's: of whom, only /proc may say
    try:
        return _start_ticks(process.pid) != process.start_ticks
    except OSError:
        return False  # a /proc that hides other people's processes: not certain


class Leadership:
    """A won election: the term, and the lease that it rests on."""

    def __init__(self, *, key: str, term: Term, lease: Lease, keeper: asyncio.Task[None]) -> None:
        self.key = key
        self.term = term
        self._lease = lease
        self._keeper = keeper

    def alive(self) -> bool:
        return self._lease.alive()

    async def lost(self) -> None:
        """Return once the lease is gone or must be thought gone."""
        await self._lease.lost.wait()

    async def resign(self) -> None:
        """Give the key back at once. Best effort: the lease ends by itself."""
        self._keeper.cancel()
        await self._lease.revoke()


async def read_leader(client: EtcdClient, prefix: str) -> tuple[LeaderRecord, Term] | None:
    """Return the leader's record and term, or None if there is none."""
    kv = await client.get(leader_key(prefix))
    return None if kv is None else (_decode(kv), Term(kv.create_revision))


def leader_key(prefix: str) -> str:
    return f"{prefix}/leader"


def _decode(kv: KeyValue) -> LeaderRecord:
    return msgspec.json.decode(kv.value, type=LeaderRecord)


async def campaign(client: EtcdClient, prefix: str, record: LeaderRecord) -> Leadership:
    """Wait until this process leads."""
    key = leader_key(prefix)
    while True:
        try:
            lease = await Lease.grant(client, LEASE_TTL_S)
            term = await _try_to_lead(client, key, record, lease)
            if term is not None:
                return Leadership(
                    key=key, term=term, lease=lease, keeper=asyncio.create_task(lease.keep_alive(), name="leader lease")
                )
            await lease.revoke()
            await _wait_for_vacancy(client, key)
        except (RetryableError, LeaseLost, Compacted) as error:  # Compacted: between the reading and the watch
            logger.warning("campaign goes on: %s", error)
            await asyncio.sleep(_RETRY_S)


async def _try_to_lead(client: EtcdClient, key: str, record: LeaderRecord, lease: Lease) -> Term | None:
    value = msgspec.json.encode(record)
    try:
        result = await client.txn([absent(key)], [put(key, value, lease=lease.id)])
        if result.succeeded:
            return Term(result.revision)
    except RetryableError as error:
        logger.warning("election is not confirmed, reading back: %s", error)
    kv = await client.get(key)
    if kv is not None and kv.lease == lease.id:
        return Term(kv.create_revision)
    return None


async def _wait_for_vacancy(client: EtcdClient, key: str) -> None:
    """Return when the leader key is gone, or might be."""
    found, revision = await client.range_prefix(key)
    kv = next((kv for kv in found if kv.key == key), None)
    if kv is None:
        return
    if _has_died(kv):
        logger.info("the leader of term %d has died on this machine: removing its key", kv.create_revision)
        await client.txn([create_revision_is(key, kv.create_revision)], [delete(key)])
        return
    try:
        async with asyncio.timeout(_LOOK_AGAIN_S):
            # From the reading on, not from the key's own revision: that of a leader in office for long is compacted.
            async for batch in watch(client, key, from_revision=revision + 1):
                if any(change.kind is ChangeKind.DELETE and change.kv.key == key for change in batch.events):
                    return
    except TimeoutError:
        return


def _has_died(kv: KeyValue) -> bool:
    try:
        return is_gone(_decode(kv).process)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.warning("%s is not a leader's record, waiting for its lease to end: %s", kv.key, error)
        return False


def started_now() -> float:
    """Unix time for a leader's record."""
    return time.time()
