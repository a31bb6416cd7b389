"""What staging.py compares with: the same state saved by torch itself, in a process of its own.

Prints one JSON object: for each way, how long the training loop stands still in each round, and how long it takes
until the files are complete and flushed to the disk.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

State = dict[str, torch.Tensor]


def flush(path: Path) -> None:
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def saved_by_torch(state: State, target: Path) -> tuple[float, float]:
    began = time.perf_counter()
    torch.save(state, target)
    stalled = time.perf_counter()
    flush(target)
    return stalled - began, time.perf_counter() - began


def saved_by_dcp(state: State, target: Path) -> tuple[float, float]:
    began = time.perf_counter()
    dcp.save(state, checkpoint_id=target)
    stalled = time.perf_counter()
    flush(target)
    return stalled - began, time.perf_counter() - began


def saved_async(kept: DefaultStager | None) -> Callable[[State, Path], tuple[float, float]]:
    def save(state: State, target: Path) -> tuple[float, float]:
        began = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=target, async_stager=kept)
        stalled = time.perf_counter()
        getattr(future, "upload_completion", future).result()
        flush(target)
        return stalled - began, time.perf_counter() - began

    return save


def stager(*, shared: bool) -> DefaultStager:
    """A stager that keeps its copy of the state from one checkpoint to the next; what needs a GPU is off."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=shared, use_async_staging=False, use_non_blocking_copy=False
        )
    )


def main() -> None:
    folder, mib, tensors, threads, rounds = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    elements = mib * 1024 * 1024 // 4 // tensors
    state = {f"weight{n}": torch.rand(elements) for n in range(tensors)}
    ways: dict[str, Callable[[State, Path], tuple[float, float]]] = {
        "torch.save": saved_by_torch,
        "dcp.save": saved_by_dcp,
        "dcp.async_save, default": saved_async(None),
        "dcp.async_save, cached stager": saved_async(stager(shared=False)),
        "dcp.async_save, shared-memory stager": saved_async(stager(shared=True)),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, save in ways.items():
            target = folder / f"rival{number}"
            found[name].append(save(state, target))
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
