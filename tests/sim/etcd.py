"""A model of etcd: one linearizable store of keys with revisions, transactions, leases, watches and compaction.

Several members give access to it; each may be down, and all of them may have lost their quorum. What the store did is
kept in `history`, which the checkers read and nobody else. Times to live are kept by the world's own clock; after an
outage every lease starts again with its full time, as etcd does it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from dtrain.etcd import wire_pb2 as wire
from tests.sim.loop import SimLoop
from tests.sim.machines import Machine, Process
from tests.sim.network import Link, Network, rpc_error

LEASE_MIN_S = 2


@dataclass(frozen=True, slots=True)
class Change:
    """One key at one revision."""

    at_s: float
    revision: int
    key: str
    value: bytes | None  # None: deleted
    create_revision: int
    version: int
    lease: int


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    ends_s: float
    keys: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Watch:
    link: Link
    member: "Member"
    start: str
    end: str
    next_revision: int

    def covers(self, key: str) -> bool:
        return self.start <= key and (self.end == "" or key < self.end)


@dataclass(frozen=True, slots=True)
class Waylaid:
    """A request that somebody stopped on its way: it arrives when told to, or never, and its answer as well."""

    arrive: Callable[[], None]  # have it done, and answered
    arrive_unheard: Callable[[], None]  # have it done; the answer is lost
    fail: Callable[[], None]  # tell the sender that nobody knows what became of it


class Etcd:
    """The store that all members share."""

    def __init__(self, loop: SimLoop, net: Network, rng: random.Random, seen: Callable[[str], None]) -> None:
        self.loop = loop
        self.net = net
        self.rng = rng
        self.seen = seen
        self.history: list[Change] = []
        self.revision = 1
        self.compacted = 0  # revisions below are gone
        self.late_writes = 0.0  # part of writes that take effect long after they were asked for
        self.late_keys: dict[str, float] = {}  # whose next put takes effect so many seconds late
        self.waylay: Callable[[Waylaid], None] | None = None  # what becomes of the next append of events
        self.members: list[Member] = []
        self.on_change: list[Callable[[Change], None]] = []
        self._keys: dict[str, Change] = {}
        self._leases: dict[int, _Lease] = {}
        self._watches: list[_Watch] = []
        self._next_lease = 1000

    @property
    def has_quorum(self) -> bool:
        return 2 * sum(member.up for member in self.members) > len(self.members)

    def value(self, key: str) -> Change | None:
        return self._keys.get(key)

    # -- outages ----------------------------------------------------------------------------------------

    def member_went(self) -> None:
        """A member's state changed: without a quorum, streams end; with one again, leases begin anew."""
        if not self.has_quorum:
            for watch in list(self._watches):
                self._end_watch(watch, rpc_error(grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader"))
        for watch in list(self._watches):
            if not watch.member.up:
                self._end_watch(watch, rpc_error(grpc.StatusCode.UNAVAILABLE, "Socket closed"))

    def quorum_is_back(self) -> None:
        for number, lease in self._leases.items():
            lease.ends_s = self.loop.now_s + lease.ttl_s
            self.loop.after(lease.ttl_s, self._expire, number)

    def _end_watch(self, watch: _Watch, error: Exception | None) -> None:
        self._watches.remove(watch)
        watch.link.finish(error)

    def compact(self) -> None:
        self.compacted = max(self.compacted, self.revision - self.rng.randrange(4))

    # -- leases -----------------------------------------------------------------------------------------

    def _expire(self, number: int) -> None:
        lease = self._leases.get(number)
        if lease is None or not self.has_quorum:
            return  # without a quorum nobody can end it
        if lease.ends_s > self.loop.now_s + 1e-9:
            self.loop.after(lease.ends_s - self.loop.now_s, self._expire, number)
            return
        self.seen("lease expired")
        self._revoke(number)

    def _revoke(self, number: int) -> None:
        lease = self._leases.pop(number)
        gone = sorted(key for key in lease.keys if key in self._keys)
        if gone:
            self.revision += 1
            self._publish([self._deleted(key) for key in gone])

    # -- requests ---------------------------------------------------------------------------------------

    def serve(self, name: str, request: Any) -> Any:
        """Do one request. Raises what gRPC would say."""
        match name:
            case "Range":
                return self._range(request)
            case "Put":
                self.revision += 1
                self._publish([self._put(request)])
                return wire.PutResponse(header=self.header())
            case "DeleteRange":
                return self._delete_range(request)
            case "Txn":
                return self._txn(request)
            case "LeaseGrant":
                ttl_s, number = max(LEASE_MIN_S, request.TTL), self._next_lease
                self._next_lease += 1
                self._leases[number] = _Lease(ttl_s, self.loop.now_s + ttl_s)
                self.loop.after(ttl_s, self._expire, number)
                return wire.LeaseGrantResponse(header=self.header(), ID=number, TTL=ttl_s)
            case "LeaseRevoke":
                self._need_lease(request.ID)
                self._revoke(request.ID)
                return wire.LeaseRevokeResponse(header=self.header())
            case "Status":
                return wire.StatusResponse(header=self.header(), version="3.5.16", leader=1)
        raise AssertionError(f"the model of etcd does not know {name}")

    def header(self) -> wire.ResponseHeader:
        return wire.ResponseHeader(revision=self.revision)

    def _need_lease(self, number: int) -> _Lease:
        if number not in self._leases:
            raise rpc_error(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")
        return self._leases[number]

    def _range(self, request: Any) -> Any:
        key, end = request.key.decode(), request.range_end.decode(errors="surrogateescape")
        if request.revision and request.revision < self.compacted:
            raise rpc_error(grpc.StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")
        keys = self._keys
        if request.revision and request.revision < self.revision:
            keys = self._at(request.revision)
        if end == "":
            found = [keys[key]] if key in keys else []
        else:
            found = [keys[name] for name in sorted(keys) if key <= name and (end == "\0" or name < end)]
        more = bool(request.limit) and len(found) > request.limit
        found = found[: request.limit] if request.limit else found
        return wire.RangeResponse(header=self.header(), kvs=[_kv(change) for change in found], more=more)

    def _at(self, revision: int) -> dict[str, Change]:
        keys: dict[str, Change] = {}
        for change in self.history:
            if change.revision > revision:
                break
            if change.value is None:
                keys.pop(change.key, None)
            else:
                keys[change.key] = change
        return keys

    def _delete_range(self, request: Any) -> Any:
        key, end = request.key.decode(), request.range_end.decode()
        gone = [name for name in sorted(self._keys) if (name == key if end == "" else key <= name < end)]
        if gone:
            self.revision += 1
            self._publish([self._deleted(name) for name in gone])
        return wire.DeleteRangeResponse(header=self.header(), deleted=len(gone))

    def _txn(self, request: Any) -> Any:
        holds = True
        for compare in request.compare:
            found = self._keys.get(compare.key.decode())
            by_mod = compare.target == wire.Compare.MOD
            assert by_mod or compare.target == wire.Compare.CREATE, "the model compares these revisions only"
            revision = 0 if found is None else found.revision if by_mod else found.create_revision
            holds = holds and revision == (compare.mod_revision if by_mod else compare.create_revision)
        ops = request.success if holds else request.failure
        for op in ops:
            if op.WhichOneof("request") == "request_put" and op.request_put.lease:
                self._need_lease(op.request_put.lease)
        changes, answers = [], []
        writes = any(op.WhichOneof("request") != "request_range" for op in ops)
        if writes:
            self.revision += 1
        for op in ops:
            match op.WhichOneof("request"):
                case "request_put":
                    changes.append(self._put(op.request_put))
                    answers.append(wire.ResponseOp(response_put=wire.PutResponse()))
                case "request_delete_range":
                    key = op.request_delete_range.key.decode()
                    gone = [self._deleted(key)] if key in self._keys else []
                    changes += gone
                    answers.append(wire.ResponseOp(response_delete_range=wire.DeleteRangeResponse(deleted=len(gone))))
                case _:
                    answers.append(wire.ResponseOp(response_range=self._range(op.request_range)))
        self._publish(changes)
        return wire.TxnResponse(header=self.header(), succeeded=holds, responses=answers)

    # -- changes ----------------------------------------------------------------------------------------

    def _put(self, request: Any) -> Change:
        key = request.key.decode()
        if request.lease:
            self._need_lease(request.lease).keys.add(key)
        old = self._keys.get(key)
        if old is not None and old.lease and old.lease != request.lease and old.lease in self._leases:
            self._leases[old.lease].keys.discard(key)
        change = Change(
            self.loop.now_s,
            self.revision,
            key,
            bytes(request.value),
            self.revision if old is None else old.create_revision,
            1 if old is None else old.version + 1,
            request.lease,
        )
        self._keys[key] = change
        return change

    def _deleted(self, key: str) -> Change:
        old = self._keys.pop(key)
        if old.lease in self._leases:
            self._leases[old.lease].keys.discard(key)
        return Change(self.loop.now_s, self.revision, key, None, 0, 0, 0)

    def _publish(self, changes: list[Change]) -> None:
        self.history += changes
        for listen in self.on_change:
            for change in changes:
                listen(change)
        for watch in self._watches:
            told = [_event(change) for change in changes if watch.covers(change.key)]
            if told and watch.next_revision <= self.revision:
                watch.next_revision = self.revision + 1
                watch.link.to_client(wire.WatchResponse(header=self.header(), events=told))

    def watch(self, link: Link, member: "Member", request: Any) -> None:
        create = request.create_request
        start = create.start_revision or self.revision + 1
        if start < self.compacted:
            self.seen("watch met a compacted revision")
            link.to_client(wire.WatchResponse(header=self.header(), created=True))
            link.to_client(wire.WatchResponse(header=self.header(), canceled=True, compact_revision=self.compacted))
            return
        watch = _Watch(link, member, create.key.decode(), create.range_end.decode(), start)
        link.to_client(wire.WatchResponse(header=self.header(), created=True))
        by_revision: dict[int, list[Change]] = {}
        for change in reversed(self.history):
            if change.revision < start:
                break
            if watch.covers(change.key):
                by_revision.setdefault(change.revision, []).insert(0, change)
        for revision in sorted(by_revision):
            told = [_event(change) for change in by_revision[revision]]
            link.to_client(wire.WatchResponse(header=self.header(), events=told))
        watch.next_revision = self.revision + 1
        self._watches.append(watch)

        def gone() -> None:
            if watch in self._watches:
                self._watches.remove(watch)

        link.on_end = gone

    def beat(self, link: Link, request: Any) -> None:
        lease = self._leases.get(request.ID)
        if lease is not None:
            lease.ends_s = self.loop.now_s + lease.ttl_s
        ttl_s = 0 if lease is None else lease.ttl_s
        link.to_client(wire.LeaseKeepAliveResponse(header=self.header(), ID=request.ID, TTL=ttl_s))


class Member:
    """One member's address."""

    process: Process | None = None

    def __init__(self, store: Etcd, machine: Machine, address: str) -> None:
        self.store = store
        self.machine = machine
        self.up = True
        store.members.append(self)
        store.net.servers[address] = self
        store.net.machines[address] = machine

    def reachable(self) -> bool:
        return self.up

    def go(self, *, up: bool) -> None:
        had = self.store.has_quorum
        self.up = up
        self.store.member_went()
        if not had and self.store.has_quorum:
            self.store.quorum_is_back()

    def unary(self, path: str, request: Any, answer: Callable[[Any, Exception | None], None]) -> None:
        store, name = self.store, path.rpartition("/")[2]
        if not store.has_quorum:
            error = rpc_error(grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out")
            store.loop.after(store.rng.uniform(0.5, 3.0), answer, None, error)
            return
        if store.waylay is not None and name == "Txn" and _appends(request):
            waylay, store.waylay = store.waylay, None
            lost = rpc_error(grpc.StatusCode.UNAVAILABLE, "Stream removed")
            waylay(
                Waylaid(
                    lambda: self._do(name, request, answer),
                    lambda: self._do(name, request, lambda result, error: None),
                    lambda: answer(None, lost),
                )
            )
            return
        late_s = sum(store.late_keys.pop(key, 0.0) for key in _puts(request)) if name == "Txn" else 0.0
        if name in ("Txn", "Put") and store.late_writes and store.rng.random() < store.late_writes:
            late_s = store.rng.uniform(1.0, 15.0)
        if late_s:
            store.seen("etcd write took effect late")
            store.loop.after(late_s, self._do, name, request, answer)
            return
        self._do(name, request, answer)

    def _do(self, name: str, request: Any, answer: Callable[[Any, Exception | None], None]) -> None:
        if not self.store.has_quorum:
            return
        try:
            result, error = self.store.serve(name, request), None
        except grpc.aio.AioRpcError as refusal:
            result, error = None, refusal
        answer(result, error)

    def stream(self, path: str, link: Link) -> None:
        if not self.store.has_quorum:
            link.finish(rpc_error(grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader"))
        elif path.endswith("/Watch"):
            link.on_message = lambda request: self.store.watch(link, self, request)
        else:
            link.on_message = lambda request: self.store.beat(link, request) if self.store.has_quorum else None


def _appends(request: Any) -> bool:
    """Whether it would write an event of the log."""
    return any("/events/" in key for key in _puts(request))


def _puts(request: Any) -> list[str]:
    """The keys that a transaction would put."""
    return [op.request_put.key.decode() for op in request.success if op.WhichOneof("request") == "request_put"]


def _kv(change: Change) -> wire.KeyValue:
    return wire.KeyValue(
        key=change.key.encode(),
        value=change.value or b"",
        create_revision=change.create_revision,
        mod_revision=change.revision,
        version=change.version,
        lease=change.lease,
    )


def _event(change: Change) -> wire.Event:
    kind = wire.Event.DELETE if change.value is None else wire.Event.PUT
    return wire.Event(type=kind, kv=_kv(change))
