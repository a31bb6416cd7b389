"""A restore from a remote store, and the next one of the same checkpoint on the same node."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dtrain.common.digests import blob_digest
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, Step
from dtrain.storage.keys import manifest_key
from dtrain.storage.manifests import Manifest, encode
from dtrain.storage.objects import StorageUnavailable
from dtrain.storage.ranges import NeededRange
from dtrain.storage.restore_files import (
    INDEX_FILE,
    MANIFEST_FILE,
    NEEDS_FILE,
    RESTORE_FOLDER,
    SHARD_FILE,
    SOURCES_FILE,
    decode_sources,
    encode_needs,
)
from dtrain.worker import restores as module
from dtrain.worker.caches import Caches
from dtrain.worker.core.actions import FetchRestore
from dtrain.worker.core.inputs import RestoreDamaged, RestoreReady
from dtrain.worker.core.states import RestoreSource
from dtrain.worker.rank_dirs import RankDirs
from dtrain.worker.restores import Restores
from dtrain.worker.tasks import Tasks
from tests.support.checkpoints import put_shard, shard_of
from tests.support.facts import wait_for
from tests.support.memory_store import Fault, MemoryStore
from tests.worker.facts_of_trainers import JOB, spec

DEADLINE_S = 20.0
PAYLOAD = b"payload" * 1000
SHARDS = [shard_of(PAYLOAD, rank=rank, world_size=2, step=5, beside={f"more.{rank}": b"m" * 5000}) for rank in (0, 1)]


@dataclass
class Node:
    """The worker's part in restores, over a store in memory. The test speaks for the trainers."""

    folder: Path
    store: MemoryStore = field(default_factory=MemoryStore)
    answers: list[RestoreReady | RestoreDamaged] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "shm").mkdir()
        self.dirs = RankDirs(self.folder / "shm", self.folder / "data", "journal-of-this-node")
        self.dirs.root.mkdir()
        self.caches = Caches(self.dirs)
        self.source = self._checkpoint()

    def _checkpoint(self) -> RestoreSource:
        checkpoint, attempt = CheckpointNumber(1), AttemptNumber(1)
        manifest = encode(
            Manifest(
                job=JOB,
                checkpoint=checkpoint,
                attempt=attempt,
                generation=Generation(1),
                step=Step(5),
                world_size=2,
                shards=tuple(put_shard(self.store, data, rank, job=JOB) for rank, data in enumerate(SHARDS)),
            )
        )
        key = manifest_key(JOB, checkpoint, attempt)
        self.store.put(key, manifest)
        return RestoreSource(
            checkpoint=checkpoint,
            attempt=attempt,
            step=Step(5),
            manifest_key=key,
            manifest_digest=blob_digest(manifest),
            store=self.store.uri,
        )

    def restore(self, generation: int, *, tensors: tuple[str, ...] = ("payload", "more")) -> None:
        """Have both ranks of a generation restored, and what is kept of it written."""
        name = Generation(generation)
        for rank in (0, 1):
            folder = self.dirs.generation_dir(JOB, name) / f"rank{rank}"
            folder.mkdir(parents=True)
            sizes = {"payload": len(PAYLOAD), "more": 5000}
            needed = [NeededRange(shard=rank, tensor=f"{t}.{rank}", begin=0, end=sizes[t]) for t in tensors]
            (folder / NEEDS_FILE).write_bytes(encode_needs(needed))
        self.answers.clear()
        self.store.calls.clear()
        tasks = Tasks()

        async def run() -> None:
            async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
                tasks.group = group
                restores = Restores(self.answers.append, self.dirs, tasks.begin, self.caches)
                restores.start(FetchRestore(job=JOB, generation=name, spec=replace(spec(), restore=self.source)))
            restores.close()

        asyncio.run(run())
        wait_for("the cache is written", lambda: not self.caches._fillings, deadline_s=DEADLINE_S)

    @property
    def reads(self) -> list[tuple[str, str]]:
        """What the last restore asked of the store."""
        return [(operation, key.rpartition("/")[2]) for operation, key in self.store.calls]

    def image(self, generation: int, shard: int) -> bytes:
        folder = self.dirs.generation_dir(JOB, Generation(generation)) / RESTORE_FOLDER
        return (folder / SHARD_FILE.format(shard)).read_bytes()

    def cached(self, shard: int) -> Path:
        return Path(self.caches.of(JOB, self.source).part(shard).path)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    it = Node(tmp_path)
    monkeypatch.setattr(module, "shared_store", lambda uri: it.store)
    for pause in ("PAUSE_S", "DAMAGED_PAUSE_S", "ROUND_S"):
        monkeypatch.setattr(module, pause, 0.0)
    yield it
    it.caches.close()


def ready(generation: int) -> list[RestoreReady | RestoreDamaged]:
    return [RestoreReady(job=JOB, generation=Generation(generation))]


def test_the_second_restore_of_a_checkpoint_asks_nothing_of_the_store(node: Node) -> None:
    node.restore(1)
    assert node.answers == ready(1)
    assert {name for operation, name in node.reads if operation == "read_into"} == {
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }
    node.restore(2)
    assert node.answers == ready(2)
    assert node.reads == []
    assert [node.image(2, rank) for rank in (0, 1)] == SHARDS
    folder = node.dirs.generation_dir(JOB, Generation(2)) / RESTORE_FOLDER
    parts = decode_sources((folder / SOURCES_FILE).read_bytes()).parts
    assert {number: part.path for number, part in parts.items()} == {n: str(node.cached(n)) for n in (0, 1)}


def test_what_is_damaged_in_the_cache_is_fetched_again_and_is_no_damage(node: Node) -> None:
    node.restore(1)
    data = bytearray(node.cached(1).read_bytes())
    data[-100] ^= 1  # in the payload, the last tensor
    node.cached(1).write_bytes(data)
    node.restore(2)
    assert node.answers == ready(2)
    assert node.reads == [("read_into", "rank-00001.safetensors")], "one piece, and no more"
    assert [node.image(2, rank) for rank in (0, 1)] == SHARDS
    node.restore(3)
    assert node.reads == [], "it was mended"


def test_what_was_not_needed_before_is_fetched_and_nothing_else(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probable_needs", lambda *_: set())  # as where ranks shard anew, and only they know
    node.restore(1, tensors=("more",))
    node.restore(2)
    assert sorted(node.reads) == [("read_into", f"rank-0000{rank}.safetensors") for rank in (0, 1)]
    node.restore(3)
    assert node.reads == []


def test_a_restart_goes_on_while_the_store_is_away(node: Node) -> None:
    node.restore(1)
    node.store.fail_next(*(Fault(error=StorageUnavailable("away")) for _ in range(100)))
    node.restore(2)
    assert node.answers == ready(2)
    assert node.store.faults_left == 100


def test_texts_that_are_damaged_in_the_cache_are_read_from_the_store(node: Node) -> None:
    node.restore(1)
    for path in node.cached(0).parent.glob("*.json"):
        path.write_bytes(path.read_bytes()[:-1])
    node.restore(2)
    assert node.answers == ready(2)
    assert {operation for operation, _ in node.reads} == {"get", "read_into"}
    node.restore(3)
    assert node.reads == []


def test_what_a_restore_fetched_before_it_was_given_up_is_not_fetched_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._Restore._needs_of
    gone: list[Restores] = []

    class Dropped(Restores):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            gone.append(self)

    async def needs_of(self: module._Restore, *args: object) -> list[NeededRange]:
        gone[-1].drop(JOB, Generation(1))  # all that is probably needed has come, and the generation is over
        return await real(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module._Restore, "_needs_of", needs_of)
        patch.setitem(globals(), "Restores", Dropped)
        node.restore(1)
    assert node.answers == []
    node.restore(2)
    assert node.answers == ready(2)
    assert node.reads == []


@pytest.mark.parametrize("name", [INDEX_FILE.format(1), SOURCES_FILE, MANIFEST_FILE])
def test_a_generation_that_is_over_takes_its_folder_from_under_a_restore_and_nobody_minds(
    name: str, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = module.write_whole, Restores.start
    begun: list[Restores] = []

    def start(self: Restores, fetch: FetchRestore) -> None:
        begun.append(self)
        started(self, fetch)

    def write(path: Path, data: bytes) -> None:
        if path.name == name:
            begun[-1].drop(JOB, Generation(1))
            node.dirs.remove(JOB, Generation(1))
        real(path, data)

    monkeypatch.setattr(Restores, "start", start)
    monkeypatch.setattr(module, "write_whole", write)
    node.restore(1)
    assert node.answers == []
    assert not node.dirs.generation_dir(JOB, Generation(1)).exists()


def test_a_store_on_this_node_is_not_kept_twice(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.store, "local_path", lambda key: node.folder / "nowhere" / key)
    node.restore(1)
    assert node.answers == ready(1)
    assert not node.dirs.cache(JOB).exists()
