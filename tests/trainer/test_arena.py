"""The stage slots seen by a trainer: prepared off its path, usable before, and never half-written for others."""

import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from dtrain.common.mailbox import PAIR_SLOTS, STAGE_SLOTS, TrainerPhase, pack
from dtrain.common.names import Step
from dtrain.storage.free_memory import Free
from dtrain.trainer import arena
from dtrain.trainer.arena import StageSlots, with_spare
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.supervised import WorkerStation
from dtrain.trainer.tracking import TrackedState
from tests.trainer.playing_worker import RankFolder, wait_for

STATE_BYTES = 8 * 1024 * 1024


class Trainer:
    """A trainer's side in this process, with a model and an optimizer of some MiB."""

    def __init__(self, folder: RankFolder) -> None:
        self.model = torch.nn.Linear(STATE_BYTES // 4 // 1024, 1024, bias=False)
        self.tracked = TrackedState()
        self.tracked.add("model", self.model)
        self.position = DataPosition([torch.zeros(1)])
        self.position.next_batch()
        self.station = WorkerStation(folder.path, rank=0, world_size=1)
        self.station.track()
        self.station.begin(
            step=Step(0),
            until=Step(10_000_000),
            capture=lambda step: self.tracked.capture(step, self.position),
            estimate_bytes=self.tracked.estimate_bytes,
        )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RankFolder]:
    with RankFolder(tmp_path / "g1", rank=0, world_size=1) as it:
        yield it


@pytest.fixture
def trainer(folder: RankFolder) -> Iterator[Trainer]:
    it = Trainer(folder)
    yield it
    it.station.close()


def allocate(folder: RankFolder, first: int) -> int:
    """Play the worker: give a pair of slots what the trainer wants; return how much that is."""
    size_bytes = folder.mailbox.needed_bytes
    for slot in range(first, first + PAIR_SLOTS):
        with (folder.path / f"slot{slot}").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    folder.mailbox.publish_slots(first, size_bytes)
    return size_bytes


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("first", [0, PAIR_SLOTS])
def test_after_the_first_step_the_slots_are_asked_for_and_mapped_before_any_checkpoint(
    folder: RankFolder, trainer: Trainer, first: int
) -> None:
    assert folder.mailbox.needed_bytes == 0
    trainer.station.boundary(Step(1))
    wait_for(lambda: folder.mailbox.needed_bytes > 0, "the trainer says what it needs")
    size_bytes = allocate(folder, first)
    assert STATE_BYTES < size_bytes < 1.5 * STATE_BYTES
    pair = [folder.path / f"slot{slot}" for slot in range(first, first + PAIR_SLOTS)]
    wait_for(lambda: all(mapped(path) for path in pair), "both are mapped")
    before = [path.stat().st_ino for path in pair]
    for step in (2, 3):
        folder.mailbox.ask(pack(step, step), slot=first + step % PAIR_SLOTS)
        trainer.station.boundary(Step(step))
        assert folder.mailbox.staged[:2] == (pack(step, step), first + step % PAIR_SLOTS)
    assert [path.stat().st_ino for path in pair] == before
    assert all(path.stat().st_size == size_bytes for path in pair), "nothing had to grow"


def test_a_checkpoint_asked_for_before_there_is_any_slot_is_staged_all_the_same(
    folder: RankFolder, trainer: Trainer
) -> None:
    folder.mailbox.ask(pack(1, 1), slot=1)
    trainer.station.boundary(Step(1))
    word, slot, size_bytes = folder.mailbox.staged
    assert (word, slot) == (pack(1, 1), 1)
    staged = load((folder.path / "slot1").read_bytes()[:size_bytes])
    assert torch.equal(staged["model.weight"], trainer.model.weight)


def test_a_worker_that_never_answers_keeps_no_trainer_from_leaving(folder: RankFolder) -> None:
    trainer = Trainer(folder)
    trainer.station.boundary(Step(1))
    wait_for(lambda: folder.mailbox.needed_bytes > 0, "the trainer says what it needs")
    trainer.station.finish()
    trainer.station.close()
    assert folder.mailbox.phase is TrainerPhase.FINISHED


def test_a_state_that_outgrew_its_slots_asks_for_larger_ones(folder: RankFolder, trainer: Trainer) -> None:
    trainer.station.boundary(Step(1))
    wait_for(lambda: folder.mailbox.needed_bytes > 0, "the trainer says what it needs")
    first_bytes = allocate(folder, 0)
    trainer.tracked.add("more", torch.nn.Linear(STATE_BYTES // 4 // 512, 512, bias=False))
    folder.mailbox.ask(pack(2, 2), slot=0)
    trainer.station.boundary(Step(2))
    assert folder.mailbox.staged[0] == pack(2, 2)
    wait_for(lambda: folder.mailbox.needed_bytes > first_bytes, "the trainer wants more")
    assert folder.mailbox.needed_bytes >= folder.mailbox.staged[2]


def test_memory_that_is_not_there_is_not_taken_and_files_may_be(tmp_path: Path) -> None:
    slots = StageSlots(tmp_path, lambda folder: Free(size_bytes=4096, where=f"the group of {folder.name}"))
    with pytest.raises(OSError, match=f"5000 bytes more, and the group of {tmp_path.name} has 4096"):
        slots.reserve(0, 5000)
    assert not (tmp_path / "slot0").exists()
    assert len(slots.reserve(PAIR_SLOTS, 5000).pages) >= 5000, "files are not memory"
    (tmp_path / "slot1").write_bytes(bytes(3000))
    assert len(slots.reserve(1, 5000).pages) >= 5000, "what is there already is not asked for again"


def test_a_trainer_that_got_no_slots_asks_again_at_its_next_checkpoint(
    folder: RankFolder, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "WAITS_MAX", 1)
    monkeypatch.setattr(arena, "WAIT_FIRST_S", 0.0)
    gave_up = threading.Semaphore(0)
    prepare = trainer.station._preparation._prepare

    def counted(estimate: Callable[[], int]) -> None:
        prepare(estimate)
        gave_up.release()

    monkeypatch.setattr(trainer.station._preparation, "_prepare", counted)
    trainer.station.boundary(Step(1))
    assert gave_up.acquire(timeout=60), "the worker did not answer"
    allocate(folder, 0)  # too late for the first wait
    (folder.path / "slot1").unlink()
    (folder.path / "slot1").mkdir()  # nobody could write there
    folder.mailbox.ask(pack(1, 2), slot=1)
    trainer.station.boundary(Step(2))
    assert folder.mailbox.stage_failed == pack(1, 2)
    wait_for(lambda: mapped(folder.path / "slot0"), "it looked again, and found what there is")


def test_a_slot_says_whose_state_it_holds_only_while_it_does(folder: RankFolder, trainer: Trainer) -> None:
    mailbox = folder.mailbox
    assert [mailbox.slot_holds(slot) for slot in range(STAGE_SLOTS)] == [0] * STAGE_SLOTS
    for attempt, slot in ((1, 0), (2, 1)):
        mailbox.ask(pack(attempt, attempt), slot=slot)
        trainer.station.boundary(Step(attempt))
    assert [mailbox.slot_holds(slot) for slot in (0, 1)] == [pack(1, 1), pack(2, 2)]
    seen: list[int] = []
    capture = trainer.tracked.capture

    def watching(step: Step, position: DataPosition[torch.Tensor]) -> object:
        seen.append(mailbox.slot_holds(0))
        return capture(step, position)

    trainer.tracked.capture = watching  # type: ignore[assignment, method-assign]
    mailbox.ask(pack(3, 3), slot=0)
    trainer.station.boundary(Step(3))
    assert seen == [pack(1, 1)], "what is there is good until the first byte is written"
    assert mailbox.slot_holds(0) == pack(3, 3)


KILLED = """
import ctypes, os, signal, sys, torch, dtrain
from dtrain.trainer import copying

class Dying:
    c_char, addressof = ctypes.c_char, staticmethod(ctypes.addressof)
    def memmove(self, target, source, length):
        ctypes.memmove(target, source, length // 2)
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        ctypes.memmove(target, source, length)

copying.ctypes = Dying()
model = torch.nn.Linear(64, 64)
with dtrain.join() as run:
    run.track(model=model)
    for _ in run.steps([0], until=1000):
        torch.nn.init.constant_(model.weight, run.step + 1)
        while run.step == 3 and not os.path.exists(sys.argv[1]):
            pass
"""


def test_a_trainer_killed_while_it_stages_leaves_nothing_that_looks_like_a_state(tmp_path: Path) -> None:
    script, go_on = tmp_path / "killed.py", tmp_path / "go on"
    script.write_text(KILLED)
    with RankFolder(tmp_path / "g1", rank=0, world_size=1) as folder:
        mailbox = folder.mailbox
        mailbox.restore = type(mailbox.restore).NOTHING
        mailbox.ask(pack(1, 3), slot=0)
        folder.start(script, str(go_on))
        folder.wait_until(lambda box: box.staged[0] == pack(1, 3), "the first state is staged")
        whole = (folder.path / "slot0").read_bytes()
        mailbox.ask(pack(2, 4), slot=1)
        go_on.touch()
        assert folder.wait_exit() == -signal.SIGKILL
        assert (folder.path / "slot1").exists(), "it was writing"
        assert [mailbox.slot_holds(slot) for slot in (0, 1)] == [pack(1, 3), 0]
        assert mailbox.staged[:2] == (pack(1, 3), 0)
        assert (folder.path / "slot0").read_bytes() == whole


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[mmap.mmap]:
    """Play CUDA: the maps that it knows."""
    found: list[mmap.mmap] = []

    def pin(pages: mmap.mmap) -> bool:
        assert not any(pages is known for known in found), "registered twice"
        found.append(pages)
        return True

    def unpin(pages: mmap.mmap) -> None:
        assert any(pages is known for known in found), "never registered"
        found[:] = [known for known in found if known is not pages]

    monkeypatch.setattr(arena, "_can_pin", lambda: True)
    monkeypatch.setattr(arena, "_pin", pin)
    monkeypatch.setattr(arena, "_unpin", unpin)
    return found


def test_memory_that_cuda_knows_is_forgotten_by_it_before_it_is_freed(
    tmp_path: Path, registered: list[mmap.mmap]
) -> None:
    slots = StageSlots(tmp_path)
    for size_bytes in (1 << 20, 2 << 20):
        for slot in range(PAIR_SLOTS):
            with (tmp_path / f"slot{slot}").open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
        slots.map_pair(0, size_bytes, threading.Event())
    assert len(registered) == 2 * PAIR_SLOTS, "bytes may still be on their way to what was replaced"
    slots.release()
    assert registered == [slots.reserve(slot, 1000).pages for slot in range(PAIR_SLOTS)]
    grown = slots.reserve(0, 4 << 20)
    assert not grown.pinned
    slots.release()
    assert registered == [slots.reserve(1, 1000).pages]
    slots.let_go()
    assert registered == []


def test_a_slot_that_was_needed_before_it_was_prepared_is_made_known_to_cuda_afterwards(
    tmp_path: Path, registered: list[mmap.mmap]
) -> None:
    slots = StageSlots(tmp_path)
    early = slots.reserve(0, 1 << 20)
    assert not early.pinned
    size_bytes = len(early.pages)
    with (tmp_path / "slot1").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
    slots.map_pair(0, size_bytes, threading.Event())
    assert [slots.reserve(slot, 1000).pinned for slot in range(PAIR_SLOTS)] == [True] * PAIR_SLOTS
    assert slots.reserve(0, 1000).pages is early.pages, "who stages into it just now is not disturbed"
    slots.map_pair(0, size_bytes, threading.Event())
    assert len(registered) == PAIR_SLOTS, "and not once more"


@pytest.mark.parametrize("mapped_before", [False, True])
def test_a_slot_that_grew_while_it_was_prepared_stays_as_large_as_it_is(
    tmp_path: Path, registered: list[mmap.mmap], monkeypatch: pytest.MonkeyPatch, mapped_before: bool
) -> None:
    slots = StageSlots(tmp_path)
    small_bytes, large_bytes = 1 << 20, 4 << 20
    for slot in range(PAIR_SLOTS):
        with (tmp_path / f"slot{slot}").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, small_bytes)
    if mapped_before:
        slots.reserve(0, small_bytes)
    grown = []

    def meanwhile(pages: mmap.mmap, stop: threading.Event) -> None:
        if not grown:
            grown.append(slots.reserve(0, large_bytes))

    monkeypatch.setattr(arena, "_populate", meanwhile)
    slots.map_pair(0, small_bytes, threading.Event())
    assert slots.reserve(0, large_bytes) is grown[0], "it need not be mapped once more"
    slots.release()
    assert registered == [slots.reserve(1, small_bytes).pages], "what nobody will use is forgotten again"
    slots.map_pair(0, small_bytes, threading.Event())
    assert slots.reserve(0, large_bytes).pinned and slots.reserve(0, large_bytes).pages is grown[0].pages
    slots.let_go()
    assert registered == []


def test_memory_stays_with_whoever_uses_it_when_its_slot_grows(tmp_path: Path) -> None:
    slots = StageSlots(tmp_path)
    first = slots.reserve(0, 1000)
    view = memoryview(first.pages)
    view[:5] = b"hello"
    second = slots.reserve(0, with_spare(1000) + mmap.PAGESIZE)
    assert second is not first and len(second.pages) > len(first.pages)
    assert bytes(second.pages[:5]) == bytes(view[:5]) == b"hello", "the same file, mapped twice"
