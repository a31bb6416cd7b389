"""torch's own ways to save and to load the same state, in processes of their own.

    python rivals.py save|load RANK RANKS FOLDER MIB TENSORS THREADS ROUNDS

Prints one JSON object. ``save``: for each way and round, how long the training loop stands still, and how long it
takes until the files are complete and flushed to the disk. ``load``: how long it takes until every byte is in the
tensors of a state that exists already.
"""

import ctypes
import json
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

State = dict[str, torch.Tensor]
Save = Callable[[State, Path], tuple[float, float]]


def flush(path: Path) -> None:
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def own(target: Path) -> Path:
    """A file of this rank's."""
    return target.with_name(f"{target.name}-{dist.get_rank()}")


def saved_by_torch(state: State, target: Path) -> tuple[float, float]:
    began = time.perf_counter()
    torch.save(state, own(target))
    stalled = time.perf_counter()
    flush(own(target))
    return stalled - began, time.perf_counter() - began


def saved_by_dcp(state: State, target: Path) -> tuple[float, float]:
    began = time.perf_counter()
    dcp.save(state, checkpoint_id=target)
    stalled = time.perf_counter()
    flush(target)
    return stalled - began, time.perf_counter() - began


def saved_async(kept: DefaultStager | None) -> Save:
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


def remove(target: Path) -> None:
    """Remove what a way left."""
    own(target).unlink(missing_ok=True)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
    dist.barrier()


def measure_saves(state: State, folder: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The ways by turns, so that what the machine does else meets all of them."""
    ways: dict[str, Save] = {
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
            dist.barrier()
            found[name].append(save(state, target))
            remove(target)
    return found


def measure_loads(state: State, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Into the tensors that there are; the files are in the page cache, as they are for dtrain."""
    torch.save(state, folder / "state.pt")
    save_file(state, folder / "state.safetensors")
    dcp.save(state, checkpoint_id=folder / "state")
    total_bytes = sum(tensor.nbytes for tensor in state.values())
    memory = mmap.mmap(-1, total_bytes)
    source = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(source, 1, total_bytes)
    staged = torch.frombuffer(memory, dtype=torch.float32)

    def by_torch() -> None:
        take(torch.load(folder / "state.pt", mmap=True, weights_only=True))

    def by_safetensors() -> None:
        take(load_file(folder / "state.safetensors"))

    def by_dcp() -> None:
        dcp.load(state, checkpoint_id=folder / "state")

    def from_memory() -> None:
        start = 0
        for tensor in state.values():
            tensor.copy_(staged[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def take(loaded: State) -> None:
        for name, tensor in state.items():
            tensor.copy_(loaded[name])

    ways = {
        "torch.load(mmap=True)": by_torch,
        "safetensors": by_safetensors,
        "dcp.load": by_dcp,
        "mapped memory + copy": from_memory,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, load in ways.items():
            began = time.perf_counter()
            load()
            found[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in found.items()}  # the first reads from the disk


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[4])
    rank, ranks, mib, tensors, threads, rounds = (int(sys.argv[n]) for n in (2, 3, 5, 6, 7, 8))
    torch.set_num_threads(threads)
    store = dist.FileStore(str(folder / "rendezvous"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    elements = mib * 1024 * 1024 // 4 // tensors
    state = {f"rank{rank}.weight{n}": torch.rand(elements) for n in range(tensors)}
    print(json.dumps((measure_saves if what == "save" else measure_loads)(state, folder, rounds)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
