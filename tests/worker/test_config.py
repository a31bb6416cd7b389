"""How many trainers an agent takes when nobody says."""

import os
from pathlib import Path

import pytest

from dtrain.worker.config import default_slots


@pytest.mark.parametrize(
    ("gpus", "visible", "slots"),
    [
        (8, None, 8),
        (8, "0,1", 2),
        (2, "GPU-4f1e,GPU-98aa,GPU-0b21", 2),
        (8, "", os.cpu_count()),
        (8, "-1", os.cpu_count()),
        (0, None, os.cpu_count()),
    ],
)
def test_the_slots_are_the_gpus_that_the_node_may_use_and_else_its_processors(
    gpus: int, visible: str | None, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*(f"nvidia{n}" for n in range(gpus)), "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert default_slots(tmp_path) == slots
