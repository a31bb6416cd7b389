"""torch.distributed.checkpoint on dtrain's stores: its own calls, dtrain's layout and digests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import dtrain
from dtrain.common.errors import UserError
from dtrain.storage.dcp import StoreReader, StoreWriter
from dtrain.storage.local import LocalFolder
from dtrain.storage.verify import verify_checkpoint
from tests.trainer.playing_worker import DEADLINE_S, clean_environment
from tests.trainer.test_local_mode import train

SCRIPT = Path(__file__).parent / "dcp_script.py"


def together(what: str, folder: Path, world: int) -> None:
    """Run the script on every rank of a world."""
    meet = folder / f"meet-{what}-{world}"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), what, str(folder / "store"), str(rank), str(world), str(meet)],
            env=clean_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=2 * DEADLINE_S)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize(("world", "then"), [(2, 1), (1, 2)])
def test_a_plain_program_saves_in_one_world_and_loads_in_another(world: int, then: int, tmp_path: Path) -> None:
    together("save", tmp_path, world)
    marker = "jobs/plain/checkpoints/000003/COMMITTED"
    assert json.loads((tmp_path / "store" / marker).read_text())["step"] == 7
    assert verify_checkpoint(LocalFolder(tmp_path / "store"), marker) == []
    together("load", tmp_path, then)
    with pytest.raises(UserError, match="already: give another number"):
        StoreWriter(str(tmp_path / "store"), job="plain", checkpoint=3)


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
