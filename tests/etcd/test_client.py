"""Keys, ranges and transactions against a real etcd."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from dtrain.common.errors import UserError
from dtrain.etcd import transactions as do
from dtrain.etcd import transport
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import Compacted, EtcdRefused, EtcdUnavailable, LeaseLost, NoSpace
from dtrain.etcd.keyvalues import prefix_end
from dtrain.etcd.transactions import OPS_MAX, REQUEST_MAX_BYTES, Deleted, Got, PutDone
from tests.support.etcd_server import EtcdServer, etcd_server

MIB = 1024 * 1024
COUNT_AT_ONCE = ["--backend-batch-limit=1"]  # the quota is judged by what is committed to the file


def with_client(server: EtcdServer, body: Callable[[EtcdClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with EtcdClient([server.endpoint]) as client:
            await body(client)

    asyncio.run(run())


def test_a_key_is_written_read_counted_and_deleted(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        assert await client.get("a") is None
        made = await client.put("a", b"1")
        changed = await client.put("a", b"2")
        found = await client.get("a")
        assert found is not None
        assert (found.key, found.value, found.version, found.lease) == ("a", b"2", 2, 0)
        assert (found.create_revision, found.mod_revision) == (made, changed)
        assert await client.delete("a") is True
        assert await client.delete("a") is False
        assert await client.get("a") is None

    with_client(etcd, body)


def test_a_prefix_is_read_at_one_revision_although_a_writer_comes_between_pages(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        for number in range(10):
            await client.put(f"p/{number}", b"before")
        await client.put("q", b"another prefix")
        seen: list[tuple[str, bytes]] = []
        async for kv in client.scan("p/", page=3):
            if not seen:  # the first page is read; all that follows must be as it was then
                await client.put("p/9", b"after")
                await client.put("p/99", b"after")
                await client.delete("p/5")
            seen.append((kv.key, kv.value))
        assert seen == [(f"p/{number}", b"before") for number in range(10)]

        kvs, revision = await client.range_prefix("p/", page=4)
        assert [kv.key for kv in kvs] == [f"p/{number}" for number in (0, 1, 2, 3, 4, 6, 7, 8, 9, 99)]
        assert revision == (await client.status()).revision
        assert await client.range_prefix("nothing/") == ([], revision)

    with_client(etcd, body)


def test_a_prefix_can_be_read_as_it_was_until_it_is_compacted(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        old = await client.put("k", b"old")
        new = await client.put("k", b"new")
        kvs, revision = await client.range_prefix("k", revision=old)
        assert ([kv.value for kv in kvs], revision) == ([b"old"], old)
        await client.compact(new)
        with pytest.raises(Compacted):
            await client.range_prefix("k", revision=old)
        with pytest.raises(Compacted):
            await client.compact(old)

    with_client(etcd, body)


def test_a_page_that_does_not_fit_into_a_message_is_asked_for_in_smaller_ones(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = {**dict(transport._CHANNEL_OPTIONS), "grpc.max_receive_message_length": 3 * MIB}
    monkeypatch.setattr(transport, "_CHANNEL_OPTIONS", tuple(narrow.items()))

    async def body(client: EtcdClient) -> None:
        for number in range(6):
            await client.put(f"big/{number}", bytes(MIB))
        kvs, _ = await client.range_prefix("big/")
        assert [kv.key for kv in kvs] == [f"big/{number}" for number in range(6)]

    with_client(etcd, body)


def test_deleting_a_prefix_goes_in_chunks_and_leaves_other_keys(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.etcd.client._DELETE_KEYS", 4)

    async def body(client: EtcdClient) -> None:
        for number in range(10):
            await client.put(f"p/{number}", b"")
        await client.put("p", b"")
        await client.put("p0", b"")
        before = (await client.status()).revision
        assert await client.delete_prefix("p/") == 10
        assert (await client.status()).revision == before + 3
        assert await client.delete_prefix("p/") == 0
        assert [kv.key async for kv in client.scan("p")] == ["p", "p0"]

    with_client(etcd, body)


def test_a_transaction_does_one_list_or_the_other_at_one_revision(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        made = await client.put("leader", b"me")
        fence = do.create_revision_is("leader", made)
        first = await client.txn([fence, do.absent("e/1")], [do.put("e/1", b"x"), do.put("e/2", b"y")])
        assert first.succeeded and first.responses == (PutDone(), PutDone())
        kvs, _ = await client.range_prefix("e/")
        assert [kv.mod_revision for kv in kvs] == [first.revision, first.revision]

        again = await client.txn([fence, do.absent("e/1")], [do.put("e/1", b"z")], [do.get("e/1"), do.get("e/3")])
        assert not again.succeeded
        assert again.responses == (Got(kv=kvs[0]), Got(kv=None))

        deleted = await client.txn([], [do.delete("e/1"), do.delete("e/3")])
        assert deleted.responses == (Deleted(count=1), Deleted(count=0))

        await client.delete("leader")
        await client.put("leader", b"me")  # the same value, made anew: another term
        assert not (await client.txn([fence], [do.put("e/9", b"")])).succeeded

    with_client(etcd, body)


def test_a_put_may_depend_on_nobody_having_put_the_key_since_it_was_read(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        assert (await client.txn([do.mod_revision_is("k", 0)], [do.put("k", b"1")])).succeeded
        read = await client.get("k")
        assert read is not None
        unchanged = do.mod_revision_is("k", read.mod_revision)
        assert (await client.txn([unchanged], [do.put("k", b"2")])).succeeded
        late = await client.txn([unchanged], [do.put("k", b"3")], [do.get("k")])
        assert not late.succeeded
        found = await client.get("k")
        assert late.responses == (Got(kv=found),)
        assert found is not None and found.value == b"2" and found.create_revision == read.create_revision

    with_client(etcd, body)


def test_what_etcd_never_takes_is_refused_for_good(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        fits = await client.txn([], [do.put(f"n/{number}", b"") for number in range(OPS_MAX)])
        assert len(fits.responses) == OPS_MAX
        with pytest.raises(EtcdRefused, match="too many operations"):
            await client.txn([], [do.put(f"n/{number}", b"") for number in range(OPS_MAX + 1)])
        with pytest.raises(EtcdRefused, match="duplicate key"):
            await client.txn([], [do.put("twice", b"1"), do.put("twice", b"2")])
        await client.put("large", bytes(REQUEST_MAX_BYTES - 1024))
        with pytest.raises(EtcdRefused, match="too large"):
            await client.put("large", bytes(REQUEST_MAX_BYTES + 1024))
        with pytest.raises(EtcdRefused):
            await client.put("large", bytes(3 * MIB))
        with pytest.raises(LeaseLost):
            await client.put("k", b"", lease=12345)
        found = await client.get("large")
        assert found is not None and found.version == 1
        assert await client.get("twice") is None and await client.get("k") is None

    with_client(etcd, body)


def test_an_answer_above_grpcs_own_limit_of_4_mib_is_read(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        for number in range(8):
            await client.put(f"big/{number}", bytes(MIB))
        kvs, _ = await client.range_prefix("big/")
        assert len(kvs) == 8

    with_client(etcd, body)


def test_a_full_etcd_says_so_and_writes_again_after_it_is_cleared(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("full")
    with etcd_server(folder, options=[f"--quota-backend-bytes={16 * MIB}", *COUNT_AT_ONCE]) as server:

        async def body(client: EtcdClient) -> None:
            with pytest.raises(NoSpace):
                for number in range(100):
                    await client.put(f"fill/{number}", bytes(MIB))
            with pytest.raises(NoSpace):
                await client.put("small", b"")
            assert await client.get("fill/0") is not None
            assert await client.delete_prefix("fill/") > 0
            await client.compact((await client.status()).revision)
            await client.defragment()
            assert await client.disarm_no_space() == 1
            await client.put("small", b"")
            assert (await client.status()).db_size_bytes < 16 * MIB

        with_client(server, body)


def test_status_tells_version_revision_and_size(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        revision = await client.put("k", b"v")
        status = await client.status()
        assert status.version.startswith("3.") and status.has_leader
        assert status.revision == revision
        assert 0 < status.db_in_use_bytes <= status.db_size_bytes

    with_client(etcd, body)


def test_a_client_moves_on_from_endpoints_that_do_not_answer(etcd: EtcdServer, unused_endpoint: str) -> None:
    async def run() -> None:
        async with EtcdClient([unused_endpoint, etcd.endpoint]) as client:
            await client.put("k", b"v")  # never left for the dead one, so even a write moves on
            assert await client.get("k") is not None
            assert client.transport.endpoint == etcd.endpoint

    asyncio.run(run())


def test_a_client_waits_out_a_restart_of_etcd_within_its_timeout(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint], timeout_s=60) as client:
            await client.put("k", b"v")
            etcd.kill()
            reading = asyncio.create_task(client.get("k"))
            await etcd.up()
            found = await reading
            assert found is not None and found.value == b"v"

    asyncio.run(run())


def test_nothing_listening_is_unavailable_for_reads_and_writes_alike(unused_endpoint: str) -> None:
    async def run() -> None:
        async with EtcdClient([unused_endpoint], timeout_s=0.3) as client:
            with pytest.raises(EtcdUnavailable):
                await client.get("k")
            with pytest.raises(EtcdUnavailable):
                await client.put("k", b"v")

    asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":2379", "host:0", "host:65536", "host:x", "a/b:1", "https://a:1"]
)
def test_an_endpoint_that_is_none_is_refused_with_the_mend(text: str) -> None:
    with pytest.raises(UserError, match="HOST:PORT"):
        EtcdClient([text])


def test_no_endpoint_at_all_is_refused_with_the_mend() -> None:
    with pytest.raises(UserError, match="HOST:PORT"):
        EtcdClient([])


def test_endpoints_may_be_written_as_urls() -> None:
    assert EtcdClient(["http://etcd-1:2379/", "10.0.0.1:1"]).endpoints == ("etcd-1:2379", "10.0.0.1:1")


@pytest.mark.parametrize(("prefix", "end"), [("a/", b"a0"), ("", b"\0"), ("é", b"\xc3\xaa")])
def test_the_end_of_a_prefix_is_the_first_key_behind_it(prefix: str, end: bytes) -> None:
    assert prefix_end(prefix) == end
