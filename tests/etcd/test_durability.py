"""What etcd acknowledged is there after it was killed, and what it did not is told as unknown, never as done."""

import asyncio
import random

import pytest

from dtrain.common.errors import RetryableError
from dtrain.etcd import transactions as do
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import EtcdUnavailable, OutcomeUnknown
from dtrain.etcd.probes import known_lossy
from tests.support.etcd_server import EtcdServer

DEADLINE_S = 120.0
WRITERS = 8
SEED = 7


async def append(client: EtcdClient, writer: int, acknowledged: dict[str, int], unknown: set[str]) -> None:
    """Append under ever new keys, fenced by the leader key, as the log does; note what became of each."""
    leader = await client.get("leader")
    assert leader is not None
    number = 0
    while True:
        key = f"e/{writer}/{number:06}"
        fence = do.create_revision_is("leader", leader.create_revision)
        try:
            done = await client.txn([fence, do.absent(key)], [do.put(key, b"")])
        except OutcomeUnknown:
            unknown.add(key)
        except EtcdUnavailable:
            continue  # never sent: the same key again
        else:
            assert done.succeeded
            acknowledged[key] = done.revision
        number += 1


async def read_all(client: EtcdClient) -> dict[str, int]:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return {kv.key: kv.mod_revision for kv in (await client.range_prefix("e/"))[0]}
            except RetryableError:
                await asyncio.sleep(0.02)


def kill_and_compare(etcd: EtcdServer, kills: int) -> None:
    moments = random.Random(SEED)

    async def run() -> None:
        acknowledged: dict[str, int] = {}
        unknown: set[str] = set()
        async with EtcdClient([etcd.endpoint]) as client:
            status = await client.status()
            await client.put("leader", b"")
            for _ in range(kills):
                writers = [
                    asyncio.create_task(append(client, writer, acknowledged, unknown)) for writer in range(WRITERS)
                ]
                try:
                    target = len(acknowledged) + moments.randrange(20, 200)
                    async with asyncio.timeout(DEADLINE_S):
                        while len(acknowledged) < target:
                            await asyncio.sleep(0)
                            assert not any(writer.done() for writer in writers)
                    etcd.kill()
                finally:
                    for writer in writers:
                        writer.cancel()
                    await asyncio.gather(*writers, return_exceptions=True)
                await etcd.up()
                found = await read_all(client)
                lost = {key: at for key, at in acknowledged.items() if found.get(key) != at}
                assert not lost, f"etcd {status.version} lost what it acknowledged: {known_lossy(status.version)}"
                # A key that nobody was told of is one whose answer was lost or whose writer was ended.
                assert len(found) <= len(acknowledged) + len(unknown) + kills * WRITERS
                await client.delete_prefix("e/")
                acknowledged.clear()
                unknown.clear()

    asyncio.run(run())


def test_an_acknowledged_transaction_survives_a_kill_of_etcd(etcd: EtcdServer) -> None:
    kill_and_compare(etcd, kills=3)


@pytest.mark.slow
def test_acknowledged_transactions_survive_kill_after_kill_of_etcd(etcd: EtcdServer) -> None:
    kill_and_compare(etcd, kills=20)
