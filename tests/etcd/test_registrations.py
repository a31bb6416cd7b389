"""A registration is a level that is held: it is there while its process lives, and gone soon after."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import pytest

from dtrain.common.errors import RetryableError
from dtrain.etcd import registrations
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import OutcomeUnknown
from dtrain.etcd.keyvalues import KeyValue
from dtrain.etcd.leases import Lease, renew
from dtrain.etcd.registrations import RegistrationChange, RegistrationTaken, keep_registered
from dtrain.etcd.transactions import Compare, Op, TxnResult
from tests.support.etcd_server import EtcdServer
from tests.support.tcp_proxy import TcpProxy

DEADLINE_S = 60.0
KEY = "/dtrain/workers/w1"
SHORT_TTL_S = 2  # etcd's smallest


@asynccontextmanager
async def registered(
    client: EtcdClient,
    value: Callable[[], bytes],
    ttl_s: float,
    changes: list[RegistrationChange] | None = None,
    is_own: Callable[[bytes], bool] = lambda _: False,
) -> AsyncIterator["asyncio.Task[None]"]:
    on_change = None if changes is None else changes.append
    task = asyncio.create_task(keep_registered(client, KEY, value, ttl_s, is_own=is_own, on_change=on_change))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, RegistrationTaken):
            await task


async def until(client: EtcdClient, holds: Callable[[KeyValue | None], bool]) -> KeyValue | None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with suppress(RetryableError):
                found = await client.get(KEY)
                if holds(found):
                    return found
            await asyncio.sleep(0.02)


def test_a_registration_is_there_while_kept_and_taken_back_when_cancelled(etcd: EtcdServer) -> None:
    async def run() -> None:
        changes: list[RegistrationChange] = []
        async with EtcdClient([etcd.endpoint]) as client:
            async with registered(client, lambda: b"me", 60, changes):
                found = await until(client, lambda kv: kv is not None)
                assert found is not None and found.value == b"me" and found.lease != 0
            assert await client.get(KEY) is None, "its lease was not revoked"
        assert [change.registered for change in changes] == [True, False]
        assert changes[0].revision == found.mod_revision and changes[0].lease == found.lease

    asyncio.run(run())


def test_a_registration_lost_in_an_outage_is_made_again_when_etcd_is_back(etcd: EtcdServer) -> None:
    async def run() -> None:
        changes: list[RegistrationChange] = []
        async with EtcdClient([etcd.endpoint]) as client, registered(client, lambda: b"me", 1, changes):
            first = await until(client, lambda kv: kv is not None)
            assert first is not None
            etcd.kill()
            async with asyncio.timeout(DEADLINE_S):
                while len(changes) < 2:
                    await asyncio.sleep(0.02)
            assert [change.registered for change in changes] == [True, False]
            await etcd.up()
            again = await until(client, lambda kv: kv is not None and kv.lease != first.lease)
            assert again is not None and again.value == b"me"
            assert again.create_revision == first.create_revision, "it was taken back in between"
            async with asyncio.timeout(DEADLINE_S):
                while len(changes) < 3:
                    await asyncio.sleep(0.02)
            assert changes[2].registered

    asyncio.run(run())


def test_a_short_restart_of_etcd_does_not_disturb_a_registration(etcd: EtcdServer) -> None:
    async def run() -> None:
        changes: list[RegistrationChange] = []
        async with EtcdClient([etcd.endpoint]) as client, registered(client, lambda: b"me", 60, changes):
            first = await until(client, lambda kv: kv is not None)
            etcd.kill()
            await etcd.up()
            assert await until(client, lambda kv: kv is not None) == first
            assert [change.registered for change in changes] == [True]

    asyncio.run(run())


def test_a_deleted_registration_is_put_again_and_a_changed_value_arrives(etcd: EtcdServer) -> None:
    async def run() -> None:
        value = b"one"
        async with EtcdClient([etcd.endpoint]) as client, registered(client, lambda: value, 1):
            first = await until(client, lambda kv: kv is not None)
            assert first is not None
            await client.delete(KEY)
            again = await until(client, lambda kv: kv is not None)
            assert again is not None and again.lease == first.lease
            value = b"two"
            await until(client, lambda kv: kv is not None and kv.value == b"two")

    asyncio.run(run())


def test_a_registration_that_vanished_is_put_again_at_once(etcd: EtcdServer) -> None:
    """As one does that a late put had bound to a lease which nobody renews."""

    async def run() -> None:
        changes: list[RegistrationChange] = []
        async with EtcdClient([etcd.endpoint]) as client, registered(client, lambda: b"me", 600, changes):
            await until(client, lambda kv: kv is not None)
            async with asyncio.timeout(DEADLINE_S):
                while not changes:
                    await asyncio.sleep(0.02)
            await client.delete(KEY)
            await until(client, lambda kv: kv is not None)  # and not only when it is compared anyway

    asyncio.run(run())


def test_a_restarted_process_replaces_its_older_self_at_once_and_the_older_learns_it(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client, registered(client, lambda: b"old", 1) as older:
            await until(client, lambda kv: kv is not None)
            async with registered(client, lambda: b"new", 60):
                await until(client, lambda kv: kv is not None and kv.value == b"new")
                with pytest.raises(RegistrationTaken, match=KEY):
                    await asyncio.wait_for(older, DEADLINE_S)
                found = await client.get(KEY)
                assert found is not None and found.value == b"new"

    asyncio.run(run())


def test_a_key_bound_to_an_older_lease_by_a_late_put_is_bound_to_the_living_one_again(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            registration = registrations._Registration(client, KEY, lambda: b"me", None)
            older = await Lease.grant(client, 60)
            newer = await Lease.grant(client, 1)
            registration._leases.add(older.id)
            holding = asyncio.create_task(registration.hold(newer))
            await until(client, lambda kv: kv is not None and kv.lease == newer.id)
            await client.put(KEY, b"me", lease=older.id)
            await until(client, lambda kv: kv is not None and kv.lease == newer.id)
            holding.cancel()

    asyncio.run(run())


def test_a_first_put_whose_answer_is_lost_does_not_make_a_stranger_of_its_own_older_self(etcd: EtcdServer) -> None:
    async def run() -> None:
        with TcpProxy(etcd.endpoint) as proxy:
            async with (
                EtcdClient([proxy.endpoint], timeout_s=1) as client,
                EtcdClient([etcd.endpoint]) as witness,
            ):
                older = await Lease.grant(witness, 60)
                await witness.put(KEY, b"older self", lease=older.id)
                real_txn = client.txn

                async def put_into_the_void(compares: Sequence[Compare], then: Sequence[Op]) -> TxnResult:
                    proxy.cut()
                    client.txn = real_txn  # type: ignore[method-assign]
                    return await real_txn(compares, then)

                client.txn = put_into_the_void  # type: ignore[method-assign, assignment]
                async with registered(client, lambda: b"me", 60):
                    async with asyncio.timeout(DEADLINE_S):
                        while client.txn != real_txn:
                            await asyncio.sleep(0.02)
                    proxy.forward()
                    await until(witness, lambda kv: kv is not None and kv.value == b"me")

    asyncio.run(run())


def test_a_first_put_that_was_done_unheard_stands_and_is_not_taken_back(etcd: EtcdServer) -> None:
    """A key that vanished and came again would be a lost worker for whoever looks in between."""

    async def run() -> None:
        changes: list[RegistrationChange] = []
        async with EtcdClient([etcd.endpoint]) as client:
            real_txn, done = client.txn, []

            async def put_unheard(compares: Sequence[Compare], then: Sequence[Op]) -> TxnResult:
                done.append((await real_txn(compares, then)).revision)
                raise OutcomeUnknown("Stream removed")

            client.txn = put_unheard  # type: ignore[method-assign, assignment]
            async with registered(client, lambda: b"me", 60, changes):
                async with asyncio.timeout(DEADLINE_S):
                    while not changes:
                        await asyncio.sleep(0.02)
                found = await client.get(KEY)
            assert found is not None and found.version == 1 and found.lease == changes[0].lease
            assert done == [found.mod_revision] == [changes[0].revision]

    asyncio.run(run())


async def put_is_late(client: EtcdClient, due: asyncio.Event) -> None:
    """From now on a put of ``client`` is on its way until ``due``."""
    real_txn = client.txn

    async def put_later(compares: Sequence[Compare], then: Sequence[Op]) -> TxnResult:
        await due.wait()
        return await real_txn(compares, then)

    client.txn = put_later  # type: ignore[method-assign, assignment]


def test_the_key_of_a_process_that_is_back_stays_however_late_its_put_is(etcd: EtcdServer) -> None:
    """Or a healthy worker would be in no list of a leader that its streams do not reach just then."""

    async def run() -> None:
        due = asyncio.Event()
        async with EtcdClient([etcd.endpoint]) as client, EtcdClient([etcd.endpoint]) as witness:
            older = await Lease.grant(witness, SHORT_TTL_S)
            put_at = await witness.put(KEY, b"earlier life", lease=older.id)  # killed now: nobody renews it
            await put_is_late(client, due)
            async with registered(client, lambda: b"me", 60, is_own=lambda value: value == b"earlier life"):
                for _ in range(30):
                    await asyncio.sleep(SHORT_TTL_S / 10)
                    found = await witness.get(KEY)
                    assert found is not None and found.mod_revision == put_at, "it vanished in between"
                due.set()
                again = await until(witness, lambda kv: kv is not None and kv.value == b"me")
                assert again is not None and again.create_revision == put_at

    asyncio.run(run())


def test_a_key_that_vanishes_before_it_is_put_anew_is_put_at_once(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late put may bind it to a lease that is over a moment later, while the put that is to follow takes long."""

    async def run() -> None:
        begun: list[asyncio.Future[TxnResult]] = []
        renewed: list[int] = []
        async with EtcdClient([etcd.endpoint]) as client, EtcdClient([etcd.endpoint]) as witness:
            older = await Lease.grant(witness, 60)
            await witness.put(KEY, b"earlier life", lease=older.id)
            real_txn = client.txn

            async def first_never(compares: Sequence[Compare], then: Sequence[Op]) -> TxnResult:
                if begun:
                    return await real_txn(compares, then)
                begun.append(asyncio.get_running_loop().create_future())
                return await begun[0]

            def renewing(client: EtcdClient, lease: int, *, timeout_s: float) -> Awaitable[int]:
                renewed.append(lease)
                return renew(client, lease, timeout_s=timeout_s)

            client.txn = first_never  # type: ignore[method-assign, assignment]
            monkeypatch.setattr("dtrain.etcd.registrations.renew", renewing)
            async with registered(client, lambda: b"me", 60, is_own=lambda value: value == b"earlier life"):
                async with asyncio.timeout(DEADLINE_S):
                    while not begun or renewed[-1:] != [older.id]:
                        await asyncio.sleep(0.02)
                await older.revoke()
                await until(witness, lambda kv: kv is not None and kv.value == b"me")
                assert not begun[0].done(), "the first put is still on its way"

    asyncio.run(run())


def test_what_a_killed_life_had_on_its_way_cannot_bind_the_key_of_the_next_to_a_dead_lease(etcd: EtcdServer) -> None:
    """A leader that the streams do not reach just then would take the worker for lost when that lease ends."""

    async def run() -> None:
        on_its_way: list[tuple[Sequence[Compare], Sequence[Op]]] = []
        async with EtcdClient([etcd.endpoint]) as killed, EtcdClient([etcd.endpoint]) as client:

            async def put_never(compares: Sequence[Compare], then: Sequence[Op]) -> TxnResult:
                on_its_way.append((compares, then))
                return await asyncio.get_running_loop().create_future()

            killed.txn = put_never  # type: ignore[method-assign, assignment]
            async with registered(killed, lambda: b"killed", 60):
                async with asyncio.timeout(DEADLINE_S):
                    while not on_its_way:
                        await asyncio.sleep(0.02)
                async with registered(client, lambda: b"me", 60):
                    mine = await until(client, lambda kv: kv is not None)
                    for compares, then in on_its_way:
                        assert not (await client.txn(compares, then)).succeeded
                    assert await client.get(KEY) == mine

    asyncio.run(run())


def test_the_key_of_a_stranger_is_left_to_its_lease(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client, EtcdClient([etcd.endpoint]) as witness:
            older = await Lease.grant(witness, SHORT_TTL_S)
            await witness.put(KEY, b"stranger", lease=older.id)
            await put_is_late(client, asyncio.Event())
            async with registered(client, lambda: b"me", 60, is_own=lambda value: value == b"earlier life"):
                await until(witness, lambda kv: kv is None)

    asyncio.run(run())


@pytest.mark.parametrize("known", [True, False], ids=["known by its journal", "its disk was lost"])
def test_a_late_put_of_an_earlier_life_is_put_right_and_one_that_goes_on_putting_is_a_living_owner(
    etcd: EtcdServer, known: bool
) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client, EtcdClient([etcd.endpoint]) as witness:
            older = await Lease.grant(witness, 60)
            async with registered(client, lambda: b"me", 60, is_own=lambda _: known) as task:
                await until(witness, lambda kv: kv is not None and kv.value == b"me")
                for _ in range(registrations._LATE_PUTS_MAX):
                    await witness.put(KEY, b"earlier life", lease=older.id)
                    await until(witness, lambda kv: kv is not None and kv.value == b"me")
                await witness.put(KEY, b"earlier life", lease=older.id)
                with pytest.raises(RegistrationTaken, match=KEY):
                    async with asyncio.timeout(DEADLINE_S):
                        await task

    asyncio.run(run())
