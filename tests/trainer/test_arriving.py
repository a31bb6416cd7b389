"""Bytes that a GPU still sends when training goes on: the state counts as staged only once they are there.

The GPU is played: an event that says when it is waited for. What CUDA does with streams is not tested here.
"""

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dtrain.common.mailbox import PAIR_SLOTS, pack
from dtrain.common.names import Step
from dtrain.trainer import arena
from dtrain.trainer.copying import Arriving, Copier
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.staging import ShardImage
from dtrain.trainer.supervised import WorkerStation
from dtrain.trainer.tracking import TrackedState
from tests.trainer.playing_worker import RankFolder


class Played:
    """A GPU's event."""

    def __init__(self) -> None:
        self.waited = 0
        self.broken = False
        self.is_there = False

    def query(self) -> bool:
        return self.is_there

    def synchronize(self) -> None:
        self.waited += 1
        if self.broken:
            raise RuntimeError("CUDA error: the GPU has fallen off the bus")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RankFolder]:
    with RankFolder(tmp_path / "g1", rank=0, world_size=1) as it:
        yield it


@pytest.fixture
def event(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Every copy is still on its way when it returns."""
    played, copy = Played(), ShardImage.copy_into

    def begun(self: ShardImage, target: memoryview, copier: Copier, *, pinned: bool = False) -> Arriving:
        copy(self, target, copier, pinned=pinned)
        return Arriving([played], list(self.tensors.values()))

    monkeypatch.setattr(ShardImage, "copy_into", begun)
    return played


@pytest.fixture
def station(folder: RankFolder) -> Iterator[WorkerStation]:
    tracked, position = TrackedState(), DataPosition([torch.zeros(1)])
    tracked.add("model", torch.nn.Linear(2, 2))
    position.next_batch()
    it = WorkerStation(folder.path, rank=0, world_size=1)
    it.track()
    it.begin(step=Step(0), until=Step(3), capture=lambda step: tracked.capture(step, position))
    yield it
    it.close()


def test_training_goes_on_and_the_state_is_staged_at_the_next_boundary(
    folder: RankFolder, station: WorkerStation, event: Played
) -> None:
    folder.mailbox.ask(pack(1, 1), slot=0)
    station.boundary(Step(1))
    assert event.waited == 0, "nobody waited"
    assert folder.mailbox.staged[0] == 0 and folder.mailbox.slot_holds(0) == 0, "nothing looks like a state yet"
    folder.mailbox.ask(pack(2, 2), slot=1)
    station.boundary(Step(2))
    assert event.waited == 1
    assert folder.mailbox.staged[:2] == (pack(1, 1), 0) and folder.mailbox.slot_holds(0) == pack(1, 1)
    station.boundary(Step(3))
    assert folder.mailbox.staged[:2] == (pack(2, 2), 1)


@pytest.mark.parametrize("there", [True, False])
def test_a_loop_that_is_left_tells_of_what_is_there_and_waits_for_nothing(
    folder: RankFolder, station: WorkerStation, event: Played, there: bool
) -> None:
    folder.mailbox.ask(pack(1, 1), slot=0)
    station.boundary(Step(1))
    event.is_there = there
    station.leave()
    assert folder.mailbox.staged[0] == (pack(1, 1) if there else 0)
    assert event.waited == there, "nobody waited in vain"
    station.finish()
    assert folder.mailbox.staged[0] == pack(1, 1)


def test_the_state_of_the_last_step_is_waited_for_at_the_end(
    folder: RankFolder, station: WorkerStation, event: Played
) -> None:
    folder.mailbox.ask(pack(1, 1), slot=0)
    station.boundary(Step(1))
    station.finish()
    assert event.waited == 1 and folder.mailbox.staged[:2] == (pack(1, 1), 0)


def test_bytes_that_never_arrive_are_a_failed_checkpoint_and_no_more(
    folder: RankFolder, station: WorkerStation, event: Played
) -> None:
    folder.mailbox.ask(pack(1, 1), slot=0)
    station.boundary(Step(1))
    event.broken = True
    station.boundary(Step(2))
    assert folder.mailbox.stage_failed == pack(1, 1) and "fallen off the bus" in folder.mailbox.error
    assert folder.mailbox.staged[0] == 0 and folder.mailbox.slot_holds(0) == 0


def test_memory_that_was_replaced_while_bytes_arrived_there_is_forgotten_by_cuda_once_they_have(
    folder: RankFolder, station: WorkerStation, event: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[mmap.mmap] = []
    monkeypatch.setattr(arena, "_can_pin", lambda: True)
    monkeypatch.setattr(arena, "_pin", lambda pages: True)
    monkeypatch.setattr(arena, "_unpin", forgotten.append)

    def prepare(size_bytes: int) -> None:
        for slot in range(PAIR_SLOTS):
            with (folder.path / f"slot{slot}").open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
        station._slots.map_pair(0, size_bytes, threading.Event())

    prepare(1 << 20)
    before = [station._slots.reserve(slot, 1000).pages for slot in range(PAIR_SLOTS)]
    folder.mailbox.ask(pack(1, 1), slot=0)
    station.boundary(Step(1))
    prepare(2 << 20)
    assert event.waited == 0 and forgotten == [], "a GPU is still writing there"
    station.boundary(Step(2))
    assert event.waited == 1 and forgotten == before
    after = [station._slots.reserve(slot, 1000).pages for slot in range(PAIR_SLOTS)]
    station._slots.let_go()
    assert forgotten == before + after
