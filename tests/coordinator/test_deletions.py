"""The coordinator's deletions on a store that fails wherever it can: in order, to the end, and nothing else."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName, Step
from dtrain.common.specs import RetentionPolicy
from dtrain.coordinator import effects as performing
from dtrain.coordinator.core.effects import DeleteAttempt, Effect, ReadMarkers, WriteManifest
from dtrain.coordinator.core.facts import Fact, ManifestWritten, ObjectsDeleted, ShardPhase, Ticked
from dtrain.coordinator.core.observed import AUDIT_EVERY_S
from dtrain.coordinator.effects import LOOKS_MAX, EffectRunner
from dtrain.storage import keys
from dtrain.storage.manifests import CommitMarker, encode
from dtrain.storage.objects import ObjectStore, StorageUnavailable
from tests.coordinator.support.clusters import DIGEST, JOB, Cluster, spec
from tests.support.memory_store import Fault, MemoryStore

DEADLINE_S = 30.0
POLL_S = 0.005
MNIST = JobName(JOB)
PACK = f"{keys.pack_prefix(MNIST, AttemptNumber(1))}rank-00000-00.bin"
UNAVAILABLE = StorageUnavailable("no answer")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """The store of every job of these tests, whatever it is called."""
    memory = MemoryStore()
    monkeypatch.setattr(performing, "open_store", lambda uri: memory)
    return memory


def attempt_keys(checkpoint: int, attempt: int) -> list[str]:
    """Of the manifest and the shards, in the order in which they are to be deleted."""
    number, try_number = CheckpointNumber(checkpoint), AttemptNumber(attempt)
    shards = [keys.shard_key(MNIST, number, try_number, rank) for rank in range(2)]
    return [keys.manifest_key(MNIST, number, try_number), *shards]


def checkpoint_keys(checkpoint: int, attempt: int) -> list[str]:
    """Of the marker as well, first."""
    return [keys.marker_key(MNIST, CheckpointNumber(checkpoint)), *attempt_keys(checkpoint, attempt)]


def fill(store: MemoryStore, *names: str) -> None:
    for name in names:
        store.put(name, b"bytes")


def listed(store: MemoryStore) -> list[str]:
    return [info.key for info in store.list("")]


def two_saved(store: MemoryStore) -> Cluster:
    """A job that keeps one checkpoint and has just committed its second, with all objects in the store."""
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(retention=RetentionPolicy(keep_last=1)), step=10)
    for number in (1, 2):
        cluster.asks_for_checkpoint()
        cluster.acknowledges()
        cluster.manifest_written()
        cluster.decides()
        cluster.marker_written(number)
        cluster.decides()
        fill(store, *checkpoint_keys(number, number))
        cluster.trains(step=10 + 10 * number)
    assert cluster.job().committed[CheckpointNumber(1)].expired
    return cluster


def deletions(cluster: Cluster) -> list[Effect]:
    return [effect for effect in cluster.owes() if isinstance(effect, DeleteAttempt)]


def performed(
    play: Callable[[EffectRunner, list[Fact]], Awaitable[None]], *, is_owed: Callable[[Effect], bool] = lambda _: True
) -> list[Fact]:
    """What a leader's runner brought back while ``play`` went on. The leader is gone at its end."""
    told: list[Fact] = []

    async def tell(fact: Fact) -> None:
        told.append(fact)

    async def run() -> None:
        runner = EffectRunner(tell, is_owed)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await play(runner, told)
        finally:
            await runner.close()

    asyncio.run(run())
    return told


async def until(fact: Callable[[], bool]) -> None:
    while not fact():
        await asyncio.sleep(POLL_S)


@pytest.mark.parametrize("crash_at", range(4), ids=["marker", "manifest", "shard 0", "shard 1"])
@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
def test_a_leader_that_dies_at_any_deletion_leaves_what_a_fresh_one_finishes(
    store: MemoryStore, crash_at: int, after: bool
) -> None:
    cluster = two_saved(store)
    order, rest = checkpoint_keys(1, 1), sorted(checkpoint_keys(2, 2))
    store.fail_next(Fault(operation="delete", key_part=order[crash_at], error=UNAVAILABLE, after=after))

    async def dies(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform(deletions(cluster))
        await until(lambda: store.faults_left == 0)

    assert performed(dies) == [], "it says that something is gone which is not"
    assert [key for operation, key in store.calls if operation == "delete"] == order[: crash_at + 1]
    assert listed(store) == sorted(order[crash_at + after :]) + rest

    successor = cluster.fails_over()

    async def finishes(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform(deletions(successor))
        await until(lambda: told != [])

    [fact] = performed(finishes)
    assert fact == ObjectsDeleted(job=MNIST, attempt=AttemptNumber(1))
    assert listed(store) == rest
    successor.tells(fact)
    successor.reconnect()
    assert successor.decides() == ["CheckpointDeleted"]
    assert deletions(successor) == []


def test_one_leader_goes_on_by_itself_when_storage_answers_again(store: MemoryStore) -> None:
    cluster = two_saved(store)
    store.fail_next(*(Fault(operation="delete", error=UNAVAILABLE) for _ in range(2)))

    async def goes_on(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform(deletions(cluster))
        runner.perform(deletions(cluster))  # as every round does
        await until(lambda: told != [])

    assert performed(goes_on) == [ObjectsDeleted(job=MNIST, attempt=AttemptNumber(1))]
    assert store.faults_left == 0
    assert listed(store) == sorted(checkpoint_keys(2, 2))


@pytest.mark.parametrize("last", [checkpoint_keys(1, 1)[-1], PACK], ids=["shard", "pack"])
def test_what_arrives_while_the_others_are_deleted_goes_too(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    cluster, (late, *_) = two_saved(store), attempt_keys(1, 1)
    fill(store, PACK)
    delete = store.delete

    def deletes(key: str) -> None:
        delete(key)
        if key == last:
            monkeypatch.setattr(store, "delete", delete)
            store.put(late, b"on its way when its attempt was given up")

    monkeypatch.setattr(store, "delete", deletes)

    async def goes_on(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform(deletions(cluster))
        await until(lambda: told != [])

    assert performed(goes_on) == [ObjectsDeleted(job=MNIST, attempt=AttemptNumber(1))]
    assert listed(store) == sorted(checkpoint_keys(2, 2))


def test_a_store_that_goes_on_listing_what_was_deleted_is_not_believed(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, delete = two_saved(store), store.delete
    monkeypatch.setattr(store, "delete", lambda key: None)

    async def goes_on(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform(deletions(cluster))
        await until(lambda: sum(operation == "list" for operation, _ in store.calls) > LOOKS_MAX)
        monkeypatch.setattr(store, "delete", delete)
        assert told == []
        await until(lambda: told != [])

    assert performed(goes_on) == [ObjectsDeleted(job=MNIST, attempt=AttemptNumber(1))]
    assert listed(store) == sorted(checkpoint_keys(2, 2))


def test_the_sweep_of_an_aborted_attempt_touches_nothing_of_the_checkpoint_that_came_of_the_next(
    store: MemoryStore,
) -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(), step=10)
    cluster.asks_for_checkpoint()
    cluster.shard(0, ShardPhase.FAILED, reason="disk full")
    assert cluster.decides() == ["CheckpointAborted"]
    cluster.commits()
    assert cluster.job().committed[CheckpointNumber(1)].attempt == 2
    fill(store, *attempt_keys(1, 1), *checkpoint_keys(1, 2), *attempt_keys(1, 11), *attempt_keys(11, 1))

    async def sweeps(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform(deletions(cluster))
        await until(lambda: told != [])

    [fact] = performed(sweeps)
    assert listed(store) == sorted([*checkpoint_keys(1, 2), *attempt_keys(1, 11), *attempt_keys(11, 1)])
    deleted = [key for operation, key in store.calls if operation == "delete"]
    assert set(deleted) == set(attempt_keys(1, 1)), "not even a try"
    prefix = keys.attempt_prefix(MNIST, CheckpointNumber(1), AttemptNumber(1))
    cleaned = [call for call in store.calls if call[0] in ("abandon", "list") and call[1]]
    packs = keys.pack_prefix(MNIST, AttemptNumber(1))
    expected = [("abandon", prefix), ("abandon", packs), *[("list", prefix), ("list", packs)] * 2]
    assert cleaned == expected, "uploads that were cut off go first, and it is looked at again"
    cluster.tells(fact)
    assert cluster.decides() == ["AttemptSwept"]


def writing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> WriteManifest:
    """The manifest that is owed once every rank has acknowledged. What it holds is nothing to these tests."""
    cluster.joins("w1")
    cluster.runs(spec(), step=10)
    cluster.asks_for_checkpoint()
    cluster.acknowledges()
    [owed] = cluster.owes()
    assert isinstance(owed, WriteManifest)

    def write(store: ObjectStore, effect: WriteManifest, _: ThreadPoolExecutor) -> ManifestWritten:
        key = keys.manifest_key(effect.job, effect.inflight.number, effect.inflight.attempt)
        store.put(key, b"a manifest", if_absent=True)
        return ManifestWritten(job=MNIST, attempt=effect.inflight.attempt, manifest_key=key, manifest_digest=DIGEST)

    monkeypatch.setattr(performing, "_write_manifest", write)
    return owed


def test_a_manifest_that_is_being_written_when_its_attempt_is_aborted_does_not_outlive_the_sweep(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster()
    manifest = writing(cluster, monkeypatch)
    cluster.cancels()
    cluster.exits(0, -15)
    cluster.exits(1, -15)
    assert cluster.decides() == ["CheckpointAborted", "JobCancelled"]
    [sweep] = deletions(cluster)
    slow = threading.Event()
    store.fail_next(Fault(operation="put", key_part=keys.MANIFEST_NAME, hold=slow))

    async def both(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform([manifest])
        await until(lambda: store.faults_left == 0)
        runner.perform([sweep])
        for _ in range(20):  # every chance to overtake
            await asyncio.sleep(POLL_S)
        assert not any(operation == "delete" for operation, _ in store.calls)
        slow.set()
        await until(lambda: any(isinstance(fact, ObjectsDeleted) for fact in told))

    try:
        performed(both)
    finally:
        slow.set()
    assert listed(store) == []


def test_an_effect_that_is_not_owed_any_more_ends(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = writing(Cluster(), monkeypatch)
    store.fail_next(Fault(operation="put", error=UNAVAILABLE))

    async def ends(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform([manifest])
        await until(lambda: not runner._running)

    assert performed(ends, is_owed=lambda effect: False) == []
    assert [operation for operation, _ in store.calls] == ["put"]


def test_a_marker_that_a_deposed_leader_put_behind_the_deletion_goes_too(store: MemoryStore) -> None:
    cluster = two_saved(store)
    marker = encode(
        CommitMarker(
            job=MNIST,
            checkpoint=CheckpointNumber(1),
            attempt=AttemptNumber(1),
            step=Step(20),
            manifest_key=keys.manifest_key(MNIST, CheckpointNumber(1), AttemptNumber(1)),
            manifest_digest="xxh3-128:" + "0" * 32,
            position_seq=4,
            position_digest="0" * 64,
        )
    )

    async def deletes(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform(deletions(cluster))
        await until(lambda: told != [])

    [gone] = performed(deletes)
    cluster.tells(gone)
    assert cluster.decides() == ["CheckpointDeleted"]
    store.put(keys.marker_key(MNIST, CheckpointNumber(1)), marker)
    cluster.tells(Ticked())
    assert audits(cluster) == []
    cluster.passes(AUDIT_EVERY_S)
    cluster.tells(Ticked())
    owed = audits(cluster)
    store.calls.clear()

    async def reads(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform(owed)
        await until(lambda: told != [])

    [fact] = performed(reads)
    assert listed(store) == sorted(checkpoint_keys(2, 2))
    known = keys.marker_key(MNIST, CheckpointNumber(2))
    assert ("get", known) not in store.calls, "what the log says need not be read again"
    cluster.tells(fact)
    assert audits(cluster) == []


def audits(cluster: Cluster) -> list[Effect]:
    return [effect for effect in cluster.owes() if isinstance(effect, ReadMarkers)]


def test_a_store_that_hangs_holds_up_no_other_stores_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = {"file:///hangs": MemoryStore("hangs"), "file:///answers": MemoryStore("answers")}
    monkeypatch.setattr(performing, "open_store", stores.__getitem__)
    hung = threading.Event()
    stores["file:///hangs"].fail_next(*(Fault(hold=hung) for _ in range(performing.THREADS_MAX)))

    def doomed(store: str, attempt: int) -> DeleteAttempt:
        return DeleteAttempt(
            job=JobName(store.rpartition("/")[2]),
            store=store,
            checkpoint=CheckpointNumber(1),
            attempt=AttemptNumber(attempt),
            committed=False,
        )

    async def play(runner: EffectRunner, told: list[Fact]) -> None:
        runner.perform([doomed("file:///hangs", attempt) for attempt in range(1, performing.THREADS_MAX + 1)])
        await until(lambda: stores["file:///hangs"].faults_left == 0)
        runner.perform([doomed("file:///answers", 1)])
        await until(lambda: told != [])
        hung.set()

    [fact, *_] = performed(play)
    assert fact == ObjectsDeleted(job=JobName("answers"), attempt=AttemptNumber(1))
