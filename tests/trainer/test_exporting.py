"""A checkpoint leaves dtrain: read by safetensors alone, and by torch's own loader."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

from dtrain.common.errors import ShardDamagedError
from dtrain.storage.local import LocalFolder
from dtrain.storage.verify import read_manifest
from dtrain.trainer.exporting import export_dcp, export_safetensors
from tests.trainer.test_local_mode import train

MANIFEST = "jobs/local/checkpoints/000001/attempt-000001/manifest.json"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    """A store with a checkpoint of a short training, whose final weights lie beside it."""
    folder = tmp_path_factory.mktemp("exported")
    train(folder / "results", 3, DTRAIN_LOCAL_STORE=str(folder / "store"))
    return LocalFolder(folder / "store")


def test_one_safetensors_file_holds_every_tensor_of_what_was_tracked(store: LocalFolder, tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.safetensors"
    count = export_safetensors(store, read_manifest(store, MANIFEST), path)
    found = load_file(path)
    assert len(found) == count and not any(name.startswith("_") for name in found)
    for name, tensor in load_file(store.root.parent / "results" / "final.safetensors").items():
        assert torch.equal(found[f"model.{name}"], tensor)
    assert found["optimizer.state.0.exp_avg"].shape == found["model.0.weight"].shape
    with safe_open(path, "pt") as file:
        assert file.metadata()["dtrain.step"] == "3"
        assert "scheduler" in json.loads(file.metadata()["dtrain.tree"])["objects"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_torchs_own_loader_reads_the_folder_into_a_model(store: LocalFolder, tmp_path: Path) -> None:
    export_dcp(store, read_manifest(store, MANIFEST), tmp_path / "folder")
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
    dcp.load({"model": model.state_dict()}, checkpoint_id=tmp_path / "folder", no_dist=True)
    for name, tensor in load_file(store.root.parent / "results" / "final.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_damaged_checkpoint_is_not_exported_and_leaves_nothing_behind(tmp_path: Path) -> None:
    train(tmp_path / "results", 2, DTRAIN_LOCAL_STORE=str(tmp_path / "store"))
    damaged = LocalFolder(tmp_path / "store")
    path = tmp_path / "store" / MANIFEST.replace("manifest.json", "rank-00000.safetensors")
    data = path.read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    names = json.loads(data[8:header_bytes])
    at = header_bytes + names["model.0.weight"]["data_offsets"][0]
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ShardDamagedError, match=r"tensor 'model\.0\.weight' does not match its digest"):
        export_safetensors(damaged, read_manifest(damaged, MANIFEST), tmp_path / "state.safetensors")
    assert not list(tmp_path.glob("*state.safetensors*"))
