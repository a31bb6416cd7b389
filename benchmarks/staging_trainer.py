"""The training script that staging.py times: a state of many tensors, and steps that compute something else.

When the file named first appears it ends, and writes what it saw into the file named second: its steps, and what one
large memcpy of the same bytes costs in this process, with as many threads.
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

MEMCPY_ROUNDS = 7
MATRIX = 700  # a step of some milliseconds


class Batches:
    """Data without end."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


def memcpy_s(size_bytes: int, threads: int) -> list[float]:
    """Seconds that one large memcpy takes, split over ``threads``; every page was touched before."""
    source, target = mmap.mmap(-1, size_bytes), mmap.mmap(-1, size_bytes)
    here, there = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (source, target))
    part = size_bytes // threads
    ctypes.memset(here, 1, size_bytes)
    ctypes.memset(there, 1, size_bytes)
    seconds = []
    for _ in range(MEMCPY_ROUNDS):
        began = time.perf_counter()
        helpers = [
            threading.Thread(target=ctypes.memmove, args=(there + part * n, here + part * n, part))
            for n in range(1, threads)
        ]
        for helper in helpers:
            helper.start()
        ctypes.memmove(there, here, part)
        for helper in helpers:
            helper.join()
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    end, result, mib, tensors, threads = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6])
    torch.set_num_threads(threads)
    elements = mib * 1024 * 1024 // 4 // tensors
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(elements)) for _ in range(tensors)])
    matrix = torch.rand(MATRIX, MATRIX)
    steps: list[tuple[float, float]] = []  # when each ended (monotonic), and how long it took
    with dtrain.join() as run:
        run.track(model=model)
        for _ in run.steps(Batches(), until=1 << 39):
            began = time.monotonic()
            matrix @ matrix
            steps.append((time.monotonic(), time.monotonic() - began))
            if end.exists():
                break
    result.write_text(json.dumps({"steps": steps, "memcpy_s": memcpy_s(elements * 4 * tensors, threads)}))


if __name__ == "__main__":
    main()
