"""A replay lets the rest of the coordinator live, ends with its lease, and begins again where it was cut off."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from dtrain.common.names import JobName, Term
from dtrain.coordinator import codec, history, log, service
from dtrain.coordinator.codec import Entry
from dtrain.coordinator.core.states import JobState
from dtrain.coordinator.election import Leadership
from dtrain.coordinator.history import SLICE_EVENTS
from dtrain.coordinator.log import Deposed, replay
from dtrain.etcd.client import EtcdClient, KeyValue
from dtrain.etcd.errors import Compacted
from tests.coordinator.support.clusters import PREFIX
from tests.coordinator.support.logs import DEADLINE_S, entries, story

Reading = Callable[[], Awaitable[list[KeyValue]]]


class Store:
    """An etcd that answers each reading of the log with the next of these."""

    def __init__(self, *readings: Reading) -> None:
        self._readings = list(readings)

    async def range_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        return await self._readings.pop(0)(), 1


class Lead:
    """A leadership that ends when told to."""

    term = Term(7)

    def __init__(self) -> None:
        self.over = asyncio.Event()

    def alive(self) -> bool:
        return not self.over.is_set()

    async def lost(self) -> None:
        await self.over.wait()


def holding(made: list[Entry]) -> Reading:
    kvs = [
        KeyValue(key=entry.record.key, value=entry.value, create_revision=1, mod_revision=1, version=1, lease=0)
        for entry in made
    ]

    async def read() -> list[KeyValue]:
        return kvs

    return read


def store(*readings: Reading) -> EtcdClient:
    return cast(EtcdClient, Store(*readings))


@pytest.mark.parametrize("module_and_work", [(history, "decode"), (log, "evolve")])
def test_a_long_log_is_replayed_in_slices_between_which_others_run(
    monkeypatch: pytest.MonkeyPatch, module_and_work: tuple[object, str]
) -> None:
    module, work = module_and_work
    real, done = getattr(module, work), 0
    longest = since = 0

    def counting(*args: object) -> object:
        nonlocal done, longest
        done += 1
        longest = max(longest, done - since)
        return real(*args)

    async def run() -> None:
        nonlocal since
        made = [entry for job in "abc" for entry in entries(7, story(SLICE_EVENTS, job=job), job=job)]
        replaying = asyncio.create_task(replay(store(holding(made)), PREFIX))
        while not replaying.done():
            since = done
            await asyncio.sleep(0)
        jobs = await replaying
        assert done == len(made) and longest <= SLICE_EVENTS
        assert {name: job.position.seq for name, job in jobs.items()} == dict.fromkeys("abc", 3 * SLICE_EVENTS)

    monkeypatch.setattr(module, work, counting)
    asyncio.run(run())


async def replayed(client: EtcdClient, lead: Lead) -> dict[JobName, JobState]:
    async with asyncio.timeout(DEADLINE_S):
        return await service._replay_while_leading(client, PREFIX, cast(Leadership, lead))


def test_a_leader_whose_lease_ends_in_the_middle_of_a_replay_steps_down_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = entries(7, story(4 * SLICE_EVENTS))
    folded = 0

    async def run() -> None:
        lead = Lead()

        def folding(state: JobState | None, record: codec.RecordedEvent) -> JobState:
            nonlocal folded
            folded += 1
            lead.over.set()
            return real(state, record)

        real = log.evolve
        monkeypatch.setattr(log, "evolve", folding)
        with pytest.raises(Deposed):
            await replayed(store(holding(made)), lead)

    asyncio.run(run())
    assert 0 < folded < len(made), "it went on with a lease that was gone"


def test_a_leader_that_cannot_read_the_log_steps_down_when_its_lease_ends() -> None:
    async def run() -> None:
        lead = Lead()

        async def never() -> list[KeyValue]:
            lead.over.set()
            await asyncio.Event().wait()
            raise AssertionError("nothing comes")

        with pytest.raises(Deposed):
            await replayed(store(never), lead)

    asyncio.run(run())


def test_a_log_that_was_compacted_between_two_pages_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_REPLAY_RETRY_S", 0.0)

    async def compacted() -> list[KeyValue]:
        raise Compacted("the first page's revision is gone")

    async def run() -> None:
        jobs = await replayed(store(compacted, holding(entries(7, story(2)))), Lead())
        assert jobs[JobName("mnist")].run == 2

    asyncio.run(run())
