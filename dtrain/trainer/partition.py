"""Who stores what: state that every rank holds is stored once, each rank a share of it, without asking anybody.

A collective at each checkpoint would tie the ranks' stalls together, so the shares are worked out by every rank alone
from what all ranks have alike: names, types and shapes. What is equal by construction (parameters, optimizer state)
is spread, the large tensors cut into rows so that N ranks write 1/N each. Of everything else that is not told apart
by rank (buffers such as running means, the tensors of any other object) rank 0's is the one that counts, as it is
when rank 0 alone saves: to mix parts of several ranks would make a state that no rank ever had.

Parts of DTensors are stored where they are. Where an object's DTensors lie on some of the ranks only (a stage of a
pipeline), the others may have no such object, and so the first of those ranks stores what is plain in it.

If ranks do not have the same names after all, the parts do not add up, and the checkpoint is refused before it is
committed (storage/catalogs.py). If the names are alike and the values are not (nothing kept the ranks' models equal),
the shares would make such a mix too. So every rank stores some small tensors, the witnesses, in full: copies that
differ are refused there as well.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from dtrain.storage.tensor_codes import size_bytes
from dtrain.trainer.parts import TensorPart, kind_of

CUT_BYTES = 32 * 1024 * 1024  # larger tensors are cut into rows; smaller ones even out among themselves
WITNESSES_MAX = 16  # half a MiB a rank at most
WITNESS_BYTES_MAX = 32 * 1024  # the norms and biases of any model are smaller


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank stores."""

    tensors: dict[str, torch.Tensor]  # by name; views of the live state
    parts: dict[str, TensorPart]  # of those that are not whole


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """A rank's rows of a tensor that was cut."""

    start: int
    stop: int


class Partition:
    """Gives one rank's share, checkpoint after checkpoint. Worked out anew only when names or shapes change."""

    def __init__(self, *, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._known: tuple[object, ...] = ()  # of what _mine is: names, types and shapes, and which are spread
        self._mine: dict[str, _Rows | None] = {}
        self._whole: set[str] = set()  # of those: what is not cut

    def share(
        self,
        tensors: dict[str, torch.Tensor],
        *,
        spread: Collection[str],
        own: Iterable[str],
        sharded: dict[str, TensorPart],
        apart: Mapping[str, bool] = MappingProxyType({}),
    ) -> Share:
        """Return what this rank stores of ``tensors``.

        ``spread``: names of what is equal on every rank; ``own``: what is this rank's alone; ``sharded``: parts of
        DTensors; ``apart``: what some ranks may not have, and whether it is stored here. Everything else is rank 0's.
        """
        not_common = {*own, *sharded, *apart}
        common = [name for name in tensors if name not in not_common]
        others = [name for name in common if name not in spread]
        known = (common, list(map(kind_of, map(tensors.__getitem__, common))), others)
        if known != self._known:
            equal = {name: tensors[name] for name in common if name in spread}
            first_bytes = sum(size_bytes(tensors[name]) for name in others)
            self._mine = _assign(equal, first_bytes, self._world_size)[self._rank]
            if self._rank == 0:
                self._mine.update(dict.fromkeys(others))
            self._known = known
            self._whole = {name for name, rows in self._mine.items() if rows is None}
        stored: dict[str, torch.Tensor] = {}
        parts: dict[str, TensorPart] = {}
        whole = self._whole  # no other kind of tensor has such a name
        for name, tensor in tensors.items():
            if name in whole:
                stored[name] = tensor
            elif name in sharded:
                if sharded[name].stored_here:
                    stored[name], parts[name] = tensor, sharded[name]
            elif name in not_common:
                if apart.get(name, True):
                    stored[name] = tensor
            elif name in self._mine:
                rows = self._mine[name]
                stored[name] = tensor if rows is None else tensor[rows.start : rows.stop]
                if rows is not None:
                    offsets = (rows.start, *(0 for _ in tensor.shape[1:]))
                    parts[name] = TensorPart(global_shape=tuple(tensor.shape), offsets=offsets)
        return Share(tensors=stored, parts=parts)


def _assign(tensors: dict[str, torch.Tensor], first_bytes: int, world_size: int) -> list[dict[str, _Rows | None]]:
    """Return each rank's names and rows. Largest first, each to whom has least; rank 0 starts with ``first_bytes``."""
    found: list[dict[str, _Rows | None]] = [{} for _ in range(world_size)]
    loads = [(first_bytes if rank == 0 else 0, rank) for rank in range(world_size)]
    heapq.heapify(loads)
    witnesses = _witnesses(tensors)
    for mine in found:
        mine.update(dict.fromkeys(witnesses))
    for name in sorted(tensors.keys() - witnesses, key=lambda name: (-size_bytes(tensors[name]), name)):
        tensor = tensors[name]
        parts = min(world_size, tensor.shape[0]) if tensor.dim() and size_bytes(tensor) > CUT_BYTES else 1
        taken = [heapq.heappop(loads) for _ in range(parts)]
        for part, (load, rank) in enumerate(taken):
            start, stop = (tensor.shape[0] * at // parts if parts > 1 else 0 for at in (part, part + 1))
            found[rank][name] = _Rows(start=start, stop=stop) if parts > 1 else None
            heapq.heappush(loads, (load + size_bytes(tensor) // parts, rank))
    return found


def _witnesses(tensors: dict[str, torch.Tensor]) -> set[str]:
    """Return some small tensors from all over the state: of a model that was frozen in part, some that are trained.

    Numbers without a dimension are not among them: steps that optimizers count are equal whatever else is.
    """
    small = sorted(name for name, held in tensors.items() if held.dim() and size_bytes(held) <= WITNESS_BYTES_MAX)
    return set(small[:: -(-len(small) // WITNESSES_MAX) or 1])
