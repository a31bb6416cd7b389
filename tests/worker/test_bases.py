"""Where an upload finds what it builds upon, and that it does without when that cannot be had."""

import threading
from collections.abc import Callable

import pytest

from dtrain.common.digests import blob_digest
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, Step
from dtrain.storage.indexes import index_shard
from dtrain.storage.objects import StorageUnavailable
from dtrain.storage.retrying import GaveUp
from dtrain.worker import bases as module
from dtrain.worker.bases import KEPT_A_RANK, Bases
from dtrain.worker.core.actions import Upload
from dtrain.worker.core.states import BaseIndex, CheckpointRequest
from tests.support.memory_store import Fault, MemoryStore
from tests.worker.facts_of_trainers import JOB
from tests.worker.shards import shard_bytes

KEY = "the-index"


def index_of(step: int) -> bytes:
    return index_shard(memoryview(shard_bytes(rank=1, step=step)))[0]


def upload(*named: BaseIndex) -> Upload:
    request = CheckpointRequest(
        checkpoint=CheckpointNumber(2), attempt=AttemptNumber(4), step=Step(10), store="memory://model", bases=named
    )
    return Upload(job=JOB, generation=Generation(1), rank=1, request=request, slot=0, size_bytes=1)


def base(index: bytes, *, rank: int = 1) -> BaseIndex:
    return BaseIndex(rank=rank, index_key=KEY, index_digest=blob_digest(index))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def find(bases: Bases, store: MemoryStore, *named: BaseIndex) -> bool:
    """Whether there is a base for rank 1."""
    return bases.find(upload(*named), store, threading.Event()) is not None


def test_what_this_worker_uploaded_itself_is_not_read_again(store: MemoryStore) -> None:
    bases = Bases()
    bases.keep(upload(), index_of(5))
    assert find(bases, store, base(index_of(5), rank=0), base(index_of(5)))
    assert store.calls == []


def test_after_a_restart_it_is_read_from_storage(store: MemoryStore) -> None:
    store.put(KEY, index_of(5))
    store.fail_next(Fault(operation="get", error=StorageUnavailable("busy")))
    assert find(Bases(), store, base(index_of(5)))
    assert store.faults_left == 0


def test_a_rank_whose_base_is_not_named_has_none(store: MemoryStore) -> None:
    assert not find(Bases(), store)
    assert not find(Bases(), store, base(index_of(5), rank=0))
    assert store.calls == []


@pytest.mark.parametrize(
    "prepare",
    [
        lambda store: None,
        lambda store: store.put(KEY, index_of(6)),
        lambda store: store.put(KEY, b"{}"),
        lambda store: store.fail_next(Fault(operation="get", error=StorageUnavailable("away"))),
    ],
    ids=["gone", "another", "damaged", "storage away"],
)
def test_one_that_cannot_be_had_only_costs_bytes(
    store: MemoryStore, prepare: Callable[[MemoryStore], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEADLINE_S", 0.0)
    prepare(store)
    assert not find(Bases(), store, base(index_of(5)))
    assert store.faults_left == 0


def test_an_index_that_has_the_named_digest_and_is_none_is_no_base(store: MemoryStore) -> None:
    store.put(KEY, b"{}")
    assert not find(Bases(), store, base(b"{}"))


def test_an_upload_that_is_not_wanted_any_more_ends(store: MemoryStore) -> None:
    give_up = threading.Event()
    give_up.set()
    with pytest.raises(GaveUp):
        Bases().find(upload(base(index_of(5))), store, give_up)


def test_only_the_newest_are_kept_and_none_of_a_job_that_left(store: MemoryStore) -> None:
    bases = Bases()
    for step in range(KEPT_A_RANK + 1):
        bases.keep(upload(), index_of(step))
    assert not find(bases, store, base(index_of(0)))
    assert all(find(bases, store, base(index_of(step))) for step in range(1, KEPT_A_RANK + 1))
    bases.forget(JOB)
    assert not find(bases, store, base(index_of(1)))
