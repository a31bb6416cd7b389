"""Talk to a cluster: find its etcd, find the leader through it, ask, and ask again while nobody leads.

A change of leader takes seconds and must not fail a person's command, so a call is repeated until its
patience ends. That is safe because every request is idempotent: a submission carries its own id, and the
others say what shall be, not what shall change.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from dtrain.common.errors import RetryableError, UserError
from dtrain.etcd.client import EtcdClient
from dtrain.proto import MESSAGE_MAX_BYTES
from dtrain.proto import agent_pb2 as wire
from dtrain.standalone.data_folder import DataFolder

PATIENCE_S = 15.0  # three times a leader's lease: long enough for a standby to take over
CALL_TIMEOUT_S = 10.0  # the leader answers after its log has the decision; a slow disk takes a second
SUBMIT_TIMEOUT_S = 60.0  # a submission also tries the store, and one that does not answer takes its time
RETRY_S = 0.1  # between two tries; a leader is elected within some tenths of a second
PROBE_S = 3.0  # how long etcd may take to answer a first question
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # what counts in grpcio; keepalive_timeout_ms is ignored
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
)


class Message(Protocol):
    """What the generated messages have in common, as far as it is needed here."""

    def SerializeToString(self) -> bytes: ...


Reply = TypeVar("Reply")

# What the coordinator answers when a person asked for something impossible; its details are the sentence.
_USER_ERRORS = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND})
# The leader may just be changing; one that does not lead any more answers FAILED_PRECONDITION.
_PASSING = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a cluster's etcd is, and where in it the cluster is."""

    etcd: tuple[str, ...]  # host:port each
    prefix: str


def parse_endpoints(text: str) -> tuple[str, ...]:
    """``"a:2379,b:2379"`` as endpoints, or :class:`UserError`."""
    endpoints = tuple(part.strip().removeprefix("http://").rstrip("/") for part in text.split(",") if part.strip())
    for endpoint in endpoints:
        host, colon, port = endpoint.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
            raise UserError(
                f"etcd endpoint {endpoint!r} is not valid: give HOST:PORT, several separated by commas, "
                "as in --etcd 10.0.0.1:2379,10.0.0.2:2379."
            )
    if not endpoints:
        raise UserError("no etcd endpoint given: give HOST:PORT, as in --etcd 127.0.0.1:2379.")
    return endpoints


def active_cluster(etcd: str | None, prefix: str, data_dir: str) -> Address | None:
    """The cluster that was named, or the one that runs in the data folder now; None if none does."""
    if etcd:
        return Address(etcd=parse_endpoints(etcd), prefix=prefix)
    active = DataFolder.at(data_dir).active()
    return Address(etcd=(active.etcd,), prefix=active.prefix) if active is not None else None


def require_cluster(etcd: str | None, prefix: str, data_dir: str) -> Address:
    """As :func:`active_cluster`, for verbs that need a coordinator."""
    address = active_cluster(etcd, prefix, data_dir)
    if address is None:
        raise UserError(
            f"no run is active in data folder {data_dir}, and no cluster was named: "
            "give --etcd HOST:PORT, or --data-dir of a run that is active."
        )
    return address


@asynccontextmanager
async def connect_etcd(address: Address, *, wait_s: float = 0.0) -> AsyncIterator[EtcdClient]:
    """A client of the cluster's etcd, which has answered; :class:`UserError` if it does not within the time."""
    await probe_etcd(address.etcd, wait_s=wait_s)
    async with EtcdClient(address.etcd) as client:
        yield client


async def probe_etcd(endpoints: Sequence[str], *, wait_s: float) -> str:
    """Return etcd's version. Asks again for ``wait_s``, then raises :class:`UserError`."""
    from dtrain.etcd.embedded import probe

    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        try:
            return await probe(endpoints, PROBE_S)
        except UserError:
            if asyncio.get_running_loop().time() >= deadline:
                raise
        await asyncio.sleep(RETRY_S)


class Coordinator:
    """The cluster's leader, whoever that is at the moment."""

    def __init__(self, etcd: EtcdClient, prefix: str) -> None:
        self._etcd = etcd
        self._leader_key = f"{prefix}/leader"
        self._channel: grpc.aio.Channel | None = None
        self._channel_address = ""

    async def __aenter__(self) -> "Coordinator":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._hang_up()

    async def submit(self, request: wire.SubmitRequest, *, patience_s: float = PATIENCE_S) -> wire.SubmitReply:
        return await self._ask("Submit", request, wire.SubmitReply, patience_s, timeout_s=SUBMIT_TIMEOUT_S)

    async def cancel(self, job: str) -> None:
        await self._ask("Cancel", wire.CancelRequest(job=job), wire.CancelReply, PATIENCE_S)

    async def checkpoint(self, job: str, request: str) -> wire.CheckpointReply:
        asked = wire.CheckpointRequest(job=job, request=request)
        return await self._ask("Checkpoint", asked, wire.CheckpointReply, PATIENCE_S)

    async def pin(self, job: str, checkpoint: int, *, pinned: bool) -> None:
        asked = wire.PinRequest(job=job, checkpoint=checkpoint, pinned=pinned)
        await self._ask("Pin", asked, wire.PinReply, PATIENCE_S)

    async def quarantine(self, job: str, checkpoint: int, *, key: str, reason: str) -> None:
        asked = wire.QuarantineRequest(job=job, checkpoint=checkpoint, key=key, reason=reason)
        await self._ask("Quarantine", asked, wire.QuarantineReply, PATIENCE_S)

    async def status(self, job: str = "", *, patience_s: float = PATIENCE_S) -> wire.StatusReply:
        return await self._ask("Status", wire.StatusRequest(job=job), wire.StatusReply, patience_s)

    async def workers(self) -> list[wire.WorkerStatus]:
        reply = await self._ask("Workers", wire.WorkersRequest(), wire.WorkersReply, PATIENCE_S)
        return list(reply.workers)

    async def _ask(
        self,
        method: str,
        request: Message,
        reply: type[Reply],
        patience_s: float,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Reply:
        clock = asyncio.get_running_loop().time
        deadline = clock() + patience_s
        problem = "nobody leads the cluster"
        while True:
            try:
                if (address := await self._leader()) is not None:
                    return await self._call(address, method, request, reply, timeout_s)
                problem = "nobody leads the cluster"
            except grpc.aio.AioRpcError as error:
                if error.code() in _USER_ERRORS:
                    raise UserError(error.details() or error.code().name) from error
                if error.code() not in _PASSING:
                    raise RetryableError(f"the coordinator failed: {error.code().name}: {error.details()}") from error
                problem = f"the leader at {self._channel_address} does not answer ({error.details()})"
                await self._hang_up()
            except RetryableError as error:
                problem = str(error)
            if clock() >= deadline:
                raise UserError(f"{problem}: start a coordinator with 'dtrain coordinator --etcd HOST:PORT', or wait.")
            await asyncio.sleep(RETRY_S)

    async def _leader(self) -> str | None:
        found = await self._etcd.get(self._leader_key)
        if found is None:
            return None
        address = json.loads(found.value)["address"]
        assert isinstance(address, str)
        return address

    async def _call(self, address: str, method: str, request: Message, reply: type[Reply], timeout_s: float) -> Reply:
        if self._channel is None or self._channel_address != address:
            await self._hang_up()
            self._channel = grpc.aio.insecure_channel(address, options=list(CHANNEL_OPTIONS))
            self._channel_address = address
        call = self._channel.unary_unary(
            f"/dtrain.v1.Jobs/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,  # type: ignore[attr-defined]  # generated, so not in a Protocol
        )
        answer: Reply = await call(request, timeout=timeout_s)
        return answer

    async def _hang_up(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close(None)


@asynccontextmanager
async def connect(address: Address, *, wait_s: float = 0.0) -> AsyncIterator[Coordinator]:
    """The coordinator of a cluster."""
    async with connect_etcd(address, wait_s=wait_s) as etcd, Coordinator(etcd, address.prefix) as coordinator:
        yield coordinator


def job_of(reply: wire.StatusReply, job: str) -> wire.JobStatus:
    """The status of one job, or :class:`UserError`."""
    for status in reply.jobs:
        if status.job == job:
            return status
    raise UserError(f"no job named {job!r}: see the names with 'dtrain list'.")
