"""At the end of a step: progress out, requests answered, and nothing else that could be measured."""

import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dtrain.common.errors import ShardDamagedError, UserError
from dtrain.common.mailbox import Mailbox, TrainerPhase, pack, unpack
from dtrain.common.names import Step
from dtrain.storage.catalogs import catalog_of
from dtrain.storage.indexes import index_shard, open_index
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.resharding import fill
from dtrain.trainer.restoring import saved_state
from dtrain.trainer.supervised import WorkerStation
from dtrain.trainer.tracking import SavedState, TrackedState
from tests.support.facts import wait_for
from tests.trainer.playing_worker import RankFolder

UNTIL = Step(10_000_000)


class Holder:
    """Something to track: its state is whatever it holds."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Stage:
    """A trainer's side and a worker's side of one rank, in this process."""

    def __init__(self, folder: RankFolder, tracked: dict[str, object]) -> None:
        self.folder = folder
        self.mailbox: Mailbox = folder.mailbox
        self.tracked = TrackedState()
        for name, item in tracked.items():
            self.tracked.add(name, item)
        self.position = DataPosition([torch.zeros(1)])
        self.position.next_batch()
        self.station = WorkerStation(folder.path, rank=0, world_size=1)
        self.station.begin(step=Step(0), until=UNTIL, capture=lambda step: self.tracked.capture(step, self.position))

    def staged_file(self) -> Path:
        """Return a copy of what is staged, cut to its size."""
        _, slot, size_bytes = self.mailbox.staged
        copy = self.folder.path / "copy.safetensors"
        copy.write_bytes((self.folder.path / f"slot{slot}").read_bytes()[:size_bytes])
        return copy


def read_alone(path: Path, tracked: TrackedState) -> SavedState:
    """Read the shard, which is a whole checkpoint, into what ``tracked`` wants of it."""
    data = memoryview(bytearray(path.read_bytes()))
    index, _ = index_shard(data, key=str(path))
    saved = saved_state(catalog_of([open_index(index, key="index", shard_key=str(path))]), 0)
    targets = tracked.targets(saved, torch.device("cpu"))
    fill(targets, saved.wholes, lambda _: {0: data}, moved=False, threads=1)
    return replace(saved, tensors=targets)


Stages = Callable[..., Stage]


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[Stages]:
    with RankFolder(tmp_path / "g1", rank=0, world_size=1) as folder:
        made: list[Stage] = []

        def make(**tracked: object) -> Stage:
            made.append(Stage(folder, tracked))
            return made[-1]

        yield make
        for stage in made:
            stage.station.close()


def test_a_request_for_this_step_is_staged_and_training_goes_on(stages: Stages) -> None:
    stage = stages(model=Holder({"weight": torch.arange(4.0)}))
    stage.mailbox.request = pack(3, 2)
    stage.station.boundary(Step(1))
    assert stage.mailbox.staged == (0, 0, 0), "it waits for its step"
    stage.station.boundary(Step(2))
    assert unpack(stage.mailbox.staged[0]) == (3, 2)
    assert stage.mailbox.phase is TrainerPhase.TRAINING and stage.mailbox.stall_ns > 0
    assert load_file(stage.staged_file())["model.weight"].tolist() == [0, 1, 2, 3]


def test_what_the_script_does_in_a_pause_is_no_step(stages: Stages) -> None:
    stage = stages(model=Holder(1))
    with stage.station.paused():
        assert stage.mailbox.phase is TrainerPhase.PAUSED
        time.sleep(0.2)
    assert stage.mailbox.phase is TrainerPhase.TRAINING
    stage.station.boundary(Step(1))
    assert stage.mailbox.step_ns < 150_000_000, "the pause was taken for a part of the step"


def test_a_state_that_takes_long_to_copy_is_announced_as_a_checkpoint(stages: Stages) -> None:
    phases: list[TrainerPhase] = []

    class Watched(Holder):
        def state_dict(self) -> Any:
            phases.append(stage.mailbox.phase)
            return self.state

    stage = stages(model=Watched(1))
    stage.mailbox.request = pack(1, 1)
    stage.station.boundary(Step(1))
    assert phases and set(phases) == {TrainerPhase.CHECKPOINTING}


def test_a_request_for_a_step_that_is_over_is_reported_as_missed(stages: Stages) -> None:
    stage = stages(model=Holder(1))
    stage.station.boundary(Step(5))
    stage.mailbox.request = pack(1, 5)
    stage.station.boundary(Step(6))
    assert unpack(stage.mailbox.missed) == (1, 5)
    assert stage.mailbox.staged[0] == 0


def test_a_newer_request_replaces_one_that_still_waits(stages: Stages) -> None:
    stage = stages(model=Holder(1))
    stage.mailbox.request = pack(1, 50)
    stage.station.boundary(Step(1))
    stage.mailbox.request = pack(2, 2)
    stage.station.boundary(Step(2))
    assert unpack(stage.mailbox.staged[0]) == (2, 2)
    assert stage.mailbox.missed == 0


def test_a_request_written_again_is_staged_once(stages: Stages) -> None:
    holder = Holder(1)
    stage = stages(model=holder)
    stage.mailbox.request = pack(1, 1)
    stage.station.boundary(Step(1))
    before = stage.mailbox.staged
    stage.mailbox.request = pack(1, 1)
    stage.station.boundary(Step(2))
    assert stage.mailbox.staged == before and stage.mailbox.missed == 0


def test_the_slot_of_the_last_staged_attempt_is_never_written_by_the_next(stages: Stages) -> None:
    holder = Holder({"x": torch.zeros(1000)})
    stage = stages(model=holder)
    slots = []
    for step in range(1, 6):
        holder.state["x"] += 1
        if step == 3:  # one that fails must not cost the good one its slot
            holder.state["bad"] = object()
        before = stage.staged_file().read_bytes() if step > 1 else b""
        slot_before = stage.mailbox.staged[1]
        stage.mailbox.request = pack(step, step)
        stage.station.boundary(Step(step))
        holder.state.pop("bad", None)
        slots.append(stage.mailbox.staged[1])
        if step > 1:
            assert (stage.folder.path / f"slot{slot_before}").read_bytes().startswith(before)
    assert slots == [0, 1, 1, 0, 1]


def test_a_state_that_grows_gets_a_larger_slot(stages: Stages) -> None:
    holder = Holder({"x": torch.zeros(10)})
    stage = stages(model=holder)
    for step, count in ((1, 10), (2, 10), (3, 3_000_000), (4, 2_000_000)):
        holder.state["x"] = torch.full((count,), float(step))
        stage.mailbox.request = pack(step, step)
        stage.station.boundary(Step(step))
        loaded = load_file(stage.staged_file())["model.x"]
        assert loaded.shape == (count,) and bool((loaded == step).all())


def test_a_state_that_cannot_be_stored_is_reported_and_the_next_one_is_staged(stages: Stages) -> None:
    holder = Holder({"deep": [object()]})
    stage = stages(model=holder)
    stage.mailbox.request = pack(1, 1)
    stage.station.boundary(Step(1))
    assert unpack(stage.mailbox.stage_failed) == (1, 1)
    assert "step 1 could not be stored: TypeError: model.deep.0 is a builtins.object" in stage.mailbox.error
    assert stage.mailbox.phase is TrainerPhase.TRAINING and stage.mailbox.staged[0] == 0
    holder.state = 1
    stage.mailbox.request = pack(2, 2)
    stage.station.boundary(Step(2))
    assert unpack(stage.mailbox.staged[0]) == (2, 2) and stage.mailbox.error == ""


@contextmanager
def no_file_larger_than(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_in_shared_memory_is_reported_and_training_goes_on(stages: Stages) -> None:
    stage = stages(model=Holder(torch.zeros(1_000_000)))
    stage.mailbox.request = pack(1, 1)
    with no_file_larger_than(1_000_000):
        stage.station.boundary(Step(1))
    assert unpack(stage.mailbox.stage_failed) == (1, 1)
    assert "could not be stored: OSError" in stage.mailbox.error
    stage.mailbox.request = pack(2, 2)
    stage.station.boundary(Step(2))
    assert unpack(stage.mailbox.staged[0]) == (2, 2)


def test_objects_and_random_states_come_back_from_the_shard(stages: Stages) -> None:
    model, holder = torch.nn.Linear(3, 2), Holder({"when": (1, 2.5), "x": torch.ones(2, dtype=torch.bfloat16)})
    stage = stages(model=model, other=holder)
    stage.mailbox.request = pack(1, 1)
    stage.station.boundary(Step(1))
    drawn = random.random(), np.random.rand(), torch.rand(2).tolist()
    weight = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    holder.state = None
    saved = read_alone(stage.staged_file(), stage.tracked)
    stage.tracked.restore_objects(saved, torch.device("cpu"))
    stage.tracked.restore_position(saved, DataPosition([torch.zeros(1)]), rank=0, world_size=1, seek=True)
    assert torch.equal(model.weight, weight) and holder.state["when"] == (1, 2.5)
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == drawn


def test_a_module_that_has_no_shapes_before_its_first_input_takes_those_that_were_stored(stages: Stages) -> None:
    model = torch.nn.LazyLinear(2)
    model(torch.zeros(1, 3))
    stage = stages(model=model)
    stage.mailbox.request = pack(1, 1)
    stage.station.boundary(Step(1))
    fresh, again = torch.nn.LazyLinear(2), TrackedState()
    again.add("model", fresh)
    again.restore_objects(read_alone(stage.staged_file(), again), torch.device("cpu"))
    assert torch.equal(fresh.weight, model.weight)


def test_an_object_that_the_checkpoint_does_not_hold_is_named(stages: Stages) -> None:
    stage = stages(model=Holder(1))
    stage.mailbox.request = pack(1, 1)
    stage.station.boundary(Step(1))
    other = TrackedState()
    other.add("optimizer", Holder(1))
    with pytest.raises(UserError, match=r"holds no optimizer \(it holds model\)"):
        read_alone(stage.staged_file(), other)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_shard_that_is_cut_short_is_refused_by_name(stages: Stages, cut: int) -> None:
    stage = stages(model=Holder(torch.ones(3)))
    stage.mailbox.request = pack(1, 1)
    stage.station.boundary(Step(1))
    path = stage.staged_file()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ShardDamagedError, match=r"copy\.safetensors"):
        read_alone(path, stage.tracked)


def test_a_boundary_without_a_request_costs_less_than_ten_microseconds(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = stages(model=Holder(1))
    boundary, count = stage.station.boundary, 20_000
    best_us = float("inf")
    for _ in range(5):  # the best of five: this machine does other things too
        began = time.perf_counter()
        for step in range(count):
            boundary(Step(step))
        best_us = min(best_us, (time.perf_counter() - began) / count * 1e6)
    with capsys.disabled():
        print(f"\n  step boundary: {best_us:.2f} us")
    assert best_us < 10, "about 1 us on a quiet machine"


def test_a_trainer_holds_after_its_last_step_until_that_is_staged(tmp_path: Path) -> None:
    with RankFolder(tmp_path / "g1", rank=0, world_size=1) as folder:
        station = WorkerStation(folder.path, rank=0, world_size=1, save_last=True)
        tracked = TrackedState()
        tracked.add("model", Holder({"weight": torch.arange(4.0)}))
        position = DataPosition([torch.zeros(1)])
        position.next_batch()
        station.track()
        station.begin(step=Step(0), until=Step(1), capture=lambda step: tracked.capture(step, position))
        station.boundary(Step(1))

        def ask() -> None:
            wait_for("the trainer to hold", lambda: folder.mailbox.phase is TrainerPhase.HOLDING, deadline_s=30)
            folder.mailbox.request = pack(4, 1)

        worker = threading.Thread(target=ask)
        worker.start()
        station.finish()
        worker.join()
        assert unpack(folder.mailbox.staged[0]) == (4, 1)
        assert folder.mailbox.phase is TrainerPhase.FINISHED
        station.finish()  # a second word about the end waits for nothing
        station.close()
