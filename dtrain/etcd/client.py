"""A thin client of etcd's v3 API: keys, ranges at one revision, transactions, status.

Why our own: dtrain needs a small part of the API and exact behaviour in failure. Reads are repeated inside;
a write is repeated inside only when it provably never left. Everything else surfaces as the errors of
:mod:`dtrain.etcd.errors`, because only the caller knows what to read back.

Reads are linearizable: they see every write acknowledged before they began, on any member.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from dtrain.etcd import wire_pb2 as wire
from dtrain.etcd.errors import AnswerTooLarge
from dtrain.etcd.keyvalues import KeyValue, after, from_wire, prefix_end
from dtrain.etcd.transactions import Compare, Op, TxnResult, compare_to_wire, op_to_wire, result_from_wire
from dtrain.etcd.transport import Transport

__all__ = ["EtcdClient", "KeyValue", "Status", "TxnResult"]

PAGE_KEYS = 1000  # keys a page: 136k events/s were read so, and a page stays far below the message limit
_DELETE_KEYS = 1000  # keys deleted at a time: one larger deletion would block every other write meanwhile
DEFRAGMENT_TIMEOUT_S = 60.0  # a member rewrites its whole file, at most the quota, and answers nothing meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the member in use says about itself."""

    version: str  # of the server, as in "3.5.16"
    revision: int  # of the store, as this member has it
    db_size_bytes: int  # of the file, which only a defragmentation shrinks
    db_in_use_bytes: int  # of the file's part that holds data, <= db_size_bytes
    has_leader: bool


class EtcdClient:
    """Talks to one member of ``endpoints`` ("host:port") at a time and moves on when it fails.

    ``timeout_s`` bounds each call as a whole, its repetitions included. One client belongs to one event loop.
    """

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float = 5.0) -> None:
        self.transport = Transport(endpoints, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.transport.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self.transport.endpoints

    # -- reads: repeated inside, raise EtcdUnavailable at the end of their time -----------------------

    async def get(self, key: str) -> KeyValue | None:
        response = await self.transport.call(
            "KV/Range", wire.RangeRequest(key=key.encode()), wire.RangeResponse, write=False
        )
        return from_wire(response.kvs[0]) if response.kvs else None

    async def range_prefix(
        self, prefix: str, *, page: int = PAGE_KEYS, revision: int = 0
    ) -> tuple[list[KeyValue], int]:
        """Return all keys that start with ``prefix``, in order, and the one revision they were read at.

        ``revision`` 0 is the newest. Watch from the returned revision + 1 to miss nothing. Raises
        :class:`~dtrain.etcd.errors.Compacted` when that revision is no longer kept.
        """
        found: list[KeyValue] = []
        async for kvs, read_at in self._pages(prefix, page=page, revision=revision):
            found.extend(kvs)
            revision = read_at
        return found, revision

    async def scan(self, prefix: str, *, page: int = PAGE_KEYS, revision: int = 0) -> AsyncIterator[KeyValue]:
        """Yield what :meth:`range_prefix` returns, with one page in memory at a time."""
        async for kvs, _ in self._pages(prefix, page=page, revision=revision):
            for kv in kvs:
                yield kv

    async def _pages(self, prefix: str, *, page: int, revision: int) -> AsyncIterator[tuple[list[KeyValue], int]]:
        start, end = prefix, prefix_end(prefix)
        while True:
            request = wire.RangeRequest(key=start.encode(), range_end=end, limit=page, revision=revision)
            try:
                response = await self.transport.call("KV/Range", request, wire.RangeResponse, write=False)
            except AnswerTooLarge:
                if page == 1:
                    raise
                page = max(1, page // 2)
                continue
            # Later pages are read at the first one's revision, or a writer could slip between two pages.
            revision = revision or response.header.revision
            kvs = [from_wire(kv) for kv in response.kvs]
            yield kvs, revision
            if not response.more:
                return
            start = after(kvs[-1].key)

    # -- writes: sent once; OutcomeUnknown when the answer was lost -----------------------------------

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write ``value`` under ``key``; return the revision. A dead ``lease`` raises LeaseLost."""
        request = wire.PutRequest(key=key.encode(), value=value, lease=lease)
        response = await self.transport.call("KV/Put", request, wire.PutResponse, write=True)
        return response.header.revision

    async def delete(self, key: str) -> bool:
        """Delete ``key``; return whether it was there."""
        request = wire.DeleteRangeRequest(key=key.encode())
        response = await self.transport.call("KV/DeleteRange", request, wire.DeleteRangeResponse, write=True)
        return response.deleted > 0

    async def delete_prefix(self, prefix: str) -> int:
        """Delete all keys that start with ``prefix``; return how many. Not atomic: done in chunks, in order.

        A failure leaves a tail of the keys; calling again deletes it. Keys made meanwhile may be deleted too.
        """
        end, deleted = prefix_end(prefix), 0
        while True:
            request = wire.RangeRequest(key=prefix.encode(), range_end=end, limit=_DELETE_KEYS, keys_only=True)
            listed = await self.transport.call("KV/Range", request, wire.RangeResponse, write=False)
            if not listed.kvs:
                return deleted
            chunk_end = listed.kvs[-1].key + b"\0" if listed.more else end
            chunk = wire.DeleteRangeRequest(key=prefix.encode(), range_end=chunk_end)
            response = await self.transport.call("KV/DeleteRange", chunk, wire.DeleteRangeResponse, write=True)
            deleted += response.deleted
            if not listed.more:
                return deleted

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        """Do ``then`` if all ``compares`` hold, else ``otherwise``; atomically. The parts are built by
        :mod:`dtrain.etcd.transactions`."""
        request = wire.TxnRequest(
            compare=[compare_to_wire(compare) for compare in compares],
            success=[op_to_wire(op) for op in then],
            failure=[op_to_wire(op) for op in otherwise],
        )
        response = await self.transport.call("KV/Txn", request, wire.TxnResponse, write=True)
        return result_from_wire(response)

    # -- upkeep --------------------------------------------------------------------------------------

    async def status(self) -> Status:
        response = await self.transport.call(
            "Maintenance/Status", wire.StatusRequest(), wire.StatusResponse, write=False
        )
        return Status(
            version=response.version,
            revision=response.header.revision,
            db_size_bytes=response.dbSize,
            db_in_use_bytes=response.dbSizeInUse,
            has_leader=response.leader != 0,
        )

    async def compact(self, revision: int) -> None:
        """Forget old versions below ``revision``. Keys' newest versions stay. Raises Compacted if already done."""
        request = wire.CompactionRequest(revision=revision, physical=True)
        await self.transport.call("KV/Compact", request, wire.CompactionResponse, write=True)

    async def defragment(self) -> None:
        """Give the member's free space back to its disk. It answers nothing else meanwhile."""
        await self.transport.call(
            "Maintenance/Defragment",
            wire.DefragmentRequest(),
            wire.DefragmentResponse,
            write=True,
            timeout_s=DEFRAGMENT_TIMEOUT_S,
        )

    async def disarm_no_space(self) -> int:
        """Let etcd write again after space was freed; return how many alarms were taken back.

        Order matters: delete, compact, defragment, and only then this, or the alarm rises again.
        """
        listed = await self.transport.call(
            "Maintenance/Alarm",
            wire.AlarmRequest(action=wire.AlarmRequest.GET, alarm=wire.NOSPACE),
            wire.AlarmResponse,
            write=False,
        )
        for alarm in listed.alarms:
            request = wire.AlarmRequest(
                action=wire.AlarmRequest.DEACTIVATE, memberID=alarm.memberID, alarm=wire.NOSPACE
            )
            await self.transport.call("Maintenance/Alarm", request, wire.AlarmResponse, write=True)
        return len(listed.alarms)
