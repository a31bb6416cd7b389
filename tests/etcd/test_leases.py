"""A lease's owner learns of its loss no later than anyone else."""

import asyncio
import time

import pytest

from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import EtcdUnavailable, LeaseLost, NoSpace
from dtrain.etcd.leases import Lease
from tests.support.etcd_server import EtcdServer, etcd_server
from tests.support.tcp_proxy import TcpProxy

DEADLINE_S = 30.0
MIB = 1024 * 1024
COUNT_AT_ONCE = ["--backend-batch-limit=1"]  # the quota is judged by what is committed to the file


async def until_gone(client: EtcdClient, key: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await client.get(key) is not None:
            await asyncio.sleep(0.02)


def test_a_kept_lease_outlives_its_time_to_live_and_its_keys_vanish_when_revoked(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            lease = await Lease.grant(client, 1)
            await client.put("k", b"", lease=lease.id)
            granted_until = lease.deadline()
            keeping = asyncio.create_task(lease.keep_alive())
            async with asyncio.timeout(DEADLINE_S):
                while time.monotonic() < granted_until + lease.ttl_s:
                    await asyncio.sleep(0.05)
                    assert lease.alive()
            found = await client.get("k")
            assert found is not None and found.lease == lease.id
            await lease.revoke()
            assert lease.lost.is_set() and not lease.alive()
            await asyncio.wait_for(keeping, DEADLINE_S)
            assert await client.get("k") is None

    asyncio.run(run())


def test_the_deadline_counts_from_before_the_request_and_with_what_was_granted(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            before = time.monotonic()
            lease = await Lease.grant(client, 4.2)
            assert lease.ttl_s == 5
            assert before + 5 <= lease.deadline() <= time.monotonic() + 5

    asyncio.run(run())


def test_a_time_to_live_below_etcds_smallest_is_counted_as_etcd_counts_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    slow_beat = ["--heartbeat-interval=100", "--election-timeout=1000"]  # etcd's own defaults, for networks
    with etcd_server(tmp_path_factory.mktemp("slow"), options=slow_beat) as server:

        async def run() -> None:
            async with EtcdClient([server.endpoint]) as client:
                before = time.monotonic()
                lease = await Lease.grant(client, 1)
                assert lease.ttl_s == 2
                assert lease.deadline() >= before + 2

        asyncio.run(run())


@pytest.mark.parametrize("harm", ["frozen", "killed"])
def test_without_an_answer_the_lease_is_lost_at_its_local_deadline(etcd: EtcdServer, harm: str) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            lease = await Lease.grant(client, 2)
            keeping = asyncio.create_task(lease.keep_alive())
            if harm == "frozen":
                etcd.pause()
            else:
                etcd.kill()
            harmed = time.monotonic()
            assert not lease.lost.is_set()
            await asyncio.wait_for(keeping, DEADLINE_S)
            assert lease.lost.is_set()
            assert lease.deadline() <= harmed + lease.ttl_s
            assert time.monotonic() >= lease.deadline(), "given up although there was time left"

    asyncio.run(run())


def test_a_restart_of_etcd_within_the_time_to_live_costs_no_lease(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            granted = await Lease.grant(client, 30)
            await client.put("k", b"", lease=granted.id)
            etcd.kill()
            await etcd.up()
            # The same lease, with beats so frequent that the test need not wait ten seconds for the next.
            lease = Lease(client, lease_id=granted.id, ttl_s=1, deadline_s=granted.deadline())
            keeping = asyncio.create_task(lease.keep_alive())
            async with asyncio.timeout(DEADLINE_S):
                while lease.deadline() <= granted.deadline():
                    await asyncio.sleep(0.02)
            assert lease.alive()
            found = await client.get("k")
            assert found is not None and found.lease == lease.id
            keeping.cancel()

    asyncio.run(run())


def test_a_lease_that_etcd_no_longer_knows_is_lost_at_the_next_beat(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            lease = await Lease.grant(client, 3)
            twin = Lease(client, lease_id=lease.id, ttl_s=lease.ttl_s, deadline_s=lease.deadline())
            await client.put("k", b"", lease=lease.id)
            await twin.revoke()  # as an operator does
            await asyncio.wait_for(lease.keep_alive(), DEADLINE_S)
            assert lease.lost.is_set()
            assert time.monotonic() < lease.deadline(), "only the deadline told it"
            with pytest.raises(LeaseLost):
                await client.put("k", b"", lease=lease.id)

    asyncio.run(run())


def test_keys_of_an_owner_that_died_vanish_by_themselves(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            lease = await Lease.grant(client, 1)
            await client.put("k", b"", lease=lease.id)
            await until_gone(client, "k")
            assert not lease.alive()

    asyncio.run(run())


def test_a_grant_whose_answer_is_lost_is_as_if_it_had_never_been(etcd: EtcdServer) -> None:
    async def run() -> None:
        with TcpProxy(etcd.endpoint) as proxy:
            async with EtcdClient([proxy.endpoint], timeout_s=1) as client:
                await client.put("warm", b"")
                proxy.swallow_answers()
                with pytest.raises(EtcdUnavailable):
                    await Lease.grant(client, 5)
                assert proxy.answers_lost > 0

    asyncio.run(run())


def test_revoking_is_quick_and_silent_when_etcd_is_away(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint], timeout_s=600) as client:
            lease = await Lease.grant(client, 60)
            etcd.pause()
            await asyncio.wait_for(lease.revoke(), DEADLINE_S)
            assert lease.lost.is_set()

    asyncio.run(run())


def test_a_full_etcd_grants_no_lease_but_renews_those_it_has(tmp_path_factory: pytest.TempPathFactory) -> None:
    with etcd_server(
        tmp_path_factory.mktemp("full"), options=[f"--quota-backend-bytes={4 * MIB}", *COUNT_AT_ONCE]
    ) as server:

        async def run() -> None:
            async with EtcdClient([server.endpoint]) as client:
                lease = await Lease.grant(client, 1)
                granted_until = lease.deadline()
                keeping = asyncio.create_task(lease.keep_alive())
                with pytest.raises(NoSpace):
                    for number in range(100):
                        await client.put(f"fill/{number}", bytes(MIB))
                with pytest.raises(NoSpace):
                    await Lease.grant(client, 1)
                async with asyncio.timeout(DEADLINE_S):
                    while time.monotonic() < granted_until + 1:
                        await asyncio.sleep(0.05)
                assert lease.alive()
                await lease.revoke()
                await keeping

        asyncio.run(run())
