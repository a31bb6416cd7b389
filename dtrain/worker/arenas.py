"""The arenas: the stage slots of every rank on this node, which belong to the agent and outlive its trainers.

``<root>/arenas/<job>/rank<rank>/slot{0,1}`` in shared memory, or ``<data folder>/arenas/<job>/rank<rank>/slot{2,3}``,
found by a trainer through links in its rank folder. Always a pair, so that one can be staged into while the other is
uploaded; and beside each a record of what it holds once storage has confirmed it, so that a later generation can
start from memory.

Rules:
- the slot that holds the newest committed state is never given to a trainer to write into;
- a record is removed before its slot is given away, and written before the shard is acknowledged: what a record says
  is true, and a committed checkpoint that was staged here has one;
- memory is allocated by one thread of low priority, after a look at how much there is. Too little makes files in the
  data folder of it, and says so: slower, but no process is killed for want of memory;
- an arena goes when its job leaves the node; one whose job is between two generations waits KEEP_S for the next.

The agent reads a slot through a map that is made with it and kept as long: filling in the page tables of a large file
takes as long as copying it, and would otherwise come before every upload.

A thread that has lost its agent's interest stops at the next part; the memory is freed by a thread too, because
giving back a large file in shared memory takes time.
"""

import asyncio
import contextlib
import errno
import logging
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dtrain.common.mailbox import PAIR_SLOTS, STAGE_SLOTS
from dtrain.common.names import Generation, JobName
from dtrain.storage.free_memory import Free, free_for
from dtrain.worker.low_priority import yielding_threads
from dtrain.worker.rank_dirs import ARENAS, RankDirs, RankId, write_whole
from dtrain.worker.tasks import Begin

logger = logging.getLogger(__name__)

KEEP_S = 600.0  # for a job between two generations: longer than it takes to bring a node back, not for ever
BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system
PART_BYTES = 256 * 1024 * 1024  # allocated at a time: how long the thread can be deaf


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """``slot<n>.json``: what lies whole in the slot, and in storage."""

    attempt: int
    step: int
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class SlotMap:
    """A slot as memory."""

    page: mmap.mmap
    inode: int  # of the file that is mapped, whatever its name leads to now


@dataclass(slots=True)
class _Job:
    """What the agent's shell knows of one job's arena."""

    generation: Generation  # the newest that claimed it
    ranks: tuple[RankId, ...]  # of that generation, on this node
    in_files: bool = False  # the slots are files in the data folder, for want of memory
    idle_since: float | None = None  # when the last generation ended; None while one may live


class Arenas:
    """All arenas of the agent. Used in the event loop only; its thread touches nothing but the files."""

    def __init__(
        self,
        dirs: RankDirs,
        provided: Callable[[RankId, int, int], None],
        tell: Callable[[RankId, str], None],
        begin: Begin,
        free: Callable[[Path], Free] = free_for,
        make_room: Callable[[int], None] = lambda needed_bytes: None,
    ) -> None:
        """``make_room``: has others give memory back if there is not as much; called in a thread, may block."""
        self._dirs = dirs
        self._provided = provided
        self._tell = tell
        self._begin = begin
        self._free = free
        self._make_room = make_room
        self._jobs: dict[JobName, _Job] = {}
        self._asked: dict[tuple[JobName, int], int] = {}  # the slot that each rank was asked to stage into last
        self._maps: dict[Path, SlotMap] = {}  # of slots in shared memory, for reading
        self._providing: set[RankId] = set()
        # How many bytes could not be had. Not tried again for as many until the rank's next checkpoint.
        self._refused: dict[RankId, int] = {}
        self._complained: set[RankId] = set()  # whose log says that they could not be had
        self._stop = threading.Event()
        self._threads = yielding_threads("arena", 1)  # one: the second rank's look at memory sees the first's share

    def claim(self, ranks: tuple[RankId, ...]) -> None:
        """Make the arenas that a generation's ranks on this node stage into, and link them. Raises OSError."""
        self.take_back(ranks)
        for of in ranks:
            (self._dirs.arena(of.job) / f"rank{of.rank}").mkdir(mode=0o700, parents=True, exist_ok=True)
            for slot in range(STAGE_SLOTS):
                with contextlib.suppress(FileExistsError):
                    (self._dirs.rank_dir(of) / f"slot{slot}").symlink_to(self._path(of, slot))

    def take_back(self, ranks: tuple[RankId, ...]) -> None:
        """Know what a generation's ranks claimed, also before the agent's restart."""
        if ranks:
            in_files = self._dirs.arena_in_files(ranks[0].job).is_dir()
            self._jobs[ranks[0].job] = _Job(generation=ranks[0].generation, ranks=ranks, in_files=in_files)

    def provide(self, of: RankId, needed_bytes: int) -> None:
        """Allocate a pair of slots, in a thread; ``provided`` is called when they are there."""
        if of in self._providing or of.job not in self._jobs or self._refused.get(of) == needed_bytes:
            return
        self._providing.add(of)
        self._begin(self._provide(of, needed_bytes))

    def choose(self, of: RankId, committed_attempt: int) -> int:
        """Return the slot for the next state, and forget what it held. Memory that was refused may be there by now."""
        self._refused.pop(of, None)
        known = self._jobs.get(of.job)
        first = PAIR_SLOTS if known is not None and known.in_files else 0
        pair = range(first, first + PAIR_SLOTS)
        holding = [slot for slot in pair if self._attempt_in(of, slot) == committed_attempt != 0]
        last = holding[0] if holding else self._asked.get((of.job, of.rank), pair[-1])
        slot = first + (last - first + 1) % PAIR_SLOTS
        self._asked[(of.job, of.rank)] = slot
        self._record(of, slot).unlink(missing_ok=True)
        return slot

    def keep(self, of: RankId, slot: int, kept: Kept) -> None:
        """Record what storage has confirmed of the slot. Without a record, a restore reads it from storage."""
        try:
            write_whole(self._record(of, slot), msgspec.json.encode(kept))
        except FileNotFoundError:
            pass  # the job left meanwhile
        except OSError as error:  # shared memory is full: of DataLoader's workers, or of anybody
            logger.warning("%s: what rank %d staged cannot serve a restore: %s", of.job, of.rank, error)

    def mapped(self, of: RankId, slot: int, size_bytes: int) -> SlotMap | None:
        """Return the slot's map, if there is one of so many bytes; an agent that was restarted has none yet."""
        found = self._maps.get(self._path(of, slot))
        return found if found is not None and len(found.page) >= size_bytes else None

    def rest(self, job: JobName, generation: Generation, now: float) -> None:
        """The generation is over: its arena waits for the next, unless that has come already."""
        known = self._jobs.get(job)
        if known is not None and known.generation <= generation:
            known.idle_since = now

    def expire(self, now: float) -> list[JobName]:
        """Remove what has waited long enough; return whose it was."""
        waiting = {job: known.idle_since for job, known in self._jobs.items() if known.idle_since is not None}
        expired = [job for job, idle_since in waiting.items() if now - idle_since > KEEP_S]
        for job in expired:
            logger.info("gave the staged bytes of %s back: no generation came within %.0f s", job, KEEP_S)
            self.remove(job)
        return expired

    def remove(self, job: JobName) -> None:
        """The job has left this node."""
        self._jobs.pop(job, None)
        for key in [key for key in self._asked if key[0] == job]:
            del self._asked[key]
        self._refused = {of: size for of, size in self._refused.items() if of.job != job}
        self._complained = {of for of in self._complained if of.job != job}
        self._remove([self._dirs.arena(job), self._dirs.arena_in_files(job)])

    def remove_all(self) -> None:
        for job in list(self._jobs):
            self.remove(job)

    def close(self) -> None:
        self._stop.set()
        self._threads.shutdown()

    # ---- allocating --------------------------------------------------------------------------------------

    async def _provide(self, of: RankId, needed_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            known = self._jobs.get(of.job)
            if known is None or known.generation != of.generation:
                return
            self._forget_other_ranks(known)
            if not known.in_files:
                slots = [self._path(rank, slot) for rank in known.ranks for slot in range(PAIR_SLOTS)]
                missing_bytes = _missing_bytes(slots, needed_bytes)
                await loop.run_in_executor(self._threads, self._make_room, missing_bytes)
                free = await loop.run_in_executor(self._threads, self._free, self._dirs.root)
                if missing_bytes > free.size_bytes and not known.in_files:
                    known.in_files = True
                    self._say_too_little(known, needed_bytes, missing_bytes, free)
            first = PAIR_SLOTS if known.in_files else 0
            paths = [self._path(of, slot) for slot in range(first, first + PAIR_SLOTS)]
            done = await loop.run_in_executor(self._threads, _allocate, paths, needed_bytes, self._stop)
            if done and self._jobs.get(of.job) is known:
                self._provided(of, first, needed_bytes)
                if not known.in_files:
                    await self._map(known, paths)
                if of in self._complained:
                    self._complained.discard(of)
                    self._say(of, f"the stage slots of rank {of.rank} are allocated now")
        except OSError as error:
            self._refused[of] = needed_bytes
            if of not in self._complained:
                self._complained.add(of)
                self._say(
                    of,
                    f"the stage slots of rank {of.rank}, {PAIR_SLOTS} of {_mib(needed_bytes)}, could not be allocated: "
                    f"{error}. Training goes on, without checkpoints for as long as there is no room; "
                    "it is tried again whenever one is asked for.",
                )
        finally:
            self._providing.discard(of)

    def _say(self, of: RankId, text: str) -> None:
        logger.warning("%s: %s", of.job, text)
        self._tell(of, text)

    def _say_too_little(self, known: _Job, needed_bytes: int, missing_bytes: int, free: Free) -> None:
        text = (
            f"not enough shared memory for checkpoints: {PAIR_SLOTS} slots of {_mib(needed_bytes)} for each of "
            f"{len(known.ranks)} ranks on this node need {_mib(missing_bytes)} more, and {free.where} has "
            f"{_mib(free.size_bytes)}. Files in {self._dirs.arena_in_files(known.ranks[0].job)} are used instead, "
            "which holds training up for longer at each checkpoint. "
            "Give the node (or its container) more memory or a larger /dev/shm, or run fewer ranks on it."
        )
        logger.warning("%s: %s", known.ranks[0].job, text)
        for of in known.ranks:
            self._tell(of, text)

    def _forget_other_ranks(self, known: _Job) -> None:
        """Give back the arenas of ranks that are elsewhere now. What they held was restored from by now."""
        here = {f"rank{of.rank}" for of in known.ranks}
        bases = (self._dirs.arena(known.ranks[0].job), self._dirs.arena_in_files(known.ranks[0].job))
        self._remove(
            [folder for base in bases if base.is_dir() for folder in base.iterdir() if folder.name not in here]
        )

    async def _map(self, known: _Job, paths: list[Path]) -> None:
        """Map what is allocated now, unless the job has left meanwhile."""
        made = await asyncio.get_running_loop().run_in_executor(self._threads, lambda: list(map(_map_slot, paths)))
        if self._jobs.get(known.ranks[0].job) is known:
            self._maps.update((path, found) for path, found in zip(paths, made, strict=True) if found is not None)

    def _remove(self, folders: list[Path]) -> None:
        """Remove the folders. What holds their memory is let go of by the thread: giving it back takes its time."""
        held: list[int] = []
        for folder in folders:
            _remove(folder, held)
        maps = [self._maps.pop(path) for path in list(self._maps) if any(map(path.is_relative_to, folders))]
        if held or maps:
            self._threads.submit(_let_go, held, maps)

    # ---- files -------------------------------------------------------------------------------------------

    def _path(self, of: RankId, slot: int) -> Path:
        base = self._dirs.arena(of.job) if slot < PAIR_SLOTS else self._dirs.arena_in_files(of.job)
        return base / f"rank{of.rank}" / f"slot{slot}"

    def _record(self, of: RankId, slot: int) -> Path:
        return self._path(of, slot).with_suffix(".json")

    def _attempt_in(self, of: RankId, slot: int) -> int:
        """The attempt that the slot holds whole and storage has; 0 for none."""
        try:
            return msgspec.json.decode(self._record(of, slot).read_bytes(), type=Kept).attempt
        except (FileNotFoundError, msgspec.DecodeError):
            return 0


def _missing_bytes(paths: Iterable[Path], needed_bytes: int) -> int:
    """What these files take beyond what they have, if each is to have ``needed_bytes``."""
    missing_bytes = 0
    for path in paths:
        try:
            has_bytes = path.stat().st_blocks * BLOCK_BYTES
        except FileNotFoundError:
            has_bytes = 0
        missing_bytes += max(0, needed_bytes - has_bytes)
    return missing_bytes


def _allocate(paths: list[Path], needed_bytes: int, stop: threading.Event) -> bool:
    """In a thread: give the files their space. Return False if it was told to stop.

    Raises OSError, before anything is taken, if the file system has too little: filling a disk harms all its users.
    """
    folder = paths[0].parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stats = os.statvfs(folder)
    missing_bytes, free_bytes = _missing_bytes(paths, needed_bytes), stats.f_bavail * stats.f_frsize
    if missing_bytes > free_bytes:
        raise OSError(errno.ENOSPC, f"{_mib(missing_bytes)} more are needed, {_mib(free_bytes)} are free", str(folder))
    for path in paths:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for start in range(0, needed_bytes, PART_BYTES):
                if stop.is_set():
                    return False
                os.posix_fallocate(file, start, min(PART_BYTES, needed_bytes - start))
        finally:
            os.close(file)
    return True


def _remove(folder: Path, held: list[int]) -> None:
    """Remove the folder, and its parent if nothing is left there. Descriptors of its slots are added to ``held``."""
    for path in folder.rglob("slot?"):
        with contextlib.suppress(OSError):
            held.append(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.name == ARENAS:
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def _map_slot(path: Path) -> SlotMap | None:
    """Map the whole slot for reading, with all its page tables at once; None if it is gone or empty."""
    try:
        with path.open("rb") as file:
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            page = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
            return SlotMap(page, os.fstat(file.fileno()).st_ino)
    except (OSError, ValueError):
        return None


def _let_go(held: list[int], maps: list[SlotMap]) -> None:
    """In a thread: give memory back. An upload that still reads a map keeps it."""
    for file in held:
        os.close(file)
    maps.clear()


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.0f} MiB"
