"""The arena: the stage slots of a rank, as this trainer sees them.

The slots are files that belong to the worker and outlive this process: a pair in shared memory, or, where that is
too small, a pair in files; the worker says which. Writing into pages that
nobody touched before is up to twenty times slower than a copy, so nothing of that may happen while training stands
still. Two threads share the work:

- the *training* thread takes a slot's memory and writes into it (``reserve``);
- the *preparing* thread, begun at the first step boundary, says how many bytes a slot needs, waits until the worker
  has allocated them, maps both slots and fills in this process's page tables.

A checkpoint that is asked for before that is over is not refused: the training thread then allocates and maps what
it needs by itself, and pays for it once. Space is always allocated before it is mapped: writing into a hole of a
full shared memory would kill the process with SIGBUS, where an allocation fails with an error. And memory is looked at
before it is taken, as the worker does: beyond what a control group has, the kernel kills without a word.

A map is never closed, only let go of: whoever still uses its memory keeps it alive. One that CUDA knows is let go of
by the training thread, between two stagings, and only after CUDA has forgotten it: memory that is freed while it is
registered may be given to another tensor, whose copies would then go to pages that are no longer its own.
"""

import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dtrain.common.mailbox import PAIR_SLOTS, STAGE_SLOTS, Mailbox
from dtrain.storage.free_memory import Free, free_for
from dtrain.trainer.copying import Copier

_log = logging.getLogger("dtrain")

# A slot is asked for with this much more than the tensors take: the header, and what a state grows by. Growing a
# slot while training stands still costs more than it holds.
SPARE_BYTES = 1024 * 1024
SPARE_DIVISOR = 64  # and one part in 64 of the state
POPULATE_BYTES = 16 * 1024 * 1024  # mapped at a time: other threads' memory calls wait for one such part at most
WAIT_FIRST_S = 0.005  # between two looks at the worker's answer; doubles
WAIT_MAX_S = 0.5
WAITS_MAX = 400  # some three minutes: a worker that has not answered by then never will
NICENESS = 15  # of the preparing thread
_MADV_POPULATE_WRITE = 23  # linux/mman.h, since Linux 5.14; older kernels refuse it, and the first copy is slower
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMemory:
    """One slot, mapped."""

    pages: mmap.mmap
    pinned: bool  # CUDA knows these pages


class StageSlots:
    """All slots. ``map_pair`` is for the preparing thread, all else for the training one."""

    def __init__(self, folder: Path, free: Callable[[Path], Free] = free_for) -> None:
        self._free = free
        self._paths = [folder / f"slot{number}" for number in range(STAGE_SLOTS)]
        self._lock = threading.Lock()  # guards what follows
        self._memories: list[SlotMemory | None] = [None] * STAGE_SLOTS
        self._replaced: list[SlotMemory] = []  # known to CUDA until release(): bytes may be on their way there
        self._last_staged = PAIR_SLOTS - 1  # so that the first goes to slot 0

    def choose(self, asked: int | None) -> int:
        """Return the slot for the next state: the one asked for, else the one not staged into last."""
        return asked if asked is not None else (self._last_staged + 1) % PAIR_SLOTS

    def reserve(self, number: int, needed_bytes: int) -> SlotMemory:
        """Return the slot's memory, all of it allocated. Raises OSError if there is no room."""
        memory = self._memories[number]
        if memory is None or len(memory.pages) < needed_bytes:
            if number < PAIR_SLOTS:
                _check_free(self._paths[number], needed_bytes, self._free)
            pages = _map_allocated(self._paths[number], needed_bytes, with_spare(needed_bytes))
            memory = SlotMemory(pages=pages, pinned=False)
            self._replace(number, memory)
        return memory

    def release(self) -> None:
        """Let go of memory that was replaced. Nothing is on its way from a GPU now."""
        with self._lock:
            replaced, self._replaced = self._replaced, []
        for memory in replaced:
            _unpin(memory.pages)

    def staged(self, number: int) -> None:
        """Say that the slot holds a whole state."""
        self._last_staged = number

    def map_pair(self, first: int, size_bytes: int, stop: threading.Event) -> None:
        """Map what the worker has allocated, ``size_bytes`` a slot, and fill in the page tables. Raises OSError."""
        for number in range(first, first + PAIR_SLOTS):
            memory = self._memories[number]
            if memory is None or len(memory.pages) < size_bytes:
                pages = _map_allocated(self._paths[number], size_bytes)
            elif not memory.pinned and _can_pin():  # the training thread needed it before this one came to it
                pages = memory.pages
            else:
                continue
            _populate(pages, stop)
            if stop.is_set():
                return
            # Only now: until then the training thread had better map a slot by itself than wait for this one.
            self._offer(number, SlotMemory(pages=pages, pinned=_pin(pages)))

    def let_go(self) -> None:
        """Forget the maps. The files stay: the worker may still be reading them."""
        for number in range(STAGE_SLOTS):
            self._replace(number, None)
        self.release()

    def _offer(self, number: int, memory: SlotMemory) -> None:
        """Replace the slot's memory, unless the training thread has mapped more of it by now."""
        with self._lock:
            now = self._memories[number]
            if now is not None and len(now.pages) > len(memory.pages):
                self._retire(memory)
                return
            self._memories[number] = memory
            self._retire(now)

    def _replace(self, number: int, memory: SlotMemory | None) -> None:
        with self._lock:
            before, self._memories[number] = self._memories[number], memory
            self._retire(before)

    def _retire(self, memory: SlotMemory | None) -> None:
        """Have CUDA forget it at the next release(). For whoever has the lock."""
        if memory is not None and memory.pinned:
            self._replaced.append(memory)


class ArenaPreparation:
    """The preparing thread. ``look`` and ``want`` are for the training thread, and cost it microseconds."""

    def __init__(self, slots: StageSlots, mailbox: Mailbox, copier: Copier) -> None:
        self._slots = slots
        self._mailbox = mailbox
        self._copier = copier
        self._wanted = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._gpu: int | None = None  # the training thread's, if it uses one
        self._needed_bytes = 0  # of one slot; set before _wanted
        self._mapped_bytes = 0  # of one slot, once both are mapped; set by the thread

    def begin(self, estimate: Callable[[], int]) -> None:
        """Start the thread. It sleeps until :meth:`look`, then asks ``estimate`` how large the state is."""
        self._thread = threading.Thread(target=self._run, args=(estimate,), name="dtrain-arena", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """The state has its lasting size, the first step being over; or a checkpoint failed for want of a slot."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._gpu = torch.cuda.current_device()
        self._wanted.set()

    def want(self, needed_bytes: int) -> None:
        """A shard of this size was staged: both slots should have room for it.

        What a worker could not give before is asked for again, for the room may be there by now.
        """
        if needed_bytes > self._needed_bytes:
            self._needed_bytes = with_spare(needed_bytes)
        if self._mapped_bytes < self._needed_bytes:
            self._wanted.set()

    def close(self) -> None:
        self._stop.set()
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, estimate: Callable[[], int]) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._stop.is_set():
                return
            try:
                self._prepare(estimate)
            except (OSError, RuntimeError) as error:  # RuntimeError: what is measured was changed meanwhile
                _log.info("the stage slots were not prepared (%s): the next checkpoint takes a little longer", error)

    def _prepare(self, estimate: Callable[[], int]) -> None:
        if not self._needed_bytes:
            self._copier.warm_up()
            self._needed_bytes = with_spare(estimate())
        needed_bytes = self._needed_bytes
        mailbox = self._mailbox
        mailbox.needed_bytes = needed_bytes
        wait_s = WAIT_FIRST_S
        for _ in range(WAITS_MAX):
            first, size_bytes = mailbox.slots
            if size_bytes >= needed_bytes:
                _give_way()  # not before: a thread that gave way while it held the GIL would hold training up
                if self._gpu is not None:  # a new thread has the first: using that would take memory of a peer's
                    torch.cuda.set_device(self._gpu)
                self._slots.map_pair(first, size_bytes, self._stop)
                self._mapped_bytes = size_bytes
                return
            if self._stop.wait(wait_s):
                return
            wait_s = min(wait_s * 2, WAIT_MAX_S)


def with_spare(size_bytes: int) -> int:
    """Return the size of a slot for a state of ``size_bytes``."""
    return size_bytes + size_bytes // SPARE_DIVISOR + SPARE_BYTES


def _check_free(path: Path, needed_bytes: int, free: Callable[[Path], Free]) -> None:
    """Raise OSError if the file would take more memory than there is. The worker will find slots in files then."""
    has_bytes = path.stat().st_size if path.exists() else 0
    if has_bytes >= needed_bytes:
        return
    bound = free(path.resolve().parent)
    if needed_bytes - has_bytes > bound.size_bytes:
        raise OSError(
            errno.ENOMEM,
            f"a stage slot needs {needed_bytes - has_bytes} bytes more, and {bound.where} has {bound.size_bytes}",
        )


def _map_allocated(path: Path, needed_bytes: int, grown_bytes: int = 0) -> mmap.mmap:
    """Map the whole file if it is large enough; else make it so, with ``grown_bytes`` if those are more."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size_bytes = os.fstat(file).st_size
        if size_bytes < needed_bytes:  # a file of this size has no holes: only allocations make it larger
            size_bytes = max(needed_bytes, grown_bytes)
            os.posix_fallocate(file, 0, size_bytes)
        return mmap.mmap(file, size_bytes)
    finally:
        os.close(file)


def _give_way() -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError as error:
        _log.debug("this thread cannot be made less urgent: %s", error)


def _populate(pages: mmap.mmap, stop: threading.Event) -> None:
    """Fill in this process's page tables for the whole map. The GIL is free meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    anchor = ctypes.c_char.from_buffer(pages)
    start = ctypes.addressof(anchor)
    for at in range(0, len(pages), POPULATE_BYTES):
        length = min(POPULATE_BYTES, len(pages) - at)
        if stop.is_set() or libc.madvise(ctypes.c_void_p(start + at), ctypes.c_size_t(length), _MADV_POPULATE_WRITE):
            return


def _can_pin() -> bool:
    """Whether CUDA is in use."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _pin(pages: mmap.mmap) -> bool:
    """Let CUDA copy straight into these pages, if CUDA is in use. Return whether it can."""
    if not _can_pin():
        return False
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    return int(torch.cuda.cudart().cudaHostRegister(address, len(pages), _PORTABLE)) == 0  # type: ignore[no-untyped-call]


def _unpin(pages: mmap.mmap) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
