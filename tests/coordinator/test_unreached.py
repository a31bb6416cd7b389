"""A leader whom no worker reaches makes room for one that they reach."""

import asyncio
from pathlib import Path

import pytest

from dtrain.coordinator import service
from dtrain.coordinator.core import observed
from dtrain.coordinator.election import read_leader
from dtrain.coordinator.service import Coordinator, CoordinatorConfig
from dtrain.etcd.client import EtcdClient
from tests.coordinator.support.clusters import PREFIX, Cluster
from tests.coordinator.support.processes import CoordinatorProcess
from tests.coordinator.support.workers import DEADLINE_S, RETRY_S, HandWorker
from tests.support.etcd_server import EtcdServer

ELSEWHERE = "127.0.0.2"  # where nobody listens


async def until_leads(client: EtcdClient, name: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (found := await read_leader(client, PREFIX)) is None or found[0].id != name:
            await asyncio.sleep(RETRY_S)


def test_a_leader_whom_no_worker_reaches_lets_another_lead(
    etcd: EtcdServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observed, "UNREACHED_AFTER_S", 1.0)
    monkeypatch.setattr(service, "_LOOK_S", 0.05)

    async def play() -> None:
        async with EtcdClient((etcd.endpoint,)) as client:
            config = CoordinatorConfig(
                etcd=(etcd.endpoint,), listen="127.0.0.1:0", prefix=PREFIX, identity="astray", advertise=ELSEWHERE
            )
            astray = Coordinator(config, client)
            running = asyncio.create_task(astray.run())
            try:
                await until_leads(client, "astray")
                with CoordinatorProcess(etcd.endpoint, tmp_path, "good") as good:
                    async with asyncio.timeout(DEADLINE_S):
                        while "listens on" not in good.said():
                            await asyncio.sleep(RETRY_S)
                    async with HandWorker(client) as worker:
                        await until_leads(client, "good")
                        await worker.until(lambda: any(each.startswith("noop/") for _, each in worker.received))
                        assert not running.done(), "it stands by"
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                await astray.close()

    asyncio.run(play())


def test_it_stays_where_there_is_nobody_to_be_reached_by_or_somebody_reaches_it() -> None:
    cluster = Cluster()
    cluster.passes(observed.UNREACHED_AFTER_S * 2)
    assert not cluster.observed.unreached(cluster.now_s), "nobody is registered"
    cluster.joins("w1", "w2")
    cluster.loses("w1")
    cluster.loses("w2")
    cluster.passes(observed.UNREACHED_AFTER_S * 2)
    cluster.registers("w1")
    assert not cluster.observed.unreached(cluster.now_s), "it has only just come"
    cluster.joins("w1", "w2")
    cluster.passes(observed.UNREACHED_AFTER_S - 1.0)
    cluster.reports("w2")
    cluster.passes(observed.UNREACHED_AFTER_S - 1.0)
    assert not cluster.observed.unreached(cluster.now_s)
    cluster.passes(1.0)
    assert cluster.observed.unreached(cluster.now_s)
    cluster.loses("w1")
    cluster.loses("w2")
    assert not cluster.observed.unreached(cluster.now_s)
