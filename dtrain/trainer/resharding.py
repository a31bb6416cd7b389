"""From the parts that were saved to the parts that are wanted now: boxes cut out of boxes.

The saved parts of a tensor and the parts that this rank holds are boxes in the same whole, so what must be copied is
where they meet; each meeting names the bytes it needs, and only those are fetched. No rank asks another.

torch's own planner for this (torch.distributed.checkpoint) gives the same boxes. It is not used here because its
import costs every restart most of a second; the storage classes in dcp.py are for whoever uses it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dtrain.storage.catalogs import TensorChunk, WholeTensor, contiguous_range
from dtrain.storage.ranges import NeededRange
from dtrain.trainer.tensor_codes import is_sharded, view_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where a saved chunk and a target meet."""

    name: str
    dtype: str  # of the saved bytes, safetensors' code
    chunk: TensorChunk
    local: torch.Tensor  # what of the target is on this rank
    in_chunk: tuple[int, ...]  # where the box starts in the chunk
    in_local: tuple[int, ...]  # and in the target
    shape: tuple[int, ...]

    @property
    def needed(self) -> NeededRange:
        """The bytes of the shard that it needs."""
        begin, end = contiguous_range(self.chunk, self.in_chunk, self.shape)
        return NeededRange(shard=self.chunk.shard, tensor=self.name, begin=begin, end=end)

    def copy(self, image: memoryview) -> None:
        """Copy the box out of the shard's bytes (writable memory, laid out as the shard)."""
        source = view_bytes(image, self.dtype, self.chunk.shape, self.chunk.begin)
        target = self.local
        for dimension, (start, into, size) in enumerate(zip(self.in_chunk, self.in_local, self.shape, strict=True)):
            source = source.narrow(dimension, start, size)
            target = target.narrow(dimension, into, size)
        with torch.no_grad():
            target.copy_(source)


def meetings(targets: Mapping[str, torch.Tensor], wholes: Mapping[str, WholeTensor]) -> list[Meeting]:
    """Return every copy that fills ``targets``, each of which has the shape of its whole."""
    found: list[Meeting] = []
    for name, target in targets.items():
        whole = wholes[name]
        local, offsets = _local_box(target, name)
        for chunk in whole.chunks:
            starts = tuple(map(max, chunk.offsets, offsets))
            stops = (
                min(at + size, into + extent)
                for at, size, into, extent in zip(chunk.offsets, chunk.shape, offsets, local.shape, strict=True)
            )
            shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
            if any(size <= 0 for size in shape):
                continue
            found.append(
                Meeting(
                    name=name,
                    dtype=whole.dtype,
                    chunk=chunk,
                    local=local,
                    in_chunk=tuple(start - at for start, at in zip(starts, chunk.offsets, strict=True)),
                    in_local=tuple(start - into for start, into in zip(starts, offsets, strict=True)),
                    shape=shape,
                )
            )
    return found


def copy_all(found: Iterable[Meeting], images: Mapping[int, memoryview]) -> None:
    """Fill the targets. ``images`` holds the bytes of each shard that is needed."""
    for meeting in sorted(found, key=lambda meeting: (meeting.chunk.shard, meeting.chunk.begin)):
        meeting.copy(images[meeting.chunk.shard])


def _local_box(target: torch.Tensor, name: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return what of the target is here, and where in the whole it starts."""
    if not is_sharded(target):
        return target.detach(), (0,) * target.dim()
    from dtrain.trainer.dtensors import local_part

    local, part = local_part(target, name)
    return local, part.offsets
