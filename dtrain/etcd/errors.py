"""What can go wrong with etcd, in the two kinds that dtrain knows, and the one place that tells them apart.

The hard case is a write whose answer was lost: etcd may have applied it, so neither "it failed" nor "try
again" is true. Such a write raises :class:`OutcomeUnknown`, and its caller reads back before it decides.
Rule: a write counts as not applied only where gRPC says that it never left, or etcd says that it refused it.
"""

import grpc
import grpc.aio

from dtrain.common.errors import PermanentError, RetryableError


class EtcdUnavailable(RetryableError):
    """Nothing was written, or a read failed: try again."""


class OutcomeUnknown(RetryableError):
    """A write was sent and its answer lost: it may have been applied. Read back before trying again."""


class NoSpace(RetryableError):
    """etcd's space quota is used up; nothing was written.

    It takes writes again once someone has deleted, compacted, defragmented and then disarmed the alarm.
    """


class Compacted(PermanentError):
    """The asked revision is no longer kept. List again, then go on from the listing's revision.

    ``compact_revision`` is the oldest revision that is still kept, 0 where etcd does not say it.
    """

    def __init__(self, text: str, *, compact_revision: int = 0) -> None:
        super().__init__(text)
        self.compact_revision = compact_revision


class LeaseLost(PermanentError):
    """The lease has expired or was revoked, and its keys with it. A new lease is needed."""


class EtcdRefused(PermanentError):
    """etcd will never take this request (too many operations, too large, malformed); nothing was written."""


class AnswerTooLarge(EtcdRefused):
    """A read's answer does not fit into a message: ask for a smaller page."""


# gRPC's words for a call that never left this process. All are said before the request is handed to a connection.
_NEVER_SENT = ("failed to connect to all addresses", "Connection refused", "name resolution", "empty address list")

# Statuses after which a write's fate is open. etcd gives UNKNOWN where its own context ended in mid-write.
_FATE_OPEN = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DATA_LOSS,
    }
)


def translate(error: grpc.aio.AioRpcError, *, write: bool) -> RetryableError | PermanentError:
    """Return the error of this module that ``error`` means. ``write``: the call could have changed etcd."""
    code, details = error.code(), error.details() or ""
    text = f"{code.name}: {details}"
    if code is grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
        return Compacted(text)
    if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return LeaseLost(text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _exhausted(text, details, write=write)
    if code in _FATE_OPEN:
        never_sent = code is grpc.StatusCode.UNAVAILABLE and any(words in details for words in _NEVER_SENT)
        return OutcomeUnknown(text) if write and not never_sent else EtcdUnavailable(text)
    return EtcdRefused(text)


def _exhausted(text: str, details: str, *, write: bool) -> RetryableError | PermanentError:
    # One status, four meanings: the quota, the server's load, its message limit, and our own message limit.
    if "space exceeded" in details:
        return NoSpace(text)
    if "too many requests" in details:
        return EtcdUnavailable(text)
    return EtcdRefused(text) if write else AnswerTooLarge(text)
