"""Typed parts of an etcd transaction: what must hold, and what is then done.

A transaction is atomic: all compares are judged and one of the two lists of operations is done, at one
revision. Keep the compares few: a fence needs two (my term still stands, this key does not exist yet), and
etcd 3.5.0 to 3.5.2 lost acknowledged writes with many. etcd takes at most 128 operations, and two writes of
one key in one transaction are refused.
"""

from dataclasses import dataclass
from typing import assert_never

from dtrain.etcd import wire_pb2 as wire
from dtrain.etcd.keyvalues import KeyValue, from_wire

OPS_MAX = 128  # etcd's --max-txn-ops: above it a transaction is refused as a whole
REQUEST_MAX_BYTES = 1_572_864  # etcd's --max-request-bytes, 1.5 MiB, keys and values together


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRevisionIs:
    """Holds while ``key`` was made at exactly ``revision``; 0: while it does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModRevisionIs:
    """Holds while ``key`` was last put at exactly ``revision``; 0: while it does not exist."""

    key: str
    revision: int


Compare = CreateRevisionIs | ModRevisionIs


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    key: str
    value: bytes
    lease: int  # 0 for none


@dataclass(frozen=True, slots=True, kw_only=True)
class Get:
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    key: str


Op = Put | Get | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class PutDone:
    """Answer to :class:`Put`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Got:
    """Answer to :class:`Get`."""

    kv: KeyValue | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """Answer to :class:`Delete`."""

    count: int  # keys deleted, >= 0


OpResponse = PutDone | Got | Deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class TxnResult:
    succeeded: bool  # all compares held, and the ``then`` list was done; else ``otherwise`` was
    revision: int  # of the store after the transaction; every key it put has this mod_revision
    responses: tuple[OpResponse, ...]  # one for each operation of the list that was done, in its order


def create_revision_is(key: str, revision: int) -> CreateRevisionIs:
    return CreateRevisionIs(key=key, revision=revision)


def mod_revision_is(key: str, revision: int) -> ModRevisionIs:
    return ModRevisionIs(key=key, revision=revision)


def absent(key: str) -> CreateRevisionIs:
    return CreateRevisionIs(key=key, revision=0)


def put(key: str, value: bytes, lease: int = 0) -> Put:
    return Put(key=key, value=value, lease=lease)


def get(key: str) -> Get:
    return Get(key=key)


def delete(key: str) -> Delete:
    return Delete(key=key)


def compare_to_wire(compare: Compare) -> wire.Compare:
    key, equal = compare.key.encode(), wire.Compare.EQUAL
    match compare:
        case CreateRevisionIs():
            return wire.Compare(result=equal, target=wire.Compare.CREATE, key=key, create_revision=compare.revision)
        case ModRevisionIs():
            return wire.Compare(result=equal, target=wire.Compare.MOD, key=key, mod_revision=compare.revision)
        case _:
            assert_never(compare)


def op_to_wire(op: Op) -> wire.RequestOp:
    match op:
        case Put():
            request = wire.PutRequest(key=op.key.encode(), value=op.value, lease=op.lease)
            return wire.RequestOp(request_put=request)
        case Get():
            return wire.RequestOp(request_range=wire.RangeRequest(key=op.key.encode()))
        case Delete():
            return wire.RequestOp(request_delete_range=wire.DeleteRangeRequest(key=op.key.encode()))
        case _:
            assert_never(op)


def result_from_wire(response: wire.TxnResponse) -> TxnResult:
    return TxnResult(
        succeeded=response.succeeded,
        revision=response.header.revision,
        responses=tuple(_response_from_wire(part) for part in response.responses),
    )


def _response_from_wire(part: wire.ResponseOp) -> OpResponse:
    match part.WhichOneof("response"):
        case "response_range":
            kvs = part.response_range.kvs
            return Got(kv=from_wire(kvs[0]) if kvs else None)
        case "response_delete_range":
            return Deleted(count=part.response_delete_range.deleted)
        case _:
            return PutDone()
