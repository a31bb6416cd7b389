"""A checkpoint verifies exactly if each of its bytes is as recorded; what is not is named."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.common.errors import ShardDamagedError
from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName, Step
from dtrain.storage import verify
from dtrain.storage.keys import manifest_key, marker_key, shard_key
from dtrain.storage.local import LocalFolder
from dtrain.storage.manifests import encode
from dtrain.storage.objects import StorageUnavailable
from dtrain.storage.presence import damaged_marker, missing_parts
from dtrain.storage.retrying import DAMAGED_READS
from dtrain.storage.verify import verify_checkpoint
from tests.support.checkpoints import write_checkpoint
from tests.support.memory_store import Crackling, Fault, MemoryStore

JOB, ONE, FIRST = JobName("mnist"), CheckpointNumber(1), AttemptNumber(1)
MARKER = marker_key(JOB, ONE)
MANIFEST = manifest_key(JOB, ONE, FIRST)
SHARD = shard_key(JOB, ONE, FIRST, 1)


def test_an_untouched_checkpoint_verifies_from_marker_and_from_manifest(tmp_path: Path) -> None:
    store = LocalFolder(tmp_path)
    marker = write_checkpoint(store, [os.urandom(5_000), os.urandom(1), os.urandom(70_000)])
    assert verify_checkpoint(store, MARKER) == []
    assert verify_checkpoint(store, MARKER, marker.manifest_digest) == []
    assert verify_checkpoint(store, MANIFEST, marker.manifest_digest) == []


@pytest.mark.parametrize("byte", [0, 4_096, 9_999])
def test_one_flipped_bit_on_disk_is_found_and_named(tmp_path: Path, byte: int) -> None:
    store = LocalFolder(tmp_path)
    write_checkpoint(store, [bytes(10_000), bytes(10_000), bytes(10_000)])
    path = tmp_path / SHARD
    data = bytearray(path.read_bytes())
    data[byte] ^= 0b100
    path.write_bytes(data)
    [finding] = verify_checkpoint(store, MARKER)
    assert finding.key == SHARD
    assert "digest" in finding.why


@pytest.mark.parametrize("size", [1, 64, 100, 6_400, 6_401])
def test_memory_is_bounded_whatever_a_shards_size(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(verify, "CHUNK_BYTES", 64)
    store = MemoryStore()
    write_checkpoint(store, [os.urandom(size)])
    assert verify_checkpoint(store, MARKER) == []
    size_bytes = len(store.get(shard_key(JOB, ONE, FIRST, 0)))
    assert len([call for call in store.calls if call[0] == "read_into"]) == -(-size_bytes // 64)
    store.flip_bit(shard_key(JOB, ONE, FIRST, 0))  # in the last chunk
    assert len(verify_checkpoint(store, MARKER)) == 1


def test_every_bad_shard_is_named_not_only_the_first() -> None:
    store = MemoryStore()
    write_checkpoint(store, [bytes(100)] * 4)
    keys = [shard_key(JOB, ONE, FIRST, rank) for rank in range(4)]
    store.flip_bit(keys[0])
    store.delete(keys[2])
    store.put(keys[3], bytes(99))
    findings = verify_checkpoint(store, MARKER)
    assert [finding.key for finding in findings] == [keys[0], keys[2], keys[3]]
    assert [finding.why.split()[0:2] for finding in findings] == [["has", "digest"], ["is", "missing"], ["has", "99"]]


@pytest.mark.parametrize("key", [MARKER, MANIFEST])
def test_a_missing_or_damaged_marker_or_manifest_is_named(key: str) -> None:
    for missing in (True, False):
        store = MemoryStore()
        write_checkpoint(store, [bytes(100)])
        if missing:
            store.delete(key)
        else:
            store.flip_bit(key, byte=40)
        [finding] = verify_checkpoint(store, MARKER)
        assert finding.key == key


def test_a_manifest_that_the_log_does_not_know_is_refused() -> None:
    store = MemoryStore()
    write_checkpoint(store, [bytes(100)])
    other = "xxh3-128:" + "0" * 32
    assert [finding.key for finding in verify_checkpoint(store, MANIFEST, other)] == [MANIFEST]
    assert [finding.key for finding in verify_checkpoint(store, MARKER, other)] == [MARKER]


def test_a_marker_that_names_another_step_than_its_manifest_is_refused() -> None:
    store = MemoryStore()
    marker = write_checkpoint(store, [bytes(100)], step=5)
    store.put(MARKER, encode(replace(marker, step=Step(6))))
    [finding] = verify_checkpoint(store, MARKER)
    assert finding.key == MANIFEST


def test_a_store_that_does_not_answer_says_nothing_about_the_checkpoint() -> None:
    store = MemoryStore()
    write_checkpoint(store, [bytes(100)])
    store.fail_next(Fault(operation="read_into", error=StorageUnavailable("away")))
    with pytest.raises(StorageUnavailable):
        verify_checkpoint(store, MARKER)
    assert store.faults_left == 0


def test_a_shard_that_vanishes_while_it_is_read_is_named() -> None:
    store = MemoryStore()
    write_checkpoint(store, [bytes(100)])
    vanishes = Fault(operation="read_into", error=ShardDamagedError(SHARD, "has too few bytes"))
    store.fail_next(*[vanishes] * DAMAGED_READS)
    [finding] = verify_checkpoint(store, MARKER)
    assert finding.key == SHARD and store.faults_left == 0


@pytest.mark.parametrize("key_part", [".safetensors", ".index.json", "manifest.json", "COMMITTED"])
def test_bits_that_flip_on_the_way_are_no_damage(key_part: str) -> None:
    store = Crackling(key_part, DAMAGED_READS - 1)
    marker = write_checkpoint(store, [os.urandom(100)] * 2)
    assert verify_checkpoint(store, MARKER, marker.manifest_digest) == []
    assert store.times == 0


def test_an_object_that_comes_damaged_every_time_is_no_finding_when_all_that_it_holds_is_sound() -> None:
    store = Crackling(".safetensors", DAMAGED_READS + DAMAGED_READS - 1)
    write_checkpoint(store, [os.urandom(100)])
    assert verify_checkpoint(store, MARKER) == []
    assert store.times == 0


def test_a_quick_look_reads_again_too() -> None:
    for key_part in (".index.json", "manifest.json"):
        store = Crackling(key_part, DAMAGED_READS - 1)
        marker = write_checkpoint(store, [os.urandom(100)])
        assert missing_parts(store, MANIFEST, marker.manifest_digest) == []
        assert store.times == 0
    store = Crackling("COMMITTED", DAMAGED_READS - 1)
    marker = write_checkpoint(store, [os.urandom(100)])
    assert damaged_marker(store, MARKER, marker.manifest_digest) is None
