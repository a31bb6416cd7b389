"""One leader at a time, terms that grow, and a dead leader on the same machine that nobody waits for."""

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import replace

import msgspec
import pytest

from dtrain.coordinator.election import (
    LEASE_TTL_S,
    LeaderRecord,
    campaign,
    is_gone,
    leader_key,
    read_leader,
    this_process,
)
from dtrain.etcd.client import EtcdClient
from tests.coordinator.support.clusters import PREFIX
from tests.coordinator.support.logs import DEADLINE_S, leader_record, leading
from tests.support.etcd_server import EtcdServer

DEAD_LEADER = """
import asyncio, os, signal, sys
from dtrain.coordinator.election import campaign
from dtrain.etcd.client import EtcdClient
from tests.coordinator.support.logs import leader_record
async def run():
    async with EtcdClient([sys.argv[1]]) as client:
        leadership = await campaign(client, sys.argv[2], leader_record("dead"))
        print(leadership.term, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(run())
"""


def test_a_standby_waits_while_another_leads_and_leads_at_once_when_it_resigns(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as one, EtcdClient([etcd.endpoint]) as two:
            first = await campaign(one, PREFIX, leader_record("one"))
            standing_by = asyncio.create_task(campaign(two, PREFIX, leader_record("two")))
            done, _ = await asyncio.wait({standing_by}, timeout=3.0)  # more than one look at the key
            assert not done, "two leaders"
            await first.resign()
            started_s = time.monotonic()
            async with asyncio.timeout(DEADLINE_S):
                second = await standing_by
            assert time.monotonic() - started_s < LEASE_TTL_S, "it waited for a lease although the key was deleted"
            assert second.term > first.term
            found = await read_leader(two, PREFIX)
            assert found is not None and (found[0].id, found[1]) == ("two", second.term)
            await second.resign()
            assert await read_leader(two, PREFIX) is None

    asyncio.run(run())


def test_a_standby_waits_though_the_leaders_revision_is_compacted(etcd: EtcdServer) -> None:
    """A leader in office for longer than etcd keeps old revisions is the usual case, not an error."""

    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as one, EtcdClient([etcd.endpoint]) as two:
            first = await campaign(one, PREFIX, leader_record("one"))
            for number in range(3):
                newest = await one.put(f"{PREFIX}/other", b"%d" % number)
            await one.compact(newest)
            standing_by = asyncio.create_task(campaign(two, PREFIX, leader_record("two")))
            done, _ = await asyncio.wait({standing_by}, timeout=1.0)
            assert not done, f"it did not wait: {done.pop()}"
            await first.resign()
            async with asyncio.timeout(DEADLINE_S):
                second = await standing_by
            assert second.term > first.term
            await second.resign()

    asyncio.run(run())


def test_many_candidates_give_one_leader(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            tasks = [asyncio.create_task(campaign(client, PREFIX, leader_record(f"c{n}"))) for n in range(5)]
            terms = []
            async with asyncio.timeout(DEADLINE_S):
                while tasks:
                    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    assert len(done) == 1
                    leadership = done.pop().result()
                    found = await read_leader(client, PREFIX)
                    assert found is not None and found[1] == leadership.term
                    terms.append(leadership.term)
                    tasks = list(waiting)
                    await leadership.resign()
            assert terms == sorted(set(terms))

    asyncio.run(run())


def test_a_leader_that_died_on_this_machine_is_replaced_without_waiting_for_its_lease(etcd: EtcdServer) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", DEAD_LEADER, etcd.endpoint, PREFIX], capture_output=True, text=True, timeout=60
    )
    assert dead.returncode == -9, dead.stderr

    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            assert await read_leader(client, PREFIX) is not None, "its lease is over already: this tests nothing"
            started_s = time.monotonic()
            async with leading(client) as leadership:
                assert time.monotonic() - started_s < LEASE_TTL_S / 2
                assert leadership.term > int(dead.stdout)

    asyncio.run(run())


@pytest.mark.parametrize("value", [b"garbage", b"{}", b"\xff"])
def test_a_leader_key_that_cannot_be_read_is_waited_for_like_a_living_leader(etcd: EtcdServer, value: bytes) -> None:
    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            await client.put(leader_key(PREFIX), value)
            standing_by = asyncio.create_task(campaign(client, PREFIX, leader_record()))
            done, _ = await asyncio.wait({standing_by}, timeout=1.0)
            assert not done
            await client.delete(leader_key(PREFIX))
            async with asyncio.timeout(DEADLINE_S):
                await (await standing_by).resign()

    asyncio.run(run())


def test_a_leader_of_another_machine_is_never_thought_dead() -> None:
    here = this_process()
    assert not is_gone(here)
    assert not is_gone(replace(here, boot="another", pid=2**22 + 5))
    assert not is_gone(replace(here, pid_namespace=1, pid=2**22 + 5))


def test_a_process_of_the_same_number_that_started_at_another_time_is_another() -> None:
    here = this_process()
    assert is_gone(replace(here, start_ticks=here.start_ticks - 1))
    assert is_gone(replace(here, pid=2**22 + 5))


def test_a_process_that_has_ended_and_was_not_waited_for_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_gone(replace(this_process(), pid=process.pid))
    finally:
        process.wait()


def test_the_identity_of_a_process_does_not_depend_on_the_wall_clock() -> None:
    # Two processes that read the clock at different times, or before and after it was set, must agree.
    code = "import sys, msgspec; from dtrain.coordinator import election as e; "
    code += "print(e._start_ticks(int(sys.argv[1])))"
    said = subprocess.run([sys.executable, "-c", code, str(os.getpid())], capture_output=True, text=True, check=True)
    assert int(said.stdout) == this_process().start_ticks


def test_a_leaders_record_is_json_that_a_person_reads() -> None:
    record = leader_record("me")
    value = msgspec.json.encode(record)
    assert b'"id":"me"' in value
    assert msgspec.json.decode(value, type=LeaderRecord) == record
