"""torch's own ways to save and to load the same state, in processes of their own.

    python rivals.py save|prepare|WAY RANK RANKS FOLDER MIB TENSORS THREADS ROUNDS

Prints one JSON value. ``save``: for each way and round, how long the training loop stands still, and how long it
takes until the files are complete and flushed to the disk. ``prepare``: nothing, but saves what a way of loading
loads. The name of such a way: how long it takes until every byte is in the tensors of a state that exists already.
"""

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

MAPPED_COPY = "mapped memory + copy"
PAUSE_S = 0.7  # between what a process did before and its load
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


def prepare_loads(state: State, folder: Path) -> None:
    """Save what is loaded later, and have it in the page cache, as it is for dtrain."""
    torch.save(state, folder / "state.pt")
    save_file(state, folder / "state.safetensors")
    dcp.save(state, checkpoint_id=folder / "state")


def load_by_torch(state: State, folder: Path) -> None:
    take(state, torch.load(folder / "state.pt", mmap=True, weights_only=True))


def load_by_safetensors(state: State, folder: Path) -> None:
    take(state, load_file(folder / "state.safetensors"))


def load_by_dcp(state: State, folder: Path) -> None:
    dcp.load(state, checkpoint_id=folder / "state")


def load_from_memory(state: State, folder: Path) -> None:
    """Map a file in shared memory that holds the bytes one after another, and copy."""
    with (Path("/dev/shm") / f"dtrain-bench-{folder.name}").open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 0
    for tensor in state.values():
        tensor.copy_(torch.frombuffer(memory, dtype=torch.float32, count=tensor.numel(), offset=start))
        start += tensor.nbytes


def take(state: State, loaded: State) -> None:
    for name, tensor in state.items():
        tensor.copy_(loaded[name])


LOADS: dict[str, Callable[[State, Path], None]] = {
    "torch.load(mmap=True)": load_by_torch,
    "safetensors": load_by_safetensors,
    "dcp.load": load_by_dcp,
    MAPPED_COPY: load_from_memory,
}


def measure_load(state: State, folder: Path, way: str) -> float:
    """One load in a process that has just made its model, after the pause that dtrain's trainers have too."""
    time.sleep(PAUSE_S)
    began = time.perf_counter()
    LOADS[way](state, folder)
    return time.perf_counter() - began


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[4])
    rank, ranks, mib, tensors, threads, rounds = (int(sys.argv[n]) for n in (2, 3, 5, 6, 7, 8))
    torch.set_num_threads(threads)
    store = dist.FileStore(str(folder / "rendezvous"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    elements = mib * 1024 * 1024 // 4 // tensors
    state = {f"rank{rank}.weight{n}": torch.rand(elements) for n in range(tensors)}
    match what:
        case "save":
            said: object = measure_saves(state, folder, rounds)
        case "prepare":
            prepare_loads(state, folder)
            said = None
        case way:
            said = measure_load(state, folder, way)
    print(json.dumps(said), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
