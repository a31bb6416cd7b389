"""The agent's stage slots: which one is written next, where they lie, and how long they stay."""

import asyncio
import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dtrain.common.names import Generation, JobName
from dtrain.storage.free_memory import Free
from dtrain.worker import arenas
from dtrain.worker.arenas import KEEP_S, Arenas, Kept
from dtrain.worker.rank_dirs import RankDirs, RankId
from dtrain.worker.tasks import Tasks

JOB = JobName("digits")
PLENTY = Free(size_bytes=1 << 40, where="this test")
SIZE = 1_000_000


def ranks(generation: int = 1, *numbers: int) -> tuple[RankId, ...]:
    return tuple(RankId(job=JOB, generation=Generation(generation), rank=rank) for rank in numbers or (0, 1))


def kept(attempt: int) -> Kept:
    return Kept(attempt=attempt, step=attempt, size_bytes=1, digest="xxh3-128:00")


@dataclass
class Node:
    """Arenas, and what they said."""

    folder: Path
    free: Free = PLENTY
    provided: list[tuple[RankId, int, int]] = field(default_factory=list)
    told: list[tuple[RankId, str]] = field(default_factory=list)
    tasks: Tasks = field(default_factory=Tasks)

    def __post_init__(self) -> None:
        (self.folder / "shm").mkdir(exist_ok=True)
        self.dirs = RankDirs(self.folder / "shm", self.folder / "data", "journal-of-this-node")
        self.arenas = Arenas(
            self.dirs,
            lambda *said: self.provided.append(said),
            lambda *said: self.told.append(said),
            self.tasks.begin,
            lambda _: self.free,
        )

    def claim(self, *of: RankId) -> None:
        for rank in of:
            self.dirs.rank_dir(rank).mkdir(parents=True, exist_ok=True)
        self.arenas.claim(of)

    def run(self, act: Callable[[], None]) -> None:
        """Do it and wait for what it began."""

        async def turn() -> None:
            async with asyncio.TaskGroup() as group:
                self.tasks.group = group
                act()

        asyncio.run(turn())

    def provide(self, of: RankId, size_bytes: int = SIZE) -> None:
        self.run(lambda: self.arenas.provide(of, size_bytes))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    (tmp_path / "data").mkdir()
    return Node(tmp_path)


def test_both_slots_are_allocated_and_found_through_the_rank_folder(node: Node) -> None:
    zero, one = ranks()
    node.claim(zero, one)
    node.provide(zero)
    assert node.provided == [(zero, 0, SIZE)] and not node.told
    for slot in (0, 1):
        path = node.dirs.rank_dir(zero) / f"slot{slot}"
        assert path.stat().st_size == SIZE
        assert path.stat().st_blocks * 512 >= SIZE, "no hole is left to be filled in the trainer's time"
        assert not (node.dirs.rank_dir(one) / f"slot{slot}").exists()


def test_slots_in_memory_are_mapped_for_the_agent_until_their_job_leaves(node: Node) -> None:
    (zero,) = ranks(1, 0)
    node.claim(zero)
    node.provide(zero)
    slot = node.dirs.rank_dir(zero) / "slot1"
    slot.write_bytes(b"staged".ljust(SIZE))
    found = node.arenas.mapped(zero, 1, SIZE)
    assert found is not None and found.page[:6] == b"staged" and found.inode == slot.stat().st_ino
    assert node.arenas.mapped(zero, 1, SIZE + 1) is None, "it has grown since"
    node.arenas.remove(JOB)
    assert node.arenas.mapped(zero, 1, SIZE) is None


def test_without_a_committed_state_the_slots_take_turns(node: Node) -> None:
    (zero,) = ranks(1, 0)
    node.claim(zero)
    assert [node.arenas.choose(zero, 0) for _ in range(4)] == [0, 1, 0, 1]


def test_the_slot_of_the_newest_committed_state_is_never_given_away(node: Node) -> None:
    (zero,) = ranks(1, 0)
    node.claim(zero)
    assert node.arenas.choose(zero, 0) == 0
    node.arenas.keep(zero, 0, kept(1))
    assert node.arenas.choose(zero, 1) == 1
    node.arenas.keep(zero, 1, kept(2))
    assert [node.arenas.choose(zero, 2) for _ in range(3)] == [0, 0, 0], "aborted ones are written over"
    assert node.arenas.choose(zero, 2) == 0


def test_a_later_generation_and_a_restarted_agent_know_what_is_kept(node: Node) -> None:
    (zero,) = ranks(1, 0)
    node.claim(zero)
    node.provide(zero)
    node.arenas.choose(zero, 0)
    node.arenas.keep(zero, 0, kept(1))
    slot = node.dirs.rank_dir(zero) / "slot0"
    slot.write_bytes(b"committed")
    node.dirs.remove(JOB, Generation(1))

    (next_zero,) = ranks(2, 0)
    again = Node(node.folder)  # another agent process, the same folders
    again.claim(next_zero)
    assert again.arenas.choose(next_zero, 1) == 1
    assert (again.dirs.rank_dir(next_zero) / "slot0").read_bytes() == b"committed"


def test_a_slot_that_is_given_away_is_no_longer_recorded(node: Node) -> None:
    (zero,) = ranks(1, 0)
    node.claim(zero)
    node.arenas.choose(zero, 0)
    node.arenas.keep(zero, 0, kept(1))
    assert (node.dirs.arena(JOB) / "rank0" / "slot0.json").exists()
    assert node.arenas.choose(zero, 0) == 1
    assert node.arenas.choose(zero, 0) == 0
    assert not (node.dirs.arena(JOB) / "rank0" / "slot0.json").exists()


def test_too_little_memory_is_told_with_figures_and_files_are_used_instead(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    node = Node(tmp_path, free=Free(size_bytes=3 * SIZE, where="the control group /small"))
    zero, one = ranks()
    node.claim(zero, one)
    node.provide(zero)
    node.provide(one)
    assert node.provided == [(zero, 2, SIZE), (one, 2, SIZE)]
    assert [of for of, _ in node.told] == [zero, one], "each rank's log says it, once"
    text = node.told[0][1]
    assert "need 4 MiB more, and the control group /small has 3 MiB" in text and "/dev/shm" in text
    assert not list(node.dirs.arena(JOB).rglob("slot*"))
    assert (node.dirs.rank_dir(one) / "slot3").stat().st_size == SIZE
    assert node.arenas.choose(zero, 0) == 2
    assert node.arenas.choose(zero, 0) == 3
    again = Node(node.folder)
    again.arenas.take_back((zero, one))
    assert again.arenas.choose(zero, 0) == 2, "a restarted agent knows where the slots are"


def test_what_is_already_there_is_not_asked_for_again(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    node = Node(tmp_path)
    (zero,) = ranks(1, 0)
    node.claim(zero)
    node.provide(zero)
    node.free = Free(size_bytes=SIZE, where="a full memory")
    node.claim(*ranks(2, 0))
    node.provide(ranks(2, 0)[0], SIZE + 1000)
    assert node.provided[-1] == (ranks(2, 0)[0], 0, SIZE + 1000)


def test_a_size_that_no_disk_has_is_told_once_with_figures(node: Node) -> None:
    (zero,) = ranks(1, 0)
    node.claim(zero)
    for _ in range(3):
        node.provide(zero, (1 << 63) - 1)
        node.arenas.choose(zero, 0)
    failures = [text for _, text in node.told if "could not be allocated" in text]
    assert len(failures) == 1 and not node.provided
    assert "MiB more are needed" in failures[0] and str(node.dirs.arena_in_files(JOB)) in failures[0]


def test_what_was_refused_is_tried_again_at_the_next_checkpoint_and_not_before(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    (zero,) = ranks(1, 0)
    node.claim(zero)
    allocate, tries = arenas._allocate, list[int]()

    def full_at_first(paths: list[Path], needed_bytes: int, stop: threading.Event) -> bool:
        tries.append(needed_bytes)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, "no room")
        return allocate(paths, needed_bytes, stop)

    monkeypatch.setattr(arenas, "_allocate", full_at_first)
    for _ in range(3):  # the mailbox is looked at many times a second
        node.provide(zero)
    assert len(tries) == 1 and not node.provided
    node.arenas.choose(zero, 0)
    node.provide(zero)
    assert node.provided == [(zero, 0, SIZE)]
    assert [text.rpartition(" ")[2] for _, text in node.told] == ["for.", "now"], "the log says how it went on"


def test_ranks_that_are_elsewhere_now_give_their_memory_back(node: Node) -> None:
    node.claim(*ranks(1, 0, 1))
    node.provide(ranks(1, 0, 1)[0])
    node.provide(ranks(1, 0, 1)[1])
    node.claim(*ranks(2, 1))
    assert (node.dirs.arena(JOB) / "rank0" / "slot0").exists(), "the new generation may start from it"
    node.provide(ranks(2, 1)[0])
    assert [path.name for path in node.dirs.arena(JOB).iterdir()] == ["rank1"]


def test_an_arena_between_two_generations_waits_and_then_goes(node: Node) -> None:
    (zero,) = ranks(1, 0)
    node.claim(zero)
    node.arenas.rest(JOB, Generation(1), now=10.0)
    node.arenas.expire(10.0 + KEEP_S)
    assert node.dirs.arena(JOB).exists()
    node.claim(*ranks(2, 0))
    node.arenas.rest(JOB, Generation(1), now=20.0)  # late word of the older one
    node.arenas.expire(1e9)
    assert node.dirs.arena(JOB).exists()
    node.arenas.rest(JOB, Generation(2), now=30.0)
    node.arenas.expire(31.0 + KEEP_S)
    assert not (node.dirs.root / "arenas").exists()


def test_a_removed_arena_leaves_nothing_and_a_sweep_only_what_is_known(node: Node) -> None:
    node.claim(*ranks(1, 0))
    node.provide(ranks(1, 0)[0])
    other = RankId(job=JobName("other"), generation=Generation(3), rank=0)
    node.claim(other)
    node.dirs.sweep([(other.job, other.generation)])
    assert not node.dirs.arena(JOB).exists() and node.dirs.arena(other.job).exists()
    node.arenas.remove(other.job)
    node.arenas.close()
    assert not (node.dirs.root / "arenas").exists()


def test_a_job_named_like_another_ones_generation_has_an_arena_of_its_own(node: Node) -> None:
    odd = RankId(job=JobName("digits.g1"), generation=Generation(1), rank=0)
    node.claim(*ranks(1, 0))
    node.claim(odd)
    node.dirs.remove(JOB, Generation(1))
    assert node.dirs.arena(odd.job).exists()


def test_others_give_memory_back_before_there_is_said_to_be_too_little(node: Node) -> None:
    (zero,) = ranks(1, 0)
    node.claim(zero)
    node.free = Free(size_bytes=0, where="this test")
    asked: list[int] = []

    def make_room(needed_bytes: int) -> None:
        asked.append(needed_bytes)
        node.free = PLENTY

    node.arenas = Arenas(
        node.dirs, lambda *said: node.provided.append(said), lambda *said: node.told.append(said),
        node.tasks.begin, lambda _: node.free, make_room,
    )  # fmt: skip
    node.arenas.claim((zero,))
    node.provide(zero)
    assert asked == [2 * SIZE]
    assert node.provided == [(zero, 0, SIZE)] and not node.told


def test_a_record_that_finds_no_room_costs_a_restore_from_memory_and_nothing_else(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    (of,) = ranks(1, 0)
    node.claim(of)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arenas, "write_whole", full)
    node.arenas.keep(of, 1, kept(1))
