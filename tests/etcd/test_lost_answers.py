"""What a client may conclude when the link to etcd fails in the middle of a call."""

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from dtrain.common.errors import PermanentError, RetryableError
from dtrain.etcd import transactions as do
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import (
    AnswerTooLarge,
    Compacted,
    EtcdRefused,
    EtcdUnavailable,
    LeaseLost,
    NoSpace,
    OutcomeUnknown,
    translate,
)
from tests.support.etcd_server import EtcdServer
from tests.support.tcp_proxy import TcpProxy

DEADLINE_S = 30.0


@pytest.fixture
def proxy(etcd: EtcdServer) -> Iterator[TcpProxy]:
    with TcpProxy(etcd.endpoint) as link:
        yield link


async def until_there(client: EtcdClient, key: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await client.get(key) is None:
            await asyncio.sleep(0)


def test_a_write_whose_answer_is_lost_is_unknown_and_can_be_read_back(etcd: EtcdServer, proxy: TcpProxy) -> None:
    async def run() -> None:
        async with EtcdClient([proxy.endpoint]) as client, EtcdClient([etcd.endpoint]) as witness:
            await client.put("warm", b"")
            proxy.swallow_answers()
            writing = asyncio.create_task(client.txn([do.absent("e/1")], [do.put("e/1", b"mine")]))
            await until_there(witness, "e/1")
            proxy.cut()
            with pytest.raises(OutcomeUnknown):
                await writing
            assert proxy.answers_lost > 0
            proxy.forward()
            found = await client.get("e/1")
            assert found is not None and found.value == b"mine"
            assert found.version == 1, "the write was sent more than once"

    asyncio.run(run())


def test_a_write_whose_answer_never_comes_is_unknown_when_its_time_is_up(proxy: TcpProxy) -> None:
    async def run() -> None:
        async with EtcdClient([proxy.endpoint], timeout_s=1) as client:
            await client.put("warm", b"")
            proxy.swallow_answers()
            with pytest.raises(OutcomeUnknown):
                await client.put("k", b"v")
            proxy.forward()
            found = await client.get("k")
            assert found is not None and found.version == 1

    asyncio.run(run())


def test_a_write_to_an_etcd_that_is_frozen_is_unknown_and_may_still_be_applied_later(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint], timeout_s=1) as client:
            await client.put("warm", b"")
            etcd.pause()
            with pytest.raises(OutcomeUnknown):
                await client.put("k", b"v")
            etcd.resume()
            await client.get("k")  # either way is right; what matters is that a read works again

    asyncio.run(run())


def test_a_write_that_finds_no_connection_was_not_sent(proxy: TcpProxy, unused_endpoint: str) -> None:
    async def run() -> None:
        async with EtcdClient([unused_endpoint], timeout_s=0.5) as client:
            with pytest.raises(EtcdUnavailable):
                await client.txn([], [do.put("k", b"v")])

    asyncio.run(run())


def test_a_read_goes_on_over_a_broken_connection(proxy: TcpProxy) -> None:
    async def run() -> None:
        async with EtcdClient([proxy.endpoint]) as client:
            await client.put("k", b"v")
            for _ in range(5):
                proxy.reset_connections()
                found = await client.get("k")
                assert found is not None and found.value == b"v"

    asyncio.run(run())


def test_a_read_leaves_a_silent_member_and_asks_the_next(etcd: EtcdServer, proxy: TcpProxy) -> None:
    async def run() -> None:
        async with EtcdClient([proxy.endpoint, etcd.endpoint], timeout_s=4) as client:
            await client.put("k", b"v")
            proxy.freeze()
            assert await client.get("k") is not None
            assert client.transport.endpoint == etcd.endpoint

    asyncio.run(run())


def test_a_link_that_swallows_packets_is_noticed_by_pings_long_before_the_deadline(proxy: TcpProxy) -> None:
    async def run() -> None:
        async with EtcdClient([proxy.endpoint], timeout_s=600) as client:
            await client.put("warm", b"")
            proxy.freeze()
            async with asyncio.timeout(DEADLINE_S):  # pings: 6 s apart, answered within 3 s; TCP alone needs minutes
                with pytest.raises(OutcomeUnknown):
                    await client.put("k", b"v")

    asyncio.run(run())


STATUS = grpc.StatusCode
MEANINGS = [
    (STATUS.DEADLINE_EXCEEDED, "Deadline Exceeded", OutcomeUnknown, EtcdUnavailable),
    (STATUS.UNAVAILABLE, "Stream removed", OutcomeUnknown, EtcdUnavailable),
    (STATUS.UNAVAILABLE, "etcdserver: request timed out", OutcomeUnknown, EtcdUnavailable),
    (STATUS.UNAVAILABLE, "etcdserver: leader changed", OutcomeUnknown, EtcdUnavailable),
    (STATUS.UNKNOWN, "context deadline exceeded", OutcomeUnknown, EtcdUnavailable),
    (STATUS.UNAVAILABLE, "failed to connect to all addresses; last error: x", EtcdUnavailable, EtcdUnavailable),
    (STATUS.RESOURCE_EXHAUSTED, "etcdserver: too many requests", EtcdUnavailable, EtcdUnavailable),
    (STATUS.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", NoSpace, NoSpace),
    (STATUS.RESOURCE_EXHAUSTED, "grpc: received message larger than max", EtcdRefused, AnswerTooLarge),
    (STATUS.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", Compacted, Compacted),
    (STATUS.NOT_FOUND, "etcdserver: requested lease not found", LeaseLost, LeaseLost),
    (STATUS.INVALID_ARGUMENT, "etcdserver: too many operations in txn request", EtcdRefused, EtcdRefused),
]


@pytest.mark.parametrize(("code", "details", "of_write", "of_read"), MEANINGS)
def test_each_status_of_etcd_has_one_meaning_for_writes_and_one_for_reads(
    code: grpc.StatusCode,
    details: str,
    of_write: type[RetryableError | PermanentError],
    of_read: type[RetryableError | PermanentError],
) -> None:
    error = AioRpcError(code, Metadata(), Metadata(), details=details, debug_error_string=None)
    assert type(translate(error, write=True)) is of_write
    assert type(translate(error, write=False)) is of_read
