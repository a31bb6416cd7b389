"""Copying a rank's tensors to where their shard lies: the only thing that training waits for.

From a GPU the copies run beside the training process: on a stream of their own, straight into pages that CUDA knows.
The training stream waits for them (an event, on the device), so that nothing it does later can change what is copied,
while Python goes on at once and gives it the next step. Not the next optimizer step alone is held back, though only
that one changes parameters as a rule: a replayed graph and an update written by hand run no hook of an optimizer, and
a torn state would be silent. Whether the bytes have arrived is asked at the next step boundary (:class:`Arriving`).

A copy of many tensors should cost what one copy of as many bytes costs. So:

- plain tensors go by ``memmove``, which releases the GIL and knows nothing of tensors; only what is strided,
  conjugated or on a GPU goes through torch;
- a few threads (as many as this rank has cores, since all that computes now stands still) take the next piece whenever
  they are free, so that a thread whose core is busy elsewhere holds nobody up;
- small tensors are taken many at a time, large ones in parts.

Pieces smaller than the C library's threshold for non-temporal stores would be read into the cache before they are
written over, which costs half the speed: the worker lowers that threshold in its trainers' environment.
"""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from dtrain.storage.tensor_codes import CODE_OF_DTYPE, view_bytes

PIECE_BYTES = 8 * 1024 * 1024  # taken at a time: many pieces a thread, and the price of taking one is not seen
THREAD_MIN_BYTES = 4 * 1024 * 1024  # less for each thread is sooner copied by one than spread over more
THREADS_MAX = 16  # a few cores fill any memory's bandwidth

Span = tuple[int, int, int]  # target address, source address, bytes


class Event(Protocol):
    """What is waited for: torch.cuda.Event."""

    def synchronize(self) -> None: ...

    def query(self) -> bool: ...  # whether it has come


class Copier:
    """Copies, with threads that it keeps. For one thread at a time; another may warm it up meanwhile."""

    def __init__(self, threads: int) -> None:
        """``threads``: how many copy at once, the caller's included; no more than THREADS_MAX."""
        self._threads = max(1, min(threads, THREADS_MAX))
        self._lock = threading.Lock()  # guards the pool's making
        self._pool: ThreadPoolExecutor | None = None

    def warm_up(self) -> None:
        """Start the threads, so that the first copy need not."""
        if self._threads > 1:
            together = threading.Barrier(self._threads)  # a pool starts no thread while another has nothing to do
            for _ in range(self._threads - 1):
                self._helpers().submit(together.wait)
            together.wait()

    def copy(self, spans: Sequence[Span]) -> None:
        """Copy every span; return when all of them are there."""
        total_bytes = sum(span[2] for span in spans)
        threads = min(self._threads, max(1, total_bytes // THREAD_MIN_BYTES))
        if threads == 1:
            _copy_all(iter([spans]))
            return
        pieces = iter(_pieces(spans))  # shared: taking the next one of a list is one step under the GIL
        helping = [self._helpers().submit(_copy_all, pieces) for _ in range(threads - 1)]
        _copy_all(pieces)
        for helper in helping:
            helper.result()

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _helpers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="dtrain-copy")
            return self._pool


class Arriving:
    """Copies from GPUs that are still on their way. What they read is kept until they are there."""

    def __init__(self, events: Sequence[Event], reading: Sequence[torch.Tensor]) -> None:
        self._events = events  # each comes when one GPU's copies are there
        self._reading = reading

    def is_there(self) -> bool:
        """Whether nothing would have to be waited for. False if a GPU failed."""
        try:
            return all(event.query() for event in self._events)
        except RuntimeError:
            return False

    def wait(self) -> None:
        """Return when all bytes are there. Raises RuntimeError if a GPU failed."""
        for event in self._events:
            event.synchronize()
        self._reading = ()


def copy_tensors(
    copier: Copier, tensors: dict[str, torch.Tensor], starts: dict[str, int], target: memoryview, *, pinned: bool
) -> Arriving | None:
    """Copy each tensor's elements, dense and in order, to its start in ``target`` (writable memory).

    ``pinned``: CUDA knows the target's pages, so that its copies need no detour and nobody waits for them here.
    Return what is still on its way; None if all is there. The target must stay where it is until then.
    """
    anchor = ctypes.c_char.from_buffer(target)  # holds the memory for as long as its address is in use
    base = ctypes.addressof(anchor)
    spans: list[Span] = []
    on_gpu: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
            if length := tensor.nbytes:
                spans.append((base + starts[name], tensor.data_ptr(), length))
        elif tensor.is_cuda:
            if tensor.numel():
                on_gpu[name] = tensor
        elif tensor.numel():
            with torch.no_grad():
                _view(target, starts[name], tensor).copy_(tensor)
    arriving = _begin_from_gpus(on_gpu, starts, target, pinned=pinned) if on_gpu else None
    copier.copy(spans)
    del anchor
    if arriving is not None and not pinned:
        arriving.wait()
        return None
    return arriving


def _begin_from_gpus(
    tensors: dict[str, torch.Tensor], starts: dict[str, int], target: memoryview, *, pinned: bool
) -> Arriving:
    """Begin the copies from each GPU on a stream of their own.

    That stream starts after what the training stream was given so far, so the values are those of this step; and the
    training stream goes on after it, so no later step can change them.
    """
    streams: dict[torch.device, torch.cuda.Stream] = {}
    reading = list(tensors.values())
    for name, tensor in tensors.items():
        device = tensor.device
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            streams[device].wait_stream(torch.cuda.current_stream(device))
        with torch.no_grad(), torch.cuda.stream(streams[device]):
            # Here, and not by copy_(): that conjugates or negates the target at once, before the bytes are there.
            plain = tensor.resolve_conj().resolve_neg()
            if plain is not tensor:
                reading.append(plain)
            _view(target, starts[name], tensor).copy_(plain, non_blocking=pinned)
    events = []
    for device, stream in streams.items():
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # whoever waits for it sleeps, and leaves the core to the others
        event.record(stream)
        torch.cuda.current_stream(device).wait_event(event)
        events.append(event)
    return Arriving(events, reading)


def _view(target: memoryview, start: int, tensor: torch.Tensor) -> torch.Tensor:
    return view_bytes(target, CODE_OF_DTYPE[tensor.dtype], tuple(tensor.shape), start)


def _pieces(spans: Sequence[Span]) -> list[list[Span]]:
    """Cut and gather ``spans`` into pieces of about PIECE_BYTES."""
    pieces: list[list[Span]] = []
    gathered: list[Span] = []
    room = PIECE_BYTES
    for target, source, length in spans:
        done = 0
        while done < length:
            part = min(room, length - done)
            gathered.append((target + done, source + done, part))
            done += part
            room -= part
            if not room:
                pieces.append(gathered)
                gathered, room = [], PIECE_BYTES
    if gathered:
        pieces.append(gathered)
    return pieces


def _copy_all(pieces: Iterator[Sequence[Span]]) -> None:
    move = ctypes.memmove
    for piece in pieces:
        for target, source, length in piece:
            move(target, source, length)
