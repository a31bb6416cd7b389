"""What reads a checkpoint for a person does not give up at the first answer that is late or damaged."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from dtrain.cli import export, verification
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step
from dtrain.coordinator.core.states import CommittedCheckpoint, Position
from dtrain.storage.objects import StorageUnavailable
from dtrain.storage.retrying import DAMAGED_READS
from tests.support.checkpoints import write_checkpoint
from tests.support.memory_store import Crackling, Fault

JOB = JobName("mnist")
FAULTS = [Fault(operation=name, error=StorageUnavailable("503 slow down")) for name in ("get", "head", "read_into")]


def committed(store: Crackling) -> CommittedCheckpoint:
    marker = write_checkpoint(store, [bytes(100)])
    return CommittedCheckpoint(
        number=CheckpointNumber(1),
        attempt=AttemptNumber(1),
        generation=Generation(1),
        step=Step(100),
        world_size=1,
        shards=(),
        store=store.uri,
        manifest_key=marker.manifest_key,
        manifest_digest=marker.manifest_digest,
        position=Position(seq=7, digest="0" * 64),
        time=0.0,
        marked=True,
    )


@pytest.mark.parametrize("key_part", [".safetensors", ".index.json", "manifest.json"])
@pytest.mark.parametrize("deep", [True, False])
def test_verify_reads_again(key_part: str, deep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Crackling(key_part, 0)
    checkpoint = committed(store)
    monkeypatch.setattr(verification, "open_store", lambda _: store)
    store.times = DAMAGED_READS - 1
    store.fail_next(Fault(operation="list", error=StorageUnavailable("503")), *(FAULTS if deep else FAULTS[:2]))
    assert verification._judge(verification._opened("memory", JOB), JOB, checkpoint, deep).sound
    assert store.faults_left == 0


@pytest.mark.parametrize("key_part", [".safetensors", ".index.json", "manifest.json"])
def test_export_reads_again(key_part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Crackling(key_part, 0)
    checkpoint = committed(store)
    monkeypatch.setattr("dtrain.storage.uris.open_store", lambda _: store)
    store.times = DAMAGED_READS - 1
    store.fail_next(FAULTS[0], FAULTS[2])
    assert export._export(checkpoint, tmp_path / "state.safetensors", "safetensors") == 1
    assert load_file(tmp_path / "state.safetensors")["payload.0"].shape == (100,)
    assert store.faults_left == store.times == 0
