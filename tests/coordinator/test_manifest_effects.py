"""What the coordinator looks at before it writes a manifest, on a store that answers slowly."""

import asyncio
import threading
from dataclasses import replace

import pytest

from dtrain.common.names import AttemptNumber
from dtrain.coordinator import effects as performing
from dtrain.coordinator.core.effects import WriteManifest
from dtrain.coordinator.core.events import ShardRecord
from dtrain.coordinator.core.facts import Fact, ManifestWritten
from dtrain.coordinator.effects import EffectRunner
from tests.coordinator.support.clusters import Cluster, spec
from tests.support.checkpoints import put_shard, shard_of
from tests.support.memory_store import Fault, MemoryStore

DEADLINE_S = 30.0
POLL_S = 0.005
RANKS = 2


def owed_manifest(store: MemoryStore) -> WriteManifest:
    """The manifest of an attempt whose shards lie in the store."""
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(), step=10)
    cluster.asks_for_checkpoint()
    cluster.acknowledges()
    [owed] = cluster.owes()
    assert isinstance(owed, WriteManifest)
    stored = [put_shard(store, shard_of(b"x", rank=rank, world_size=RANKS, step=13), rank) for rank in range(RANKS)]
    shards = tuple(
        ShardRecord(
            rank=entry.rank,
            key=entry.key,
            size_bytes=entry.size_bytes,
            digest=entry.digest,
            index_key=entry.index_key,
            index_digest=entry.index_digest,
        )
        for entry in stored
    )
    return replace(owed, shards=shards)


@pytest.mark.parametrize(("operation", "object_kind"), [("head", ".safetensors"), ("get", ".index.json")])
def test_all_ranks_objects_are_looked_at_together(
    monkeypatch: pytest.MonkeyPatch, operation: str, object_kind: str
) -> None:
    store, slow = MemoryStore(), threading.Event()
    monkeypatch.setattr(performing, "open_store", lambda uri: store)
    owed = owed_manifest(store)
    store.fail_next(*(Fault(operation=operation, key_part=object_kind, hold=slow) for _ in range(RANKS)))
    told: list[Fact] = []

    async def tell(fact: Fact) -> None:
        told.append(fact)

    async def play() -> None:
        runner = EffectRunner(tell, lambda effect: True)
        try:
            async with asyncio.timeout(DEADLINE_S):
                runner.perform([owed])
                while store.faults_left:  # none is answered before all are asked
                    await asyncio.sleep(POLL_S)
                slow.set()
                while not told:
                    await asyncio.sleep(POLL_S)
        finally:
            slow.set()
            await runner.close()

    asyncio.run(play())
    [fact] = told
    assert isinstance(fact, ManifestWritten) and fact.attempt == AttemptNumber(owed.inflight.attempt)
    assert store.head(fact.manifest_key) is not None
