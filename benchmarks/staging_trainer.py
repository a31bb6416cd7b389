"""The training script that staging.py times: a state of many tensors, and steps that compute something else.

Between its steps it measures what one large memcpy of the same bytes costs in this process, with as many threads.
When the file named first appears it ends, and writes what it saw into the file named second.
"""

import ctypes
import json
import mmap
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import dtrain

MEMCPY_EVERY_S = 0.5  # between two copies, all along the run: whatever else the machine does hits both alike
MATRIX = 700  # a step of some milliseconds


class Batches:
    """Data without end."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class LargeCopy:
    """One large memcpy, split over threads; every page was touched before."""

    def __init__(self, size_bytes: int, threads: int) -> None:
        self._memories = mmap.mmap(-1, size_bytes), mmap.mmap(-1, size_bytes)
        self._here, self._there = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self._memories)
        self._part, self._threads = size_bytes // threads, threads
        for address in (self._here, self._there):
            ctypes.memset(address, 1, size_bytes)

    def take_s(self) -> float:
        """Copy once; return the seconds it took."""
        began = time.perf_counter()
        here, there, part = self._here, self._there, self._part
        helpers = [
            threading.Thread(target=ctypes.memmove, args=(there + part * n, here + part * n, part))
            for n in range(1, self._threads)
        ]
        for helper in helpers:
            helper.start()
        ctypes.memmove(there, here, part)
        for helper in helpers:
            helper.join()
        return time.perf_counter() - began


def main() -> None:
    end, result, mib, tensors, threads = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6])
    torch.set_num_threads(threads)
    elements = mib * 1024 * 1024 // 4 // tensors
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(elements)) for _ in range(tensors)])
    matrix = torch.rand(MATRIX, MATRIX)
    copy = LargeCopy(elements * 4 * tensors, threads)
    memcpy_s, copied_at = [copy.take_s()], time.monotonic()
    steps: list[tuple[float, float]] = []  # when each ended (monotonic), and how long it took
    with dtrain.join() as run:
        run.track(model=model)
        for _ in run.steps(Batches(), until=1 << 39):
            began = time.monotonic()
            matrix @ matrix
            steps.append((time.monotonic(), time.monotonic() - began))
            if time.monotonic() - copied_at > MEMCPY_EVERY_S:
                memcpy_s.append(copy.take_s())
                copied_at = time.monotonic()
            if end.exists():
                break
    result.write_text(json.dumps({"steps": steps, "memcpy_s": memcpy_s}))


if __name__ == "__main__":
    main()
