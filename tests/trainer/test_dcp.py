"""torch.distributed.checkpoint on dtrain's stores: its own calls, dtrain's layout and digests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

import dtrain
from dtrain.common.errors import UserError
from dtrain.storage.dcp import StoreReader, StoreWriter
from dtrain.storage.local import LocalFolder
from dtrain.storage.objects import StorageUnavailable
from dtrain.storage.retrying import DAMAGED_READS
from dtrain.storage.verify import verify_checkpoint
from tests.support.memory_store import Crackling, Fault, MemoryStore
from tests.support.warm_scripts import WarmScripts
from tests.trainer.playing_worker import DEADLINE_S, clean_environment
from tests.trainer.test_local_mode import train

SCRIPT = Path(__file__).parent / "dcp_script.py"


def together(warm: WarmScripts, what: str, folder: Path, world: int) -> None:
    """Run the script on every rank of a world."""
    meet, said = folder / f"meet-{what}-{world}", [folder / f"said-{what}-{world}-{rank}" for rank in range(world)]
    ranks = [
        warm.start(
            SCRIPT,
            *(what, str(folder / "store"), str(rank), str(world), str(meet)),
            environment=clean_environment(),
            output=output,
        )
        for rank, output in enumerate(said)
    ]
    try:
        for rank, output in zip(ranks, said, strict=True):
            assert rank.wait(2 * DEADLINE_S) == 0, output.read_text()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize(("world", "then"), [(2, 1), (1, 2)])
def test_a_plain_program_saves_in_one_world_and_loads_in_another(
    world: int, then: int, warm: WarmScripts, tmp_path: Path
) -> None:
    together(warm, "save", tmp_path, world)
    marker = "jobs/plain/checkpoints/000003/COMMITTED"
    assert json.loads((tmp_path / "store" / marker).read_text())["step"] == 7
    assert verify_checkpoint(LocalFolder(tmp_path / "store"), marker) == []
    together(warm, "load", tmp_path, then)
    with pytest.raises(UserError, match="already: give another number"):
        StoreWriter(str(tmp_path / "store"), job="plain", checkpoint=3)


def writer(folder: Path, checkpoint: int = 1, job: str = "plain") -> StoreWriter:
    return StoreWriter(str(folder / "store"), job=job, checkpoint=checkpoint)


def save(number: int, to: StoreWriter) -> None:
    dcp.save({"w": torch.full((4,), float(number)), "n": number}, storage_writer=to, no_dist=True)


def saved(folder: Path) -> int:
    """Verify checkpoint 1 and return which save's it is."""
    store = LocalFolder(folder / "store")
    assert verify_checkpoint(store, "jobs/plain/checkpoints/000001/COMMITTED") == []
    found: dict[str, Any] = {"w": torch.zeros(4), "n": 0}
    dcp.load(found, storage_reader=StoreReader(str(folder / "store"), job="plain", checkpoint=1), no_dist=True)
    assert torch.equal(found["w"], torch.full((4,), float(found["n"])))
    return int(found["n"])


def test_a_writer_that_saves_twice_is_refused_and_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    twice = writer(tmp_path)
    save(1, twice)
    before = sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file())
    with pytest.raises(CheckpointException, match=r"is in .* already: give another number"):
        save(2, twice)
    assert saved(tmp_path) == 1
    assert sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file()) == before


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        ("prepare_local_plan", "is in .* already: give another number"),
        ("write_data", "was committed by another save meanwhile"),
        ("finish", "was committed by another save meanwhile"),
    ],
)
def test_of_two_saves_of_one_checkpoint_the_first_to_commit_stays_whole(
    moment: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = writer(tmp_path), writer(tmp_path)
    goes_on = getattr(slow, moment)

    def overtaken(*given: Any, **named: Any) -> Any:
        save(1, fast)
        return goes_on(*given, **named)

    monkeypatch.setattr(slow, moment, overtaken)
    with pytest.raises(CheckpointException, match=said):
        save(2, slow)
    assert saved(tmp_path) == 1


def test_ranks_that_would_each_commit_alone_are_refused(tmp_path: Path) -> None:
    alone = writer(tmp_path)
    with pytest.raises(UserError, match="leave use_collectives=True"):
        dcp.save({"w": torch.ones(4)}, storage_writer=alone, no_dist=True, use_collectives=False)


def test_a_save_that_ended_midway_is_begun_again_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = writer(tmp_path)
    monkeypatch.setattr(broken, "finish", lambda **_: 1 / 0)
    with pytest.raises(CheckpointException):
        save(1, broken)
    save(2, writer(tmp_path))
    assert saved(tmp_path) == 2


def test_an_answer_that_was_lost_does_not_refuse_ones_own_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    monkeypatch.setattr("dtrain.storage.dcp.open_store", lambda _: store)
    lost = StorageUnavailable("no answer")
    parts = ("CLAIMED", "manifest.json", "COMMITTED")
    store.fail_next(*(Fault(operation="put", key_part=part, error=lost, after=True) for part in parts))
    save(1, writer(tmp_path))
    assert store.faults_left == 0
    assert verify_checkpoint(store, "jobs/plain/checkpoints/000001/COMMITTED") == []


def test_the_name_of_a_job_that_ran_under_dtrain_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "results", 2, DTRAIN_LOCAL_STORE=str(tmp_path / "store"), DTRAIN_JOB="mine")
    with pytest.raises(CheckpointException, match=r"is a job that ran under dtrain.*give job= another name"):
        save(1, writer(tmp_path, checkpoint=50, job="mine"))


@pytest.mark.parametrize("number", [0, 1_000_000])
def test_a_number_that_no_checkpoint_can_have_is_one_clear_sentence(number: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"numbered from 1 to 999999\. Count them, and say the step with step="):
        writer(tmp_path, checkpoint=number)
    with pytest.raises(UserError, match="numbered from 1 to 999999"):
        StoreReader(str(tmp_path), job="plain", checkpoint=number)


@pytest.mark.parametrize("key_part", ["COMMITTED", "manifest.json", ".index.json", ".safetensors"])
def test_what_comes_late_or_damaged_is_read_again(
    key_part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Crackling(key_part, 0)
    monkeypatch.setattr("dtrain.storage.dcp.open_store", lambda _: store)
    save(7, writer(tmp_path))
    store.times = DAMAGED_READS - 1
    away = StorageUnavailable("503 slow down")
    operation = "read_into" if key_part == ".safetensors" else "get"
    store.fail_next(Fault(operation="list", error=away), Fault(operation=operation, key_part=key_part, error=away))
    found: dict[str, Any] = {"w": torch.zeros(4), "n": 0}
    dcp.load(found, storage_reader=StoreReader("memory", job="plain"), no_dist=True)
    assert found["n"] == 7 and torch.equal(found["w"], torch.full((4,), 7.0))
    assert store.faults_left == store.times == 0


def test_complex_numbers_of_double_precision_come_back(tmp_path: Path) -> None:
    there = {
        "z": torch.randn(3, 5, dtype=torch.complex128),
        "conjugate": torch.randn(4, dtype=torch.complex128).conj(),
        "number": torch.tensor(1 + 2j, dtype=torch.complex128),
        "none": torch.zeros(0, 2, dtype=torch.complex128),
        "single": torch.randn(4, dtype=torch.complex64).conj(),
    }
    dcp.save(there, storage_writer=writer(tmp_path), no_dist=True)
    found = {name: torch.zeros_like(tensor) for name, tensor in there.items()}
    dcp.load(found, storage_reader=StoreReader(str(tmp_path / "store"), job="plain"), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in there.items())


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_save_beside_the_training_is_committed(kind: str, warm: WarmScripts, tmp_path: Path) -> None:
    together(warm, kind, tmp_path, 1)
    assert verify_checkpoint(LocalFolder(tmp_path / "store"), "jobs/plain/checkpoints/000003/COMMITTED") == []
    together(warm, "load", tmp_path, 1)


def test_a_jobs_own_checkpoint_is_read_by_torchs_loader(tmp_path: Path) -> None:
    train(tmp_path / "results", 3, DTRAIN_LOCAL_STORE=str(tmp_path / "store"), DTRAIN_JOB="mine")
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
    reader = StoreReader(str(tmp_path / "store"), job="mine")
    dcp.load({"model": model.state_dict()}, storage_reader=reader, no_dist=True)
    for name, tensor in load_file(tmp_path / "results" / "final.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_job_without_a_checkpoint_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no committed checkpoint of nobody"):
        StoreReader(str(tmp_path), job="nobody").read_metadata()


def test_the_short_name_is_the_same_module() -> None:
    assert (dtrain.dcp.StoreReader, dtrain.dcp.StoreWriter) == (StoreReader, StoreWriter)
