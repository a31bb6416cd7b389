"""Events as JSON that a person reads with etcdctl, and back.

The bytes in etcd are what the chain digest covers, so an event is encoded once, when it is decided, and never
again. Decoding is strict about types and lenient about unknown fields: a newer dtrain may add some.
"""

from dataclasses import dataclass, fields
from typing import get_args

import msgspec

from dtrain.common.digests import chain_digest
from dtrain.common.errors import LogDamagedError, UserError
from dtrain.common.names import JobName
from dtrain.coordinator.core.events import Cause, Decision, Event, RecordedEvent
from dtrain.etcd.transactions import REQUEST_MAX_BYTES

SEQ_DIGITS = 12
# What of an event grows with its job, encoded. An event must fit into one request to etcd: what is larger has to be
# refused before it is decided, since no leader could ever append it. The room is for the rest of the event and its key.
DATA_BYTES_MAX = REQUEST_MAX_BYTES - 64 * 1024
_TYPES: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}
GENESIS_DIGEST = chain_digest(b"")  # what the first event names as the one before it


@dataclass(frozen=True, slots=True, kw_only=True)
class _Envelope:
    seq: int
    term: int
    time: float
    type: str
    data: msgspec.Raw
    cause: msgspec.Raw
    prev: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event with the bytes under which it is, or is about to be, in etcd."""

    record: RecordedEvent
    value: bytes


def events_prefix(prefix: str, job: JobName) -> str:
    return f"{prefix}/jobs/{job}/events/"


def event_key(prefix: str, job: JobName, seq: int) -> str:
    return f"{events_prefix(prefix, job)}{seq:0{SEQ_DIGITS}d}"


def record(decision: Decision, *, prefix: str, job: JobName, seq: int, term: int, time_s: float, prev: str) -> Entry:
    """Encode a decision as the event ``seq`` of ``job``'s log."""
    envelope = _Envelope(
        seq=seq,
        term=term,
        time=round(time_s, 3),
        type=type(decision.event).__name__,
        data=msgspec.Raw(msgspec.json.encode(decision.event)),
        cause=msgspec.Raw(msgspec.json.encode(_said(decision.cause))),
        prev=prev,
    )
    value = msgspec.json.encode(envelope)
    return Entry(
        record=_recorded(envelope, decision.event, decision.cause, job, event_key(prefix, job, seq), value), value=value
    )


def decode(key: str, value: bytes, job: JobName) -> RecordedEvent:
    """Decode the event under ``key``; raise LogDamagedError naming it if it is not one."""
    try:
        envelope = msgspec.json.decode(value, type=_Envelope)
        kind = _TYPES.get(envelope.type)
        if kind is None:
            raise LogDamagedError(key, f"unknown event type {envelope.type!r} (written by a newer dtrain?)")
        event: Event = msgspec.json.decode(envelope.data, type=kind)
        cause = msgspec.json.decode(envelope.cause, type=Cause)
    except (msgspec.DecodeError, UnicodeDecodeError, UserError) as error:  # UserError: a spec nobody could submit
        raise LogDamagedError(key, f"not an event: {error}") from error
    return _recorded(envelope, event, cause, job, key, value)


def _said(cause: Cause) -> dict[str, str | int]:
    """The fields of a cause that say something: a person reads the log."""
    values = {field.name: getattr(cause, field.name) for field in fields(cause)}
    return {field.name: values[field.name] for field in fields(cause) if values[field.name] != field.default}


def _recorded(envelope: _Envelope, event: Event, cause: Cause, job: JobName, key: str, value: bytes) -> RecordedEvent:
    return RecordedEvent(
        job=job,
        seq=envelope.seq,
        term=envelope.term,
        time=envelope.time,
        type=envelope.type,
        event=event,
        cause=cause,
        prev=envelope.prev,
        key=key,
        digest=chain_digest(value),
    )
