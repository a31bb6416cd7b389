"""What the coordinator looks at before it writes a manifest, on a store that answers slowly."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from dtrain.common.errors import ShardDamagedError
from dtrain.common.names import AttemptNumber
from dtrain.coordinator import codec
from dtrain.coordinator import effects as performing
from dtrain.coordinator.codec import DATA_BYTES_MAX
from dtrain.coordinator.core.effects import WriteManifest
from dtrain.coordinator.core.events import Cause, CheckpointCommitted, Decision, ShardRecord
from dtrain.coordinator.core.facts import Fact, ManifestRefused, ManifestWritten
from dtrain.coordinator.effects import EffectRunner
from dtrain.etcd.transactions import REQUEST_MAX_BYTES
from dtrain.storage.keys import manifest_key
from dtrain.storage.retrying import DAMAGED_READS
from tests.coordinator.support.clusters import PREFIX, Cluster, spec
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
    owed = owed_manifest(store)
    store.fail_next(*(Fault(operation=operation, key_part=object_kind, hold=slow) for _ in range(RANKS)))

    def go_on_once_all_are_asked() -> None:
        if not store.faults_left:
            slow.set()

    fact = performed(monkeypatch, store, owed, go_on_once_all_are_asked)
    assert isinstance(fact, ManifestWritten) and fact.attempt == AttemptNumber(owed.inflight.attempt)
    assert store.head(fact.manifest_key) is not None


@pytest.mark.parametrize(("reads", "kind"), [(DAMAGED_READS - 1, ManifestWritten), (DAMAGED_READS, ManifestRefused)])
def test_an_index_that_its_way_damaged_is_read_again_before_the_attempt_is_given_up(
    monkeypatch: pytest.MonkeyPatch, reads: int, kind: type[Fact]
) -> None:
    store = MemoryStore()
    owed = owed_manifest(store)
    [*_, last] = owed.shards
    damaged = ShardDamagedError(last.index_key, "a flipped bit")
    store.fail_next(*(Fault(operation="get", key_part=last.index_key, error=damaged) for _ in range(reads)))
    assert isinstance(performed(monkeypatch, store, owed, lambda: None), kind)
    assert not store.faults_left


def test_a_checkpoint_that_no_event_could_hold_is_refused_before_anything_of_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore()
    owed = owed_manifest(store)
    [shard, *_] = owed.shards
    owed = replace(owed, shards=tuple(replace(shard, rank=rank) for rank in range(8000)))
    fact = performed(monkeypatch, store, owed, lambda: None)
    assert isinstance(fact, ManifestRefused)
    assert "8000 shards" in fact.reason and str(DATA_BYTES_MAX) in fact.reason
    assert store.head(manifest_key(owed.job, owed.inflight.number, owed.inflight.attempt)) is None


@pytest.mark.parametrize("over_bytes", [0, 1])
def test_a_commit_that_is_not_refused_fits_into_one_request_to_etcd(
    monkeypatch: pytest.MonkeyPatch, over_bytes: int
) -> None:
    store = MemoryStore()
    owed = owed_manifest(store)
    monkeypatch.setattr(performing, "DATA_BYTES_MAX", len(msgspec.json.encode(owed.shards)) - over_bytes)
    kind = ManifestRefused if over_bytes else ManifestWritten
    fact = performed(monkeypatch, store, owed, lambda: None)
    assert isinstance(fact, kind)
    if isinstance(fact, ManifestWritten):
        inflight = owed.inflight
        event = CheckpointCommitted(
            checkpoint=inflight.number,
            attempt=inflight.attempt,
            generation=inflight.generation,
            step=inflight.step,
            world_size=owed.world_size,
            shards=owed.shards,
            store=owed.store,
            manifest_key=fact.manifest_key,
            manifest_digest=fact.manifest_digest,
        )
        decision = Decision(event=event, cause=Cause(fact="manifest_written", detail=fact.manifest_key))
        made = codec.record(decision, prefix=PREFIX, job=owed.job, seq=1, term=1, time_s=0.0, prev="")
        rest_bytes = len(made.value) + len(made.record.key) - len(msgspec.json.encode(owed.shards))
        assert DATA_BYTES_MAX + 4 * rest_bytes < REQUEST_MAX_BYTES, "no room is left for the rest of the event"


def performed(
    monkeypatch: pytest.MonkeyPatch, store: MemoryStore, owed: WriteManifest, meanwhile: Callable[[], None]
) -> Fact:
    """What comes of the effect."""
    monkeypatch.setattr(performing, "open_store", lambda uri: store)
    told: list[Fact] = []

    async def tell(fact: Fact) -> None:
        told.append(fact)

    async def play() -> None:
        runner = EffectRunner(tell, lambda effect: True)
        try:
            async with asyncio.timeout(DEADLINE_S):
                runner.perform([owed])
                while not told:
                    meanwhile()
                    await asyncio.sleep(POLL_S)
        finally:
            await runner.close()

    asyncio.run(play())
    [fact] = told
    return fact
