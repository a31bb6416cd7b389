"""A watch tells every change once and in order, whatever happens to etcd."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import grpc
import grpc.aio
import pytest

from dtrain.common.errors import RetryableError
from dtrain.etcd import transactions as do
from dtrain.etcd import wire_pb2 as wire
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import Compacted, EtcdRefused
from dtrain.etcd.watches import ChangeKind, WatchBatch, WatchEvent, watch
from tests.support.etcd_server import EtcdServer
from tests.support.tcp_proxy import TcpProxy

DEADLINE_S = 60.0
SEED = 20_250_101


async def take(batches: AsyncGenerator[WatchBatch, None], count: int) -> list[WatchEvent]:
    """Return the first ``count`` events, and leave the watch open."""
    events: list[WatchEvent] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(events) < count:
            events.extend((await anext(batches)).events)
    return events


async def write_for_certain(client: EtcdClient, key: str) -> None:
    """Make ``key`` once, however often etcd dies meanwhile."""
    while True:
        try:
            await client.txn([do.absent(key)], [do.put(key, b"")])
            return
        except RetryableError:
            await asyncio.sleep(0.01)


def test_a_watch_tells_puts_and_deletions_of_its_prefix_only(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            first = await client.put("p/1", b"one")
            await client.put("q/1", b"other")
            await client.txn([], [do.put("p/2", b"two"), do.put("p/3", b"three")])
            gone = await client.txn([], [do.delete("p/1")])
            async with aclosing(watch(client, "p/", from_revision=first)) as batches:
                events = await take(batches, 4)
            assert [(event.kind, event.kv.key, event.kv.value) for event in events] == [
                (ChangeKind.PUT, "p/1", b"one"),
                (ChangeKind.PUT, "p/2", b"two"),
                (ChangeKind.PUT, "p/3", b"three"),
                (ChangeKind.DELETE, "p/1", b""),
            ]
            assert events[-1].kv.mod_revision == gone.revision

    asyncio.run(run())


def test_a_listing_and_a_watch_behind_it_miss_nothing(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            await client.put("p/1", b"")
            kvs, revision = await client.range_prefix("p/")
            await client.put("p/2", b"")
            async with aclosing(watch(client, "p/", from_revision=revision + 1)) as batches:
                events = await take(batches, 1)
            assert [kv.key for kv in kvs] == ["p/1"] and [event.kv.key for event in events] == ["p/2"]

    asyncio.run(run())


def test_a_watch_survives_kills_of_etcd_without_losing_or_doubling_a_change(etcd: EtcdServer) -> None:
    count, kills = 400, 3
    moments = sorted(random.Random(SEED).sample(range(50, count), kills))

    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as writer, EtcdClient([etcd.endpoint]) as reader:

            async def write() -> None:
                for number in range(count):
                    if number in moments:
                        etcd.kill()
                        await etcd.up()
                    await write_for_certain(writer, f"p/{number:04}")

            writing = asyncio.create_task(write())
            async with aclosing(watch(reader, "p/", from_revision=1)) as batches:
                events = await take(batches, count)
                await writing
                await writer.put("p/end", b"")
                assert [event.kv.key for event in await take(batches, 1)] == ["p/end"]
            assert [event.kv.key for event in events] == [f"p/{number:04}" for number in range(count)]

    asyncio.run(run())


def test_a_watch_broken_while_it_catches_up_goes_on_behind_what_it_delivered(etcd: EtcdServer) -> None:
    count = 5000  # etcd sends an unsynced watcher at most 1,000 revisions at a time

    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            limit = asyncio.Semaphore(64)

            async def write(number: int) -> None:
                async with limit:
                    await client.put(f"p/{number:04}", b"")

            await asyncio.gather(*(write(number) for number in range(count)))
            with TcpProxy(etcd.endpoint) as proxy:
                async with EtcdClient([proxy.endpoint]) as reader:
                    seen: list[int] = []
                    async with aclosing(watch(reader, "p/", from_revision=1)) as batches, asyncio.timeout(DEADLINE_S):
                        while len(seen) < count:
                            batch = await anext(batches)
                            seen.extend(event.kv.mod_revision for event in batch.events)
                            assert batch.revision == seen[-1]
                            proxy.reset_connections()
            first = seen[0]
            assert seen == list(range(first, first + count))

    asyncio.run(run())


def test_a_watch_of_compacted_changes_says_from_where_changes_are_kept(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            for _ in range(5):
                newest = await client.put("p/1", b"")
            await client.compact(newest)
            async with aclosing(watch(client, "p/", from_revision=2)) as batches:
                with pytest.raises(Compacted) as caught:
                    await take(batches, 1)
            assert caught.value.compact_revision == newest

    asyncio.run(run())


def test_a_watch_from_now_on_misses_nothing_when_its_first_stream_breaks(etcd: EtcdServer) -> None:
    async def run() -> None:
        with TcpProxy(etcd.endpoint) as proxy:
            async with EtcdClient([proxy.endpoint]) as reader, EtcdClient([etcd.endpoint]) as writer:
                await writer.put("p/before", b"")
                async with aclosing(watch(reader, "p/", from_revision=0)) as batches:
                    taking = asyncio.create_task(take(batches, 1))
                    # Only a change that the watch has told proves that it was open.
                    async with asyncio.timeout(DEADLINE_S):
                        while not taking.done():
                            await writer.put("p/open", b"")
                    # The last of these may still arrive; the one below is made while the link is down.
                    proxy.cut()
                    await writer.put("p/while-cut", b"")
                    proxy.forward()
                    async with asyncio.timeout(DEADLINE_S):
                        keys = {"p/open"}
                        while "p/while-cut" not in keys:
                            keys = {event.kv.key for event in (await anext(batches)).events}
                            assert "p/before" not in keys

    asyncio.run(run())


def test_changes_too_large_for_one_message_arrive_whole(etcd: EtcdServer) -> None:
    count, size_bytes = 6, 1024 * 1024

    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            for number in range(count):
                await client.put(f"p/{number}", bytes([number]) * size_bytes)
            async with aclosing(watch(client, "p/", from_revision=1)) as batches:
                events = await take(batches, count)
            assert [event.kv.value[:1] for event in events] == [bytes([number]) for number in range(count)]
            assert all(len(event.kv.value) == size_bytes for event in events)

    asyncio.run(run())


# -- what a real single etcd cannot be made to do: a scripted member -------------------------------------


Script = Callable[[int], list[wire.WatchResponse]]


async def scripted_member(
    script: Script, requests: list[wire.WatchCreateRequest], metadata: list[str]
) -> grpc.aio.Server:
    """Serve a Watch that answers its n-th stream with ``script(n)`` and then ends it."""

    async def serve(
        incoming: AsyncIterator[wire.WatchRequest], context: "grpc.aio.ServicerContext[object, object]"
    ) -> AsyncIterator[wire.WatchResponse]:
        metadata.append(str(dict(context.invocation_metadata() or ()).get("hasleader")))
        async for request in incoming:
            requests.append(request.create_request)
            for response in script(len(requests)):
                yield response
            return

    handler = grpc.stream_stream_rpc_method_handler(
        serve,
        request_deserializer=wire.WatchRequest.FromString,
        response_serializer=wire.WatchResponse.SerializeToString,
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("etcdserverpb.Watch", {"Watch": handler}),))
    return server


def answer(*revisions: int, header: int, **fields: object) -> wire.WatchResponse:
    events = [wire.Event(kv=wire.KeyValue(key=b"p/%d" % at, mod_revision=at)) for at in revisions]
    return wire.WatchResponse(header=wire.ResponseHeader(revision=header), events=events, **fields)  # type: ignore[arg-type]


def watch_script(script: Script, count: int) -> tuple[list[int], list[wire.WatchCreateRequest], list[str]]:
    requests: list[wire.WatchCreateRequest] = []
    metadata: list[str] = []

    async def run() -> list[int]:
        server = await scripted_member(script, requests, metadata)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with (
                EtcdClient([f"127.0.0.1:{port}"]) as client,
                aclosing(watch(client, "p/", from_revision=5)) as batches,
            ):
                return [event.kv.mod_revision for event in await take(batches, count)]
        finally:
            await server.stop(None)

    return asyncio.run(run()), requests, metadata


def test_older_changes_repeated_by_a_lagging_member_are_dropped() -> None:
    def script(stream: int) -> list[wire.WatchResponse]:
        created = answer(header=90, created=True)
        if stream == 1:
            return [created, answer(5, 6, header=90)]  # the header is the store's revision, far ahead
        return [created, answer(4, 5, header=90), answer(6, 7, 8, header=90)]

    seen, requests, metadata = watch_script(script, 4)
    assert seen == [5, 6, 7, 8]
    assert [request.start_revision for request in requests] == [5, 7]
    assert metadata == ["true", "true"], "a member without a leader would have kept silent"


def test_a_member_that_lost_its_leader_is_left_and_the_watch_goes_on() -> None:
    def script(stream: int) -> list[wire.WatchResponse]:
        if stream == 1:
            return [
                answer(header=5, created=True),
                answer(header=5, canceled=True, cancel_reason="etcdserver: no leader"),
            ]
        return [answer(header=5, created=True), answer(5, header=5)]

    seen, requests, _ = watch_script(script, 1)
    assert seen == [5] and len(requests) == 2


def test_a_progress_mark_moves_the_point_of_resumption() -> None:
    def script(stream: int) -> list[wire.WatchResponse]:
        if stream == 1:
            return [answer(header=50, created=True), answer(header=50)]
        return [answer(header=60, created=True), answer(60, header=60)]

    seen, requests, _ = watch_script(script, 1)
    assert seen == [60]
    assert [request.start_revision for request in requests] == [5, 51]


def test_fragments_are_joined_before_the_watch_moves_on() -> None:
    def script(stream: int) -> list[wire.WatchResponse]:
        created = answer(header=9, created=True)
        if stream == 1:
            return [created, answer(5, 6, header=9, fragment=True)]  # ends in the middle of an answer
        return [created, answer(5, 6, header=9, fragment=True), answer(7, header=9)]

    seen, requests, _ = watch_script(script, 3)
    assert seen == [5, 6, 7]
    assert [request.start_revision for request in requests] == [5, 5]


def test_a_watch_that_etcd_refuses_is_an_error_and_not_a_loop() -> None:
    def script(stream: int) -> list[wire.WatchResponse]:
        return [answer(header=9, created=True, canceled=True, cancel_reason="permission denied")]

    with pytest.raises(EtcdRefused, match="permission denied"):
        watch_script(script, 1)
