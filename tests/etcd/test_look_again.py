"""Who follows a key learns of every change, also where the watch stays open and tells nothing."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
import pytest

from dtrain.common.names import WorkerId
from dtrain.coordinator.core.facts import Fact, RegistrationsListed, WorkerRegistered, WorkerUnregistered
from dtrain.coordinator.workers import follow_registrations
from dtrain.etcd import watches
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.watches import WatchBatch, watch_a_while
from dtrain.worker.rpc.leaders import Leaders
from tests.support.etcd_server import EtcdServer

DEADLINE_S = 30.0
PREFIX = "/dtrain"


@pytest.fixture
def silent_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(client: EtcdClient, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        await asyncio.Event().wait()
        raise AssertionError("it is silent")
        yield

    monkeypatch.setattr(watches, "watch", silent)
    monkeypatch.setattr(watches, "LOOK_AGAIN_S", 0.05)


def following(etcd: EtcdServer, body: Callable[[EtcdClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client, asyncio.timeout(DEADLINE_S):
            await body(client)

    asyncio.run(run())


async def register(client: EtcdClient, worker: str, *, slots: int = 1) -> None:
    value = {"worker": worker, "journal": "j", "address": "", "slots": slots}
    await client.put(f"{PREFIX}/workers/{worker}", msgspec.json.encode(value))


class Told:
    """The facts of whoever follows the registrations."""

    def __init__(self) -> None:
        self._facts: asyncio.Queue[Fact] = asyncio.Queue()
        self.tell = self._facts.put

    async def next(self) -> str:
        while True:
            match await self._facts.get():
                case WorkerRegistered(registration=registration):
                    return f"{registration.worker} has {registration.slots} slots"
                case WorkerUnregistered(worker=worker):
                    return f"{worker} is gone"
                case RegistrationsListed():
                    pass
                case other:
                    raise AssertionError(other)


@pytest.mark.usefixtures("silent_watches")
def test_a_worker_that_comes_changes_or_goes_is_seen_once_though_the_watch_is_silent(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        told = Told()
        await register(client, "w1")
        task = asyncio.create_task(follow_registrations(client, PREFIX, told.tell))
        try:
            assert await told.next() == "w1 has 1 slots"
            await register(client, "w2")
            assert await told.next() == "w2 has 1 slots"
            await register(client, "w1", slots=4)
            assert await told.next() == "w1 has 4 slots"
            await client.delete(f"{PREFIX}/workers/w2")
            assert await told.next() == "w2 is gone"
        finally:
            task.cancel()

    following(etcd, body)


def test_all_registrations_are_told_before_it_is_said_that_they_are_all(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        facts: asyncio.Queue[Fact] = asyncio.Queue()
        for worker in ("w1", "w2"):
            await register(client, worker)
        task = asyncio.create_task(follow_registrations(client, PREFIX, facts.put))
        try:
            told = [await facts.get() for _ in range(3)]
        finally:
            task.cancel()
        named = [fact.registration.worker for fact in told if isinstance(fact, WorkerRegistered)]
        assert named == [WorkerId("w1"), WorkerId("w2")] and told[-1] == RegistrationsListed()

    following(etcd, body)


@pytest.mark.usefixtures("silent_watches")
def test_a_new_leader_is_found_though_the_watch_is_silent(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        leaders = Leaders(client, PREFIX)
        task = asyncio.create_task(leaders.follow())
        try:
            for address in ("first:1", "second:1"):
                leaders.changed.clear()
                await client.delete(f"{PREFIX}/leader")
                await client.put(f"{PREFIX}/leader", msgspec.json.encode({"address": address}))
                await leaders.changed.wait()
                assert leaders.current is not None and leaders.current.address == address
        finally:
            task.cancel()

    following(etcd, body)


def test_a_watch_for_a_while_tells_what_happens_in_it_and_ends(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(client: EtcdClient) -> None:
        first = await client.put("p/1", b"")
        monkeypatch.setattr(watches, "LOOK_AGAIN_S", 1.0)
        seen = [
            event.kv.key async for batch in watch_a_while(client, "p/", from_revision=first) for event in batch.events
        ]
        assert seen == ["p/1"]

    following(etcd, body)
