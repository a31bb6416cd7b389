"""Calls to one of several etcd members: which one, how long, and what may be repeated.

Rules kept here:

- A read, and a write that provably never left, moves to the next member and is tried again until its time is up.
- A write that left is never sent a second time. Its lost answer surfaces as
  :class:`~dtrain.etcd.errors.OutcomeUnknown`.
- A link that swallows packets is noticed by pings in about 9 seconds, not by TCP in minutes.
- Streams ask etcd to end them when the member has lost its leader, so that a lost quorum is an error and not
  silence.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from dtrain.common.errors import UserError
from dtrain.etcd.errors import EtcdUnavailable, translate

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

_RECEIVE_MAX_BYTES = 64 * 1024 * 1024  # a page of 1000 event values fits many times; gRPC's own 4 MiB does not do
_RETRY_FIRST_S = 0.02  # the first pause before another member is tried: a failover should not be felt
_RETRY_MAX_S = 0.5  # the longest pause: an etcd that comes back is noticed at once
_READ_ATTEMPT_MIN_S = 0.5  # a read gives one member at least this long before it asks the next
STREAM_ENDED: object = grpc.aio.EOF  # type: ignore[attr-defined]  # what read() returns then; missing in the stubs
_LEADER_NEEDED = (("hasleader", "true"),)

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # etcd answers pings under 5 s apart with GOAWAY. grpcio reads the ping's timeout from the http2 name.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", _RECEIVE_MAX_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # one client's back-off must not slow another's first connect
    ("grpc.enable_retries", 0),  # what is repeated is decided here, never below
    ("grpc.enable_http_proxy", 0),  # etcd is inside the cluster; a web proxy of the surroundings is not for it
)


def parse_endpoint(text: str) -> str:
    """Return ``host:port`` of an endpoint as people write it, or raise :class:`UserError`."""
    endpoint = text.strip().removeprefix("http://").rstrip("/")
    if endpoint.startswith("https://"):
        raise UserError(
            f"etcd endpoint {text!r} asks for TLS, which is not supported: give an http endpoint, HOST:PORT."
        )
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise UserError(f"etcd endpoint {text!r} is not valid: give HOST:PORT, as in 127.0.0.1:2379.")
    return endpoint


class Transport:
    """Channels to the members. Belongs to the event loop that it is first used in."""

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float) -> None:
        if not endpoints:
            raise UserError("no etcd endpoint is given: give HOST:PORT, as in --etcd 127.0.0.1:2379.")
        self.endpoints = tuple(parse_endpoint(text) for text in endpoints)
        self.timeout_s = timeout_s
        self._current = 0  # index of the member in use; 0 <= current < len(endpoints)
        self._channels: dict[int, grpc.aio.Channel] = {}
        self._callables: dict[tuple[int, str], Callable[..., object]] = {}

    @property
    def endpoint(self) -> str:
        """The member in use."""
        return self.endpoints[self._current]

    @property
    def member(self) -> int:
        """A mark of the member in use, to be given to :meth:`leave`."""
        return self._current

    def leave(self, member: int) -> None:
        """Move on from ``member``, unless another caller already has."""
        if member == self._current:
            self._current = (member + 1) % len(self.endpoints)

    async def close(self) -> None:
        channels = list(self._channels.values())
        self._channels.clear()
        self._callables.clear()
        for channel in channels:
            await channel.close(None)

    async def call(
        self,
        path: str,
        request: Message,
        response_type: type[_Response],
        *,
        write: bool,
        timeout_s: float | None = None,
    ) -> _Response:
        """Make one unary call, repeated only where the rules above allow it."""
        whole_s = self.timeout_s if timeout_s is None else timeout_s
        end = time.monotonic() + whole_s
        attempt_s = max(_READ_ATTEMPT_MIN_S, whole_s / 2)
        pause_s = _RETRY_FIRST_S
        while True:
            member = self._current
            left_s = max(0.001, end - time.monotonic())
            method = self._unary(path, type(request), response_type)
            try:
                return await method(request, timeout=left_s if write else min(left_s, attempt_s))
            except grpc.aio.AioRpcError as error:
                meaning = translate(error, write=write)
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    self.leave(member)
                if not isinstance(meaning, EtcdUnavailable) or time.monotonic() + pause_s >= end:
                    raise meaning from error
            await asyncio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(pause_s * 2, _RETRY_MAX_S)

    def stream(
        self,
        path: str,
        request_type: type[_Request],
        response_type: type[_Response],
        *,
        timeout_s: float | None = None,
    ) -> "grpc.aio.StreamStreamCall[_Request, _Response]":
        """Open a two-way stream to the member in use. The caller cancels it, and leaves the member on failure."""
        key = (self._current, path)
        method = self._callables.get(key)
        if method is None:
            method = self._channel().stream_stream(
                f"/etcdserverpb.{path}",
                request_serializer=request_type.SerializeToString,
                response_deserializer=response_type.FromString,
            )
            self._callables[key] = method
        # The stubs demand a request iterator; without one the stream is driven by read() and write().
        return method(timeout=timeout_s, metadata=_LEADER_NEEDED)  # type: ignore[call-arg, return-value]

    def _unary(
        self, path: str, request_type: type[_Request], response_type: type[_Response]
    ) -> "grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]":
        key = (self._current, path)
        method = self._callables.get(key)
        if method is None:
            method = self._channel().unary_unary(
                f"/etcdserverpb.{path}",
                request_serializer=request_type.SerializeToString,
                response_deserializer=response_type.FromString,
            )
            self._callables[key] = method
        return method  # type: ignore[return-value]

    def _channel(self) -> grpc.aio.Channel:
        channel = self._channels.get(self._current)
        if channel is None:
            channel = grpc.aio.insecure_channel(self.endpoint, options=_CHANNEL_OPTIONS)
            self._channels[self._current] = channel
        return channel
