"""From the parts that were saved to the parts that are wanted now.

Two ways, and no rank asks another in either:

- *straight*, if this rank holds what was saved: each tensor whole, or exactly the part that one shard has. A restart
  in the same world is this, and nothing else need be imported for it;
- by the planner of torch.distributed.checkpoint, in another world or another sharding: it says which range of which
  part goes where. Importing it takes most of a second where no zygote has done so, so that is put off until here.

Both name the bytes that they need first, and get them from whoever can bring them. On the straight way what lies on
this node already may be read without being brought.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from dtrain.storage.catalogs import TensorChunk, WholeTensor, tensor_leaves
from dtrain.storage.ranges import Bring, NeededRange
from dtrain.storage.tensor_codes import CODE_OF_DTYPE, is_sharded, view_bytes
from dtrain.trainer.copying import Copier, Span
from dtrain.trainer.tracking import SavedState


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A saved part that is wanted as it is."""

    name: str
    dtype: str  # of the saved bytes, safetensors' code
    chunk: TensorChunk
    into: torch.Tensor  # of the chunk's shape

    @property
    def is_dense(self) -> bool:
        """The saved bytes, as they lie, are the target's bytes, as they shall lie."""
        into = self.into
        alike = into.device.type == "cpu" and CODE_OF_DTYPE.get(into.dtype) == self.dtype
        return alike and into.is_contiguous() and not (into.is_conj() or into.is_neg())


Take: TypeAlias = Callable[[Sequence[Move]], list[Move]]  # makes the moves that it can; returns the others


def fill(
    targets: Mapping[str, torch.Tensor],
    wholes: Mapping[str, WholeTensor],
    bring: Bring,
    *,
    moved: bool,
    threads: int,
    take: Take = list,
) -> None:
    """Fill ``targets``, each of which has the shape of its whole. ``moved``: see :func:`has_moved`;
    ``threads``: how many copy at once.

    ``take`` is tried first where parts go straight to their targets.

    Raises :class:`~dtrain.common.errors.UserError` naming a tensor that cannot be laid out as it is wanted.
    """
    moves = None if moved else _straight(targets, wholes)
    if moves is None:
        from dtrain.storage.planned_reads import read_planned

        read_planned(targets, wholes, bring)
        return
    left = take(sorted(moves, key=lambda move: (move.chunk.shard, move.chunk.begin)))
    images = bring({_all_of(move) for move in left})
    copier = Copier(threads)
    try:
        _move_all(left, images, copier)
    finally:
        copier.close()


def has_moved(saved: SavedState, targets: Mapping[str, torch.Tensor], world_size: int) -> bool:
    """Return whether other ranks, or tensors sharded in another way, get what was saved."""
    return saved.world_size != world_size or any(
        leaf.sharded != is_sharded(targets[leaf.name]) for leaf in tensor_leaves(saved.tree) if leaf.name in targets
    )


def _straight(targets: Mapping[str, torch.Tensor], wholes: Mapping[str, WholeTensor]) -> list[Move] | None:
    """Return the parts that fill the targets; None if some target is laid out in another way than it was saved."""
    moves: list[Move] = []
    for name, target in targets.items():
        whole = wholes[name]
        local, offsets = _local_box(target, name)
        if not local.numel():
            continue
        wanted = [chunk for chunk in whole.chunks if chunk.volume]
        if tuple(local.shape) != whole.shape:
            wanted = [chunk for chunk in wanted if (chunk.offsets, chunk.shape) == (offsets, tuple(local.shape))]
        if not wanted:
            return None
        for chunk in wanted:
            into = local
            for dimension, (at, start, size) in enumerate(zip(chunk.offsets, offsets, chunk.shape, strict=True)):
                into = into.narrow(dimension, at - start, size)
            moves.append(Move(name=name, dtype=whole.dtype, chunk=chunk, into=into))
    return moves


def _move_all(moves: list[Move], images: Mapping[int, memoryview], copier: Copier) -> None:
    """Copy: at the speed of one large copy where both sides are dense and alike, and by torch elsewhere."""
    held = {shard: ctypes.c_char.from_buffer(image) for shard, image in images.items()}
    spans: list[Span] = []
    for move in moves:
        into, chunk = move.into, move.chunk
        if move.is_dense:
            spans.append((into.data_ptr(), ctypes.addressof(held[chunk.shard]) + chunk.begin, chunk.end - chunk.begin))
        else:
            with torch.no_grad():
                into.copy_(view_bytes(images[chunk.shard], move.dtype, chunk.shape, chunk.begin))
    copier.copy(spans)


def _all_of(move: Move) -> NeededRange:
    chunk = move.chunk
    return NeededRange(shard=chunk.shard, tensor=move.name, begin=0, end=chunk.end - chunk.begin)


def _local_box(target: torch.Tensor, name: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return what of the target is here, and where in the whole it starts."""
    if not is_sharded(target):
        return target.detach(), (0,) * target.dim()
    from dtrain.trainer.dtensors import local_part

    local, part = local_part(target, name)
    return local, part.offsets
