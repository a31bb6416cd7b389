"""Staging: a rank's state copied into memory from which its shard can be uploaded, while training goes on.

Training stands still only while the bytes are copied, so the copy is all that happens here: the shard is laid out
in memory exactly as it will lie in storage, and whoever uploads it needs no torch.

A worker's trainer has two stage slots, files in shared memory. The slot of the last staged attempt is never written
by the next one, because its bytes may still be on their way. Space is allocated before anything is mapped: writing
into a hole of a full shared memory would kill the process with SIGBUS, where an allocation fails with an error.
"""

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dtrain.storage import shards
from dtrain.storage.shards import ShardPlan, TensorEntry
from dtrain.trainer.tensor_codes import CODE_OF_DTYPE, size_bytes, view_bytes
from dtrain.trainer.tracking import CapturedState

SLOTS = 2
# Headers grow a little between checkpoints (longer numbers, an optimizer's first state), and growing a slot maps it
# anew, so each is given this much more than it needs.
SLOT_SLACK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardImage:
    """A shard laid out, and the tensors whose bytes go there."""

    plan: ShardPlan
    tensors: dict[str, torch.Tensor]

    def copy_into(self, buffer: memoryview) -> None:
        """Write the shard at the start of ``buffer``, which has ``plan.total_bytes`` at least."""
        start = self.plan.data_start
        targets = {
            name: view_bytes(buffer, CODE_OF_DTYPE[tensor.dtype], tuple(tensor.shape), start + begin)
            for name, tensor in self.tensors.items()
            for begin, _ in (self.plan.data_offsets[name],)
            if tensor.numel()
        }
        with torch.no_grad():
            if targets:
                torch._foreach_copy_(list(targets.values()), [self.tensors[name] for name in targets])
        buffer[:start] = self.plan.header


def lay_out(state: CapturedState, *, rank: int, world_size: int) -> ShardImage:
    """Plan the shard that holds ``state``."""
    entries = [
        TensorEntry(
            name=name,
            dtype=CODE_OF_DTYPE[tensor.dtype],
            shape=tuple(tensor.shape),
            offsets_in_whole=(0,) * tensor.dim(),
            global_shape=tuple(tensor.shape),
            size_bytes=size_bytes(tensor),
        )
        for name, tensor in state.tensors.items()
    ]
    metadata = {
        shards.STEP_ENTRY: str(state.step),
        shards.RANK_ENTRY: str(rank),
        shards.WORLD_SIZE_ENTRY: str(world_size),
        shards.TREE_ENTRY: json.dumps(state.tree, separators=(",", ":")),
    }
    return ShardImage(plan=shards.plan(entries, metadata), tensors=state.tensors)


class StageSlots:
    """The two files in shared memory. Not for use by two threads."""

    def __init__(self, folder: Path) -> None:
        self._slots = [_Slot(folder / f"slot{number}") for number in range(SLOTS)]
        self._last_staged = SLOTS - 1  # so that the first goes to slot 0

    def stage(self, image: ShardImage) -> int:
        """Copy ``image`` and return the number of its slot. Raises OSError if there is no room."""
        number = (self._last_staged + 1) % SLOTS
        image.copy_into(self._slots[number].reserve(image.plan.total_bytes))
        self._last_staged = number  # only now: a failed copy leaves the other slot as it was
        return number

    def close(self) -> None:
        """Unmap the slots. The files stay: the worker may still be reading them."""
        for slot in self._slots:
            slot.close()


class _Slot:
    """One file, mapped as long as it is large enough."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None

    def reserve(self, needed_bytes: int) -> memoryview:
        """Return the slot's memory, of ``needed_bytes`` at least, all of it allocated."""
        if self._map is None or len(self._map) < needed_bytes:
            self.close()
            self._map = self._grown(needed_bytes + SLOT_SLACK_BYTES)
        return memoryview(self._map)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def _grown(self, size_bytes: int) -> mmap.mmap:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, size_bytes)
            return mmap.mmap(file, size_bytes)
        finally:
            os.close(file)
