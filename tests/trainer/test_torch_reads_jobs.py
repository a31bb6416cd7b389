"""All that a job tracked is read by torch's own loader, in place and from an exported folder: tensors and the rest."""

import enum
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemReader

import dtrain
from dtrain.storage.dcp import StoreReader
from dtrain.storage.local import LocalFolder
from dtrain.storage.verify import read_manifest
from dtrain.trainer.exporting import export_dcp

MANIFEST = "jobs/local/checkpoints/000001/attempt-000001/manifest.json"


class Mood(enum.Enum):
    CALM = "calm"


class Many:
    """Something with a state of every kind that torch flattens in a way of its own."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def many() -> dict[str, Any]:
    return {
        "number": 7,
        "big": 2**70,
        "text": "words",
        "none": None,
        "pair": (0.9, 0.999),
        "plain list": [1, [2, 3]],
        "list of dicts": [{"a": 1}, {"a": 2, "deep": {"b": [True]}}],
        "list of tensors": [torch.ones(2), 5],
        "tuple of tensors": (torch.arange(3), {"a": 1}),
        "array": np.arange(5, dtype=np.int16),
        "bytes": bytes(range(256)) * 8,
        "ordered": OrderedDict(x=1, y=torch.zeros(2)),
        "empty": {},
        "complex": torch.tensor([1 + 2j], dtype=torch.complex128),
        "type": torch.bfloat16,
        "mood": Mood.CALM,
        3: {"inner": 1.5},
        Mood.CALM: "key",
    }


def built() -> tuple[torch.nn.Module, torch.optim.AdamW, torch.optim.lr_scheduler.StepLR]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[1].parameters(), "weight_decay": 0.3}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.99), amsgrad=True)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.37)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a store and what was exported of it, and what was tracked."""
    folder = tmp_path_factory.mktemp("job")
    model, optimizer, scheduler = built()
    other = Many(many())
    with dtrain.join(store=str(folder / "store"), every_steps=3) as run:
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, other=other)
        for _ in run.steps([1, 2, 3], until=3):
            step(model, optimizer)
            scheduler.step()
    store = LocalFolder(folder / "store")
    export_dcp(store, read_manifest(store, MANIFEST), folder / "exported")
    return folder, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "other": other}


READERS: list[Callable[[Path], Any]] = [
    lambda folder: StoreReader(str(folder / "store"), job="local"),
    lambda folder: FileSystemReader(folder / "exported"),
]


@pytest.mark.parametrize("reader", READERS, ids=["in place", "exported"])
def test_an_optimizer_comes_back_bit_by_bit(reader: Callable[[Path], Any], job: tuple[Path, dict[str, Any]]) -> None:
    folder, tracked = job
    model, optimizer, scheduler = built()
    step(model, optimizer)  # so that there is a state to be filled
    dcp.load(
        {"model": model, "optimizer": optimizer, "scheduler": scheduler}, storage_reader=reader(folder), no_dist=True
    )
    for name, loaded in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
        _assert_same(loaded.state_dict(), tracked[name].state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.37**3)


@pytest.mark.parametrize("reader", READERS, ids=["in place", "exported"])
def test_every_kind_of_value_has_the_name_that_torch_gives_it(
    reader: Callable[[Path], Any], job: tuple[Path, dict[str, Any]]
) -> None:
    folder, tracked = job
    expected, _ = flatten_state_dict({"other": tracked["other"].state_dict()})
    found = {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None for name, value in expected.items()
    }
    dcp.load(found, storage_reader=reader(folder), no_dist=True)
    _assert_same(found, expected)
    names = reader(folder).read_metadata().state_dict_metadata.keys()
    assert {name for name in names if name.startswith("other.") and not name.startswith("other.tuple of tensors.")} == (
        expected.keys()
    )


def test_a_value_of_a_type_that_only_the_script_has_is_left_out_of_an_export(
    job: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalFolder(job[0] / "store")
    monkeypatch.delattr(sys.modules[__name__], "Mood")
    export_dcp(store, read_manifest(store, MANIFEST), tmp_path / "exported")
    assert "other.mood is left out" in caplog.text
    names = FileSystemReader(tmp_path / "exported").read_metadata().state_dict_metadata
    assert "other.mood" not in names and "other.text" in names


def _assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    match one:
        case dict():
            assert list(one) == list(other)
            for key in one:
                _assert_same(one[key], other[key])
        case list() | tuple():
            assert len(one) == len(other)
            for left, right in zip(one, other, strict=True):
                _assert_same(left, right)
        case torch.Tensor():
            assert one.dtype == other.dtype and torch.equal(one, other)
        case np.ndarray():
            assert one.dtype == other.dtype and np.array_equal(one, other)
        case _:
            assert one == other
