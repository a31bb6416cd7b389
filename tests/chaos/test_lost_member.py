"""An etcd member that is lost for good, data included, is replaced while whoever uses etcd goes on."""

import asyncio
from pathlib import Path

import pytest

from dtrain.common.errors import RetryableError
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.transactions import absent, put
from tests.chaos.etcd_members import MEMBERS, EtcdMembers, replacing
from tests.support.processes import MARK, end_all, new_mark

WRITE_S = 60.0  # for one write, elections included, on a busy machine


async def _write(client: EtcdClient, number: int) -> None:
    """Create a key, as an event is appended: again until it is there."""
    async with asyncio.timeout(WRITE_S):
        while await client.get(f"/events/{number:06d}") is None:
            try:
                await client.txn([absent(f"/events/{number:06d}")], [put(f"/events/{number:06d}", b"%d" % number)])
            except RetryableError:
                await asyncio.sleep(0.05)


def test_every_member_is_lost_and_replaced_one_after_the_other_and_no_event_is_lost(tmp_path: Path) -> None:
    mark = new_mark()
    etcd = EtcdMembers(tmp_path, {MARK: mark})

    async def run() -> None:
        async with EtcdClient(etcd.endpoints) as client:
            await _write(client, 0)
            for number in range(MEMBERS):
                etcd.lose(number)
                await _write(client, 3 * number + 1)  # two are a quorum
                etcd.start()  # brings no lost member back
                etcd.replace()
                await _write(client, 3 * number + 2)
                await asyncio.to_thread(etcd.wait_replaced)
                await asyncio.to_thread(etcd.wait_ready)
                await _write(client, 3 * number + 3)
            found, _ = await client.range_prefix("/events/")  # of the first three members nothing is left
            assert [int(kv.value) for kv in found] == list(range(3 * MEMBERS + 1))
            assert {kv.version for kv in found} == {1}

    try:
        with replacing(etcd):
            etcd.start()
            etcd.wait_ready()
            asyncio.run(run())
            assert etcd.replaced == MEMBERS
            assert not [folder for folder in tmp_path.glob("member*-0") if folder.exists()]
    finally:
        end_all(mark)


def test_a_lost_member_is_replaced_once_the_others_have_a_quorum_again(tmp_path: Path) -> None:
    mark = new_mark()
    etcd = EtcdMembers(tmp_path, {MARK: mark})
    try:
        with replacing(etcd):
            etcd.start()
            etcd.wait_ready()
            etcd.lose(0)
            etcd.members[1].kill()
            etcd.replace()
            with pytest.raises(AssertionError, match="one at a time"):
                etcd.lose(2)
            etcd.start()
            etcd.wait_replaced()
            etcd.wait_ready()
    finally:
        end_all(mark)
