"""The script that trains while it is checkpointed: a state of many tensors, and steps that compute something else.

Every so many steps all ranks together measure what one large memcpy of the same bytes costs, with as many threads as
dtrain copies with (a rank's share of the cores), so that whatever else the machine does meets both alike. When the
file named first appears it ends, and writes what it saw into the folder named second.
"""

import ctypes
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import dtrain
from dtrain.trainer.cores import cores_of_rank

LOOK_EVERY_STEPS = 40  # ranks agree on what to do next this often: some tenths of a second
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


def memory_bytes(field: str) -> int:
    """Return a field of /proc/self/status that is told in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def agreed(flag: bool) -> bool:
    """Return rank 0's flag, on every rank."""
    word = torch.tensor([int(flag)])
    dist.broadcast(word, 0)
    return bool(word.item())


def main() -> None:
    end, folder, mib, tensors, threads, copies = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:7])
    torch.set_num_threads(threads)
    elements = mib * 1024 * 1024 // 4 // tensors
    steps: list[tuple[float, float]] = []  # when each ended (monotonic), and how long it took
    with dtrain.join() as run:
        torch.manual_seed(run.rank)
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(elements)) for _ in range(tensors)])
        matrix = torch.rand(MATRIX, MATRIX)
        cores = cores_of_rank(int(os.environ["LOCAL_WORLD_SIZE"]))
        copy = LargeCopy(elements * 4 * tensors, cores) if copies else None
        memcpy_s: list[float] = [] if copy is None else [copy.take_s()]
        before_bytes = memory_bytes("RssAnon")
        Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the peak
        run.track_local(model=model)
        (folder / f"ready{run.rank}").touch()
        for number, _ in enumerate(run.steps(Batches(), until=1 << 39)):
            began = time.monotonic()
            if number == 0 and run.restored:
                (folder / f"restored{run.rank}").write_text(repr(began))
            matrix @ matrix
            steps.append((time.monotonic(), time.monotonic() - began))
            if number % LOOK_EVERY_STEPS == LOOK_EVERY_STEPS - 1:
                if agreed(end.exists()):
                    break
                if copy is not None:
                    memcpy_s.append(copy.take_s())
        peak_bytes = memory_bytes("VmHWM") - memory_bytes("RssShmem") - memory_bytes("RssFile")
    said = {
        "steps": steps,
        "memcpy_s": memcpy_s,
        "state_bytes": elements * 4 * tensors,
        "before_bytes": before_bytes,
        "peak_bytes": peak_bytes,
    }
    path = folder / f"rank{os.environ['RANK']}.new"
    path.write_text(json.dumps(said))
    path.rename(path.with_suffix(".json"))


if __name__ == "__main__":
    main()
