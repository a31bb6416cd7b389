"""A replay refuses a damaged log, lets others run meanwhile, and ends with the lease."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from dtrain.common.errors import LogDamagedError
from dtrain.common.names import JobName, Term
from dtrain.coordinator import codec, history, log, service
from dtrain.coordinator.codec import Entry, event_key
from dtrain.coordinator.core.events import CancelRequested, JobCancelled, JobSubmitted, JobSucceeded
from dtrain.coordinator.core.states import JobState
from dtrain.coordinator.election import Leadership
from dtrain.coordinator.history import SLICE_EVENTS, follow_history, read_history
from dtrain.coordinator.log import Deposed, EventLog, replay
from dtrain.etcd.client import EtcdClient, KeyValue
from dtrain.etcd.errors import Compacted
from tests.coordinator.support.clusters import PREFIX, spec
from tests.coordinator.support.logs import DEADLINE_S, entries, leading, story, with_client
from tests.support.etcd_server import EtcdServer

MNIST = JobName("mnist")
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


# -- on a real etcd -------------------------------------------------------------------------------------------


async def rewrite(client: EtcdClient, key: str, value: bytes) -> None:
    """Put ``value`` as if it had always been there: at version 1."""
    await client.delete(key)
    await client.put(key, value)


async def lose(client: EtcdClient, made: list[Entry]) -> str:
    await client.delete(made[2].record.key)
    return made[2].record.key


async def lose_the_first(client: EtcdClient, made: list[Entry]) -> str:
    await client.delete(made[0].record.key)
    return made[0].record.key


async def edit(client: EtcdClient, made: list[Entry]) -> str:
    await rewrite(client, made[1].record.key, made[1].value.replace(b'"fact":"test"', b'"fact":"tess"'))
    return made[2].record.key  # the edited one is readable; the next does not follow it


async def garble(client: EtcdClient, made: list[Entry]) -> str:
    await rewrite(client, made[1].record.key, made[1].value[:-10])
    return made[1].record.key


async def swap(client: EtcdClient, made: list[Entry]) -> str:
    await rewrite(client, made[1].record.key, made[2].value)
    await rewrite(client, made[2].record.key, made[1].value)
    return made[1].record.key


async def write_again(client: EtcdClient, made: list[Entry]) -> str:
    await client.put(made[1].record.key, made[1].value)
    return made[1].record.key


async def add_a_stranger(client: EtcdClient, made: list[Entry]) -> str:
    stranger = event_key(PREFIX, MNIST, 2) + "x"
    await client.put(stranger, made[2].value)
    return made[2].record.key  # where this one should be, the stranger is


async def forge_illegal(client: EtcdClient, made: list[Entry]) -> str:
    (forged,) = entries(made[-1].record.term, [JobSucceeded()], after=made[-1])
    await client.put(forged.record.key, forged.value)
    return forged.record.key


async def forge_older_term(client: EtcdClient, made: list[Entry]) -> str:
    (forged,) = entries(1, [JobSubmitted(spec=spec(), run=3, request="r")], after=made[-1])
    await client.put(forged.record.key, forged.value)
    return forged.record.key


async def forge_number(client: EtcdClient, made: list[Entry]) -> str:
    """The right event in the right place, which says that it is another one."""
    (forged,) = entries(made[-1].record.term, [JobSubmitted(spec=spec(), run=3, request="r")], after=made[-1])
    await client.put(forged.record.key, forged.value.replace(b'"seq":7', b'"seq":8'))
    return forged.record.key


async def copy_to_another_job(client: EtcdClient, made: list[Entry]) -> str:
    for entry in made:
        await client.put(event_key(PREFIX, JobName("other"), entry.record.seq), entry.value)
    return event_key(PREFIX, JobName("other"), 1)


Damage = Callable[[EtcdClient, list[Entry]], Awaitable[str]]


@pytest.mark.parametrize(
    "damage",
    [
        lose,
        lose_the_first,
        edit,
        garble,
        swap,
        write_again,
        add_a_stranger,
        forge_illegal,
        forge_older_term,
        forge_number,
        copy_to_another_job,
    ],
)
def test_a_damaged_log_is_refused_by_the_name_of_the_key_and_left_as_it_is(etcd: EtcdServer, damage: Damage) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            made = entries(leadership.term, story(2))
            await EventLog(client, leadership).append(made)
        assert MNIST in await replay(client, PREFIX)
        key = await damage(client, made)
        before, _ = await client.range_prefix(f"{PREFIX}/jobs/")
        with pytest.raises(LogDamagedError) as caught:
            await replay(client, PREFIX)
        assert caught.value.key == key
        after, _ = await client.range_prefix(f"{PREFIX}/jobs/")
        assert after == before

    with_client(etcd, body)


def test_whoever_only_reads_a_history_is_told_of_its_damage_as_well(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            made = entries(leadership.term, story(2))
            await EventLog(client, leadership).append(made)
        key = await forge_number(client, made)
        with pytest.raises(LogDamagedError, match=key):
            await read_history(client, PREFIX, MNIST)

    with_client(etcd, body)


def test_keys_of_a_job_that_are_no_events_are_not_read_as_such(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        await client.put(f"{PREFIX}/jobs/mnist/notes", b"by a person")
        assert await replay(client, PREFIX) == {}

    with_client(etcd, body)


def test_whoever_follows_a_history_sees_old_and_new_events_once_and_in_order(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            log = EventLog(client, leadership)
            first = entries(leadership.term, story(1)[:1])
            await log.append(first)
            seen = []
            async with asyncio.timeout(DEADLINE_S):
                async for event in follow_history(client, PREFIX, MNIST):
                    seen.append(event)
                    if len(seen) == 1:
                        rest = entries(leadership.term, [CancelRequested(), JobCancelled()], after=first[-1])
                        await log.append(rest)
                    if len(seen) == 3:
                        break
            assert seen == [entry.record for entry in first + rest]

    with_client(etcd, body)


def test_a_log_survives_a_killed_etcd(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            leadership_context = leading(client)
            leadership = await leadership_context.__aenter__()
            made = entries(leadership.term, story(3))
            await EventLog(client, leadership).append(made)
            etcd.kill()
            await etcd.up()
            assert await read_history(client, PREFIX, MNIST) == [entry.record for entry in made]
            await leadership_context.__aexit__(None, None, None)

    asyncio.run(run())


def test_a_log_of_many_events_is_replayed_in_pages(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            log, last = EventLog(client, leadership), None
            told = story(400)  # 1200 events: more than a page of keys
            for start in range(0, len(told), 90):
                made = entries(leadership.term, told[start : start + 90], after=last)
                await log.append(made)
                last = made[-1]
        jobs = await replay(client, PREFIX)
        assert jobs[MNIST].run == 400

    with_client(etcd, body)
