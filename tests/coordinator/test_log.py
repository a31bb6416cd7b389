"""The event log on a real etcd: appends are fenced, atomic and never doubled."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from dtrain.common.errors import InvariantError
from dtrain.common.names import JobName
from dtrain.coordinator.codec import events_prefix
from dtrain.coordinator.core.events import CancelRequested, JobSubmitted
from dtrain.coordinator.core.states import JobPhase
from dtrain.coordinator.election import leader_key
from dtrain.coordinator.history import read_all, read_history
from dtrain.coordinator.log import TXN_BYTES_MAX, TXN_EVENTS_MAX, TXN_JOBS_MAX, Deposed, EventLog, replay
from dtrain.etcd.client import EtcdClient, TxnResult
from tests.coordinator.support.clusters import PREFIX, spec
from tests.coordinator.support.logs import DEADLINE_S, entries, leading, story, with_client
from tests.support.etcd_server import EtcdServer
from tests.support.tcp_proxy import TcpProxy

MNIST = JobName("mnist")


@pytest.fixture
def proxy(etcd: EtcdServer) -> Iterator[TcpProxy]:
    with TcpProxy(etcd.endpoint) as link:
        yield link


async def values(client: EtcdClient, job: str = "mnist") -> list[bytes]:
    kvs, _ = await client.range_prefix(events_prefix(PREFIX, JobName(job)))
    return [kv.value for kv in kvs]


# -- append -------------------------------------------------------------------------------------------


def test_what_was_appended_is_read_again_event_by_event_and_folds_to_the_job(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            made = entries(leadership.term, story(2))
            await EventLog(client, leadership).append(made)
        assert await read_history(client, PREFIX, MNIST) == [entry.record for entry in made]
        jobs = await replay(client, PREFIX)
        assert jobs[MNIST].phase is JobPhase.CANCELLED and jobs[MNIST].run == 2
        assert jobs[MNIST].position == made[-1].record.position

    with_client(etcd, body)


def test_everything_decided_in_a_round_about_two_jobs_is_one_revision(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            both = entries(leadership.term, story(1), job="a") + entries(leadership.term, story(1), job="b")
            await EventLog(client, leadership).append(both)
        kvs, _ = await client.range_prefix(f"{PREFIX}/jobs/")
        assert len(kvs) == 6
        assert len({kv.create_revision for kv in kvs}) == 1

    with_client(etcd, body)


def test_more_than_fits_into_one_transaction_is_appended_in_order(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        names = [f"j{number:02d}" for number in range(TXN_JOBS_MAX * 2 + 1)]
        padding = "x" * 9000  # all of them together are more than one request may have
        async with leading(client) as leadership:
            log = EventLog(client, leadership)
            many = [entry for name in names for entry in entries(leadership.term, story(2), job=name, detail=padding)]
            assert len(many) > TXN_EVENTS_MAX
            await log.append(many)
        found = await read_all(client, PREFIX)
        assert {name: len(events) for name, events in found.items()} == dict.fromkeys(names, 6)
        kvs, _ = await client.range_prefix(f"{PREFIX}/jobs/")
        revisions = [kv.create_revision for kv in kvs]
        assert revisions == sorted(revisions) and len(set(revisions)) > 2

    with_client(etcd, body)


def test_a_jobs_events_that_fit_into_one_transaction_are_never_parted(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            first = entries(leadership.term, story(20, job="a"), job="a")
            whole = entries(leadership.term, story(TXN_EVENTS_MAX // 3))
            await EventLog(client, leadership).append(first + whole)
        kvs, _ = await client.range_prefix(events_prefix(PREFIX, MNIST))
        assert (len(kvs), len({kv.create_revision for kv in kvs})) == (TXN_EVENTS_MAX // 3 * 3, 1)

    with_client(etcd, body)


@pytest.mark.parametrize(
    ("runs", "detail_bytes", "transactions"),
    [(TXN_EVENTS_MAX, 0, 3), (10, TXN_BYTES_MAX // 10, 4)],
    ids=["too many", "too large"],
)
def test_what_was_decided_about_one_job_is_cut_where_it_is_too_much_for_a_transaction(
    etcd: EtcdServer, runs: int, detail_bytes: int, transactions: int
) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            made = entries(leadership.term, story(runs), detail="x" * detail_bytes)
            await EventLog(client, leadership).append(made)
            more = entries(leadership.term, story(runs + 1)[-3:], after=made[-1])
            await EventLog(client, leadership).append(more)
        kvs, _ = await client.range_prefix(events_prefix(PREFIX, MNIST))
        assert [kv.value for kv in kvs] == [entry.value for entry in made + more]
        assert len({kv.create_revision for kv in kvs}) == transactions + 1
        assert (await replay(client, PREFIX))[MNIST].run == runs + 1

    with_client(etcd, body)


def test_a_leader_that_is_deposed_between_two_transactions_leaves_a_prefix_that_its_successor_goes_on_from(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as old:
            made = entries(old.term, story(TXN_EVENTS_MAX))
            real = client.txn

            async def then_lose_the_key(*parts: Any) -> TxnResult:
                result = await real(*parts)
                await client.delete(leader_key(PREFIX))
                return result

            monkeypatch.setattr(client, "txn", then_lose_the_key)
            with pytest.raises(Deposed):
                await EventLog(client, old).append(made)
        monkeypatch.undo()
        found = (await replay(client, PREFIX))[MNIST]
        last = made[TXN_EVENTS_MAX - 1]
        assert found.position == last.record.position
        async with leading(client) as new:
            rest = [entry.record.event for entry in made[TXN_EVENTS_MAX : TXN_EVENTS_MAX + 2]]
            await EventLog(client, new).append(entries(new.term, rest, after=last))
        assert (await replay(client, PREFIX))[MNIST].position.seq == TXN_EVENTS_MAX + 2

    with_client(etcd, body)


def test_nothing_to_append_is_nothing(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            await EventLog(client, leadership).append([])
        assert await values(client) == []

    with_client(etcd, body)


def test_events_that_etcd_will_never_take_stop_the_leader(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            huge = entries(leadership.term, story(1), detail="x" * 2_000_000)
            with pytest.raises(InvariantError, match="etcd refuses"):
                await EventLog(client, leadership).append(huge)

    with_client(etcd, body)


# -- fencing ------------------------------------------------------------------------------------------


def test_a_leader_whose_key_was_deleted_cannot_append_though_its_lease_lives(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            await client.delete(leader_key(PREFIX))
            assert leadership.alive()
            with pytest.raises(Deposed):
                await EventLog(client, leadership).append(entries(leadership.term, story(1)))
        assert await values(client) == []

    with_client(etcd, body)


def test_a_leader_cannot_append_once_another_leads(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as old:
            await client.delete(leader_key(PREFIX))
            async with leading(client) as new:
                assert new.term > old.term
                first = entries(new.term, story(1)[:1])
                await EventLog(client, new).append(first)
                with pytest.raises(Deposed):
                    await EventLog(client, old).append(entries(old.term, [CancelRequested()], after=first[-1]))
                second = entries(new.term, [CancelRequested()], after=first[-1])
                await EventLog(client, new).append(second)
        assert [event.term for event in await read_history(client, PREFIX, MNIST)] == [new.term, new.term]

    with_client(etcd, body)


@pytest.mark.parametrize("succeeded", [True, False])
def test_a_leader_learns_from_etcd_that_it_is_none_any_more_though_its_clock_stood_still(
    etcd: EtcdServer, succeeded: bool
) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as old:
            log = EventLog(client, old)
            await log.require_newest()
            await client.delete(leader_key(PREFIX))
            if succeeded:
                await client.put(leader_key(PREFIX), b"another's")
            assert old.alive()
            with pytest.raises(Deposed):
                await log.require_newest()

    with_client(etcd, body)


def test_a_sequence_number_that_is_taken_is_never_written_again(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            log = EventLog(client, leadership)
            made = entries(leadership.term, story(1)[:2])
            await log.append(made)
            other = entries(leadership.term, [JobSubmitted(spec=spec(), run=1, request="other")])
            with pytest.raises(Deposed):
                await log.append(other)
        assert await values(client) == [entry.value for entry in made]

    with_client(etcd, body)


def test_appending_the_very_same_bytes_again_is_recognised_as_ours(etcd: EtcdServer) -> None:
    async def body(client: EtcdClient) -> None:
        async with leading(client) as leadership:
            log = EventLog(client, leadership)
            made = entries(leadership.term, story(1))
            await log.append(made)
            await log.append(made)
        kvs, _ = await client.range_prefix(events_prefix(PREFIX, MNIST))
        assert [kv.version for kv in kvs] == [1, 1, 1]

    with_client(etcd, body)


# -- lost answers -------------------------------------------------------------------------------------


async def until_there(client: EtcdClient, key: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await client.get(key) is None:
            await asyncio.sleep(0)


def test_an_append_whose_answer_is_lost_is_read_back_and_done_once(etcd: EtcdServer, proxy: TcpProxy) -> None:
    async def run() -> None:
        async with EtcdClient([proxy.endpoint], timeout_s=1) as client, EtcdClient([etcd.endpoint]) as witness:
            async with leading(witness) as leadership:
                made = entries(leadership.term, story(1))
                await client.get("warm")
                proxy.swallow_answers()
                appending = asyncio.create_task(EventLog(client, leadership).append(made))
                await until_there(witness, made[0].record.key)
                proxy.forward()
                async with asyncio.timeout(DEADLINE_S):
                    await appending
                assert proxy.answers_lost > 0
            kvs, _ = await witness.range_prefix(events_prefix(PREFIX, MNIST))
            assert [(kv.value, kv.version) for kv in kvs] == [(entry.value, 1) for entry in made]

    asyncio.run(run())


def test_an_append_that_never_arrived_is_tried_again(etcd: EtcdServer, proxy: TcpProxy) -> None:
    async def run() -> None:
        async with EtcdClient([proxy.endpoint], timeout_s=1) as client, EtcdClient([etcd.endpoint]) as witness:
            async with leading(witness) as leadership:
                made = entries(leadership.term, story(1))
                proxy.cut()
                appending = asyncio.create_task(EventLog(client, leadership).append(made))
                done, _ = await asyncio.wait({appending}, timeout=0.3)  # some tries have failed by then
                assert not done
                proxy.forward()
                async with asyncio.timeout(DEADLINE_S):
                    await appending
            assert await values(witness) == [entry.value for entry in made]

    asyncio.run(run())


def test_a_leader_without_etcd_steps_down_when_its_lease_is_over(etcd: EtcdServer, proxy: TcpProxy) -> None:
    async def run() -> None:
        async with EtcdClient([proxy.endpoint], timeout_s=0.5) as client, leading(client) as leadership:
            proxy.cut()
            async with asyncio.timeout(DEADLINE_S):
                with pytest.raises(Deposed, match="lease"):
                    await EventLog(client, leadership).append(entries(leadership.term, story(1)))
            assert not leadership.alive()
            proxy.forward()

    asyncio.run(run())
