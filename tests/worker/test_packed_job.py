"""A job whose weights partly freeze, killed between every two steps: no checkpoint ever misses what it names.

The worker's own uploading, the coordinator's own rules and effects, and a store in memory, which ends the process that
calls it at a chosen put or deletion: before it took effect, or after it did and nobody heard. What is killed starts
again with what its journal or its log holds. After every crash each committed checkpoint is restored, byte by byte;
at the end storage holds what the log names, and nothing else.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from dtrain.common.names import JobName
from dtrain.common.specs import RetentionPolicy
from dtrain.coordinator import effects
from dtrain.coordinator.core.commands import StageCheckpoint, commands_for
from dtrain.coordinator.core.effects import Effect
from dtrain.coordinator.core.facts import ManifestWritten, ShardPhase, ShardReport
from dtrain.coordinator.rpc.convert import command_to_wire
from dtrain.storage import keys, packing, shards
from dtrain.storage.catalogs import catalog_of
from dtrain.storage.ranges import NeededRange, read_needed
from dtrain.storage.verify import read_index, read_manifest, verify_checkpoint
from dtrain.worker import uploads
from dtrain.worker.bandwidth import BandwidthCap
from dtrain.worker.bases import Bases
from dtrain.worker.core import inputs
from dtrain.worker.core.actions import Upload
from dtrain.worker.core.inputs import UploadDone
from dtrain.worker.rpc.convert import to_command
from dtrain.worker.transfers import UploadMeter
from tests.coordinator.support.clusters import JOB, Cluster, spec
from tests.support.memory_store import MemoryStore

_Result = TypeVar("_Result")

RANKS = 2
LAYERS = 4
LAYER_BYTES = 512
ROUNDS = 7  # attempts; in the second rank 1 fails, from the fourth on layers thaw
FAILING_ROUND = 2
TURNS_MAX = 200  # of one run: what does not come to an end within them never will


class Killed(BaseException):
    """The process that called the store is no more."""


class DeadlyStore(MemoryStore):
    """Ends its caller at one put or deletion."""

    def __init__(self) -> None:
        super().__init__()
        self.strikes_at = 0  # which put or deletion; 0: none
        self.after = False
        self.count = 0

    def _call(self, operation: str, key: str, act: Callable[[], _Result]) -> _Result:
        if operation not in ("put", "delete"):
            return super()._call(operation, key, act)
        self.count += 1
        if self.count == self.strikes_at and not self.after:
            raise Killed
        result = super()._call(operation, key, act)
        if self.count == self.strikes_at:
            raise Killed
        return result


def state_at(step: int, rank: int) -> dict[str, bytes]:
    """The tensors of a rank: layers that thaw one after another, and a head that always changes."""
    found = {f"head.{rank}": bytes([step % 251]) * 300}
    for layer in range(LAYERS):
        since = (step - 40) // 10 if layer < (step - 30) // 10 else 0
        found[f"layer{layer}.{rank}"] = bytes([layer, rank, max(since, 0) % 251, 7]) * (LAYER_BYTES // 4)
    return found


def image_of(step: int, rank: int) -> bytes:
    tensors = state_at(step, rank)
    entries = [
        shards.TensorEntry(
            name=name,
            dtype="U8",
            shape=(len(data),),
            offsets_in_whole=(0,),
            global_shape=(len(data),),
            size_bytes=len(data),
        )
        for name, data in tensors.items()
    ]
    plan = shards.plan(entries, {shards.TREE_ENTRY: '{"objects":{},"local":{}}', shards.STEP_ENTRY: str(step)})
    return plan.header + b"".join(tensors[name] for name in plan.data_offsets)


class PackedJob:
    """The job, its node and its coordinator. ``turn`` lets each of them do one thing."""

    def __init__(self, folder: Path, store: DeadlyStore, reads: ThreadPoolExecutor) -> None:
        self.folder = folder
        self.store = store
        self.cluster = Cluster()
        self.bases = Bases()
        self.crashes = 0
        self._acks: dict[tuple[int, int], ShardReport] = {}  # the worker's journal
        self._desk: Any = SimpleNamespace(store=store, reads=reads)
        self.cluster.joins("w1")
        self.cluster.runs(spec(retention=RetentionPolicy(keep_last=1)), step=10)

    @property
    def rounds(self) -> int:
        return self.cluster.job().last_attempt

    def run(self) -> None:
        for _ in range(TURNS_MAX):
            try:
                if not self.turn():
                    return
            except Killed:
                self.crashes += 1
                self.bases = Bases()
                self.cluster = self.cluster.fails_over()
                self.cluster.reconnect()
                self.check()
        raise AssertionError(f"it never comes to rest: {[record.type for record, _ in self.cluster.log[-20:]]}")

    def turn(self) -> bool:
        """Do the next thing; False if there is nothing left to do."""
        self.cluster.decides()
        job = self.cluster.job()
        if job.inflight is not None and self.upload_next():
            return True
        owed = self.cluster.owes()
        if owed:
            self.perform(owed[0])
            return True
        if job.inflight is None and self.rounds < ROUNDS:
            self.cluster.trains(step=10 * (self.rounds + 1))
            self.cluster.asks_for_checkpoint()
            return True
        return False

    def upload_next(self) -> bool:
        """The worker stores the shard of the next rank that has none; False if all have."""
        job, view = self.cluster.job(), self.cluster.observed.view(self.cluster.nodes["w1"].name)
        inflight = job.inflight
        assert inflight is not None
        for rank in range(RANKS):
            if (inflight.attempt, rank) in self._acks:
                continue
            held = self.cluster.nodes["w1"].held[JOB]
            held.shards = {}  # so that the command is owed again, as to a worker that was killed
            self.cluster.reports("w1")
            [command] = [c for c in commands_for(job, view, self.cluster.term) if isinstance(c, StageCheckpoint)]
            stage = to_command(self.cluster.term, command_to_wire(command)).body
            assert isinstance(stage, inputs.StageCheckpoint)
            report = self.store_shard(stage, rank)
            self._acks[inflight.attempt, rank] = report
            held.shards = {key: shard for key, shard in self._acks.items() if key[0] == inflight.attempt}  # type: ignore[misc]
            self.cluster.reports("w1")
            return True
        return False

    def store_shard(self, stage: inputs.StageCheckpoint, rank: int) -> ShardReport:
        request = stage.request
        image = image_of(request.step, rank)
        slot = self.folder / f"slot{rank}"
        slot.write_bytes(image)
        common = {"checkpoint": request.checkpoint, "attempt": request.attempt, "rank": rank, "step": request.step}
        if request.attempt == FAILING_ROUND and rank == RANKS - 1:
            return ShardReport(phase=ShardPhase.FAILED, reason="no memory", **common)  # type: ignore[arg-type]
        generation, give_up = self.cluster.generation().number, threading.Event()
        upload = Upload(
            job=JobName(JOB), generation=generation, rank=rank, request=request, slot=0, size_bytes=len(image)
        )
        done: UploadDone = uploads._send(
            upload, uploads._Slot(slot, None), give_up, UploadMeter(BandwidthCap(None), give_up), self.bases
        )
        return ShardReport(
            phase=ShardPhase.DURABLE,
            key=done.key,
            size_bytes=done.size_bytes,
            digest=done.digest,
            index_key=done.index_key,
            index_digest=done.index_digest,
            packs=done.packs,
            state_bytes=done.state_bytes,
            **common,  # type: ignore[arg-type]
        )

    def perform(self, effect: Effect) -> None:
        fact = effects._perform(self._desk, effect)
        self.cluster.tells(fact)
        if isinstance(fact, ManifestWritten):
            self.cluster.decides()

    def check(self) -> None:
        """Every checkpoint that the log calls committed is there, byte by byte."""
        for checkpoint in self.cluster.job().committed.values():
            if checkpoint.expired:
                continue
            manifest = read_manifest(self.store, checkpoint.manifest_key, checkpoint.manifest_digest)
            catalog = catalog_of([read_index(self.store, entry)[0] for entry in manifest.shards])
            needed = [
                NeededRange(shard=rank, tensor=name, begin=0, end=len(data))
                for rank in range(RANKS)
                for name, data in state_at(checkpoint.step, rank).items()
            ]
            images = read_needed(self.store, catalog.shards, needed)
            assert [bytes(images[rank]) for rank in range(RANKS)] == [
                image_of(checkpoint.step, rank) for rank in range(RANKS)
            ]
            assert verify_checkpoint(self.store, checkpoint.manifest_key, checkpoint.manifest_digest) == []

    def check_end(self) -> None:
        """Nothing is left but what the log names."""
        self.check()
        job = self.cluster.job()
        expected: set[str] = set()
        for number, checkpoint in job.committed.items():
            expected |= {keys.marker_key(job.name, number), checkpoint.manifest_key}
            expected |= {key for shard in checkpoint.shards for key in (shard.key, shard.index_key)}
            expected |= {pack.key for pack in checkpoint.packs}
        assert {info.key for info in self.store.list("")} == expected
        assert not job.doomed and set(job.packs) == {pack.key for c in job.committed.values() for pack in c.packs}


@pytest.fixture
def reads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def begun(tmp_path: Path, reads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> Callable[[], PackedJob]:
    """Begins the job anew, on a store of its own, with limits that fit its small tensors."""
    monkeypatch.setattr(packing, "TENSOR_MIN_BYTES", LAYER_BYTES)
    monkeypatch.setattr(packing, "PACK_MIN_BYTES", LAYER_BYTES)

    def begin() -> PackedJob:
        store = DeadlyStore()
        monkeypatch.setattr(uploads, "shared_store", lambda uri: store)
        return PackedJob(tmp_path, store, reads)

    return begin


def test_a_job_makes_packs_repacks_them_and_lets_them_go(begun: Callable[[], PackedJob]) -> None:
    job = begun()
    job.run()
    job.check_end()
    types = [record.type for record, _ in job.cluster.log]
    assert types.count("CheckpointCommitted") == ROUNDS - 1
    assert {"CheckpointAborted", "AttemptSwept", "CheckpointDeleted", "PacksExpired", "PacksDeleted"} <= set(types)
    packs = [key for operation, key in job.store.calls if operation == "put" and "/packs/" in key]
    made_by = {key.split("/")[3] for key in packs}
    assert {"attempt-000002", "attempt-000003"} < made_by, "an aborted one, the next, and one that packs anew"
    assert len(packs) == len(set(packs)) < ROUNDS * RANKS


def test_killed_before_or_after_any_put_or_deletion_it_loses_nothing_and_leaves_nothing(
    begun: Callable[[], PackedJob],
) -> None:
    quiet = begun()
    quiet.run()
    steps = quiet.store.count
    assert steps > 70
    for strikes_at in range(1, steps + 1):
        for after in (False, True):
            job = begun()
            job.store.strikes_at, job.store.after = strikes_at, after
            job.run()
            assert job.crashes == 1, f"nothing was struck at {strikes_at}"
            job.check_end()
