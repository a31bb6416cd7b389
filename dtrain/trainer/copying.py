"""Copying a rank's tensors to where their shard lies: the only thing that training waits for.

A copy of many tensors should cost what one copy of as many bytes costs. So:

- plain tensors go by ``memmove``, which releases the GIL and knows nothing of tensors; only what is strided,
  conjugated or on a GPU goes through torch;
- a few threads (as many as torch computes with, which now stand still) take the next piece whenever they are free,
  so that a thread whose core is busy elsewhere holds nobody up;
- small tensors are taken many at a time, large ones in parts.

Pieces smaller than the C library's threshold for non-temporal stores would be read into the cache before they are
written over, which costs half the speed: the worker lowers that threshold in its trainers' environment.
"""

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from dtrain.storage.tensor_codes import CODE_OF_DTYPE, size_bytes, view_bytes

PIECE_BYTES = 8 * 1024 * 1024  # taken at a time: many pieces a thread, and the price of taking one is not seen
THREAD_MIN_BYTES = 4 * 1024 * 1024  # less for each thread is sooner copied by one than spread over more
THREADS_MAX = 16  # a few cores fill any memory's bandwidth

Span = tuple[int, int, int]  # target address, source address, bytes


class Copier:
    """Copies, with threads that it keeps. For one thread at a time."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pool_threads = 0

    def warm_up(self) -> None:
        """Start the threads, so that the first copy need not."""
        helpers = min(torch.get_num_threads(), THREADS_MAX) - 1
        if helpers > 0:
            pool = self._helpers(helpers)
            for started in [pool.submit(int) for _ in range(helpers)]:
                started.result()

    def copy(self, spans: Sequence[Span]) -> None:
        """Copy every span; return when all of them are there."""
        total_bytes = sum(span[2] for span in spans)
        threads = min(torch.get_num_threads(), THREADS_MAX, max(1, total_bytes // THREAD_MIN_BYTES))
        if threads == 1:
            _copy_all(iter([spans]))
            return
        pieces = iter(_pieces(spans))  # shared: taking the next one of a list is one step under the GIL
        helping = [self._helpers(threads - 1).submit(_copy_all, pieces) for _ in range(threads - 1)]
        _copy_all(pieces)
        for helper in helping:
            helper.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _helpers(self, count: int) -> ThreadPoolExecutor:
        if self._pool is None or self._pool_threads < count:
            self.close()
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="dtrain-copy")
            self._pool_threads = count
        return self._pool


def copy_tensors(
    copier: Copier, tensors: dict[str, torch.Tensor], starts: dict[str, int], target: memoryview, *, pinned: bool
) -> None:
    """Copy each tensor's elements, dense and in order, to its start in ``target`` (writable memory).

    ``pinned``: CUDA knows the target's pages, so that its copies need no detour.
    """
    anchor = ctypes.c_char.from_buffer(target)  # holds the memory for as long as its address is in use
    base = ctypes.addressof(anchor)
    spans: list[Span] = []
    on_gpu: list[str] = []
    for name, tensor in tensors.items():
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
            if length := size_bytes(tensor):
                spans.append((base + starts[name], tensor.data_ptr(), length))
        elif tensor.is_cuda:
            on_gpu.append(name)
        elif tensor.numel():
            with torch.no_grad():
                _view(target, starts[name], tensor).copy_(tensor)
    arriving = _begin_from_gpus({name: tensors[name] for name in on_gpu}, starts, target, pinned=pinned)
    copier.copy(spans)
    for stream in arriving:
        stream.synchronize()
    del anchor


def _begin_from_gpus(
    tensors: dict[str, torch.Tensor], starts: dict[str, int], target: memoryview, *, pinned: bool
) -> list[torch.cuda.Stream]:
    """Begin the copies from each GPU on a stream of their own. Wait for them by each one's synchronize().

    A stream starts after what the training stream was given so far, so the values are those of this step; and it is
    waited for before training goes on, so no later step can change them.
    """
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        device = tensor.device
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            streams[device].wait_stream(torch.cuda.current_stream(device))
        with torch.no_grad(), torch.cuda.stream(streams[device]):
            _view(target, starts[name], tensor).copy_(tensor, non_blocking=pinned)
    return list(streams.values())


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
