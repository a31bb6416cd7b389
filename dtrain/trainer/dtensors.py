"""Sharded tensors (DTensor: FSDP2's parameters, tensor parallel meshes): which part is here, and empty ones to fill.

Importing DTensor takes time that a restart of a plain DDP job need not spend, so this file is imported only once a
DTensor was seen, or a checkpoint is to be read into one.
"""

from functools import lru_cache

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dtrain.trainer.parts import TensorPart


def local_part(tensor: torch.Tensor, path: str) -> tuple[torch.Tensor, TensorPart]:
    """Return this rank's part of a DTensor, and where it lies. Raises TypeError naming ``path``.

    Of several ranks of its mesh with the same part only the first stores it. Meshes beside this one, cut out of the
    same larger mesh, may hold the same tensor (a layer that is not tensor parallel, on each of the tensor parallel
    ranks) or know nothing of it (other stages of a pipeline, other experts). No rank can tell, so each mesh stores
    its copy, and whoever joins the shards keeps one (storage/catalogs.py).
    """
    assert isinstance(tensor, DTensor)
    if any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(
            f"{path} is a DTensor with a Partial placement, whose values are not summed yet: "
            "give tensor.redistribute(placements=...) without Partial."
        )
    local = local_of(tensor)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is no member of the mesh
        empty = (0,) * tensor.dim()
        return local.detach(), TensorPart(global_shape=tuple(tensor.shape), offsets=empty, stored_here=False)
    # What DTensor tells torch.distributed.checkpoint, asked without it: its import would be part of the first stall.
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) != tuple(local.shape):
        raise TypeError(
            f"{path} is a DTensor whose part on this rank is not one box ({tuple(local.shape)} held, "
            f"{tuple(shape)} told): give tensor.full_tensor()."
        )
    first = all(at == 0 for at, placement in zip(coordinate, tensor.placements, strict=True) if is_replica(placement))
    part = TensorPart(
        global_shape=tuple(tensor.shape),
        offsets=tuple(offsets),
        stored_here=first and (local.numel() > 0 or tensor.numel() == 0),
    )
    return local.detach(), part


def ranks_of(tensor: torch.Tensor) -> frozenset[int]:
    """Return the ranks that hold the DTensor."""
    assert isinstance(tensor, DTensor)
    return _ranks_of_mesh(tensor.device_mesh)


@lru_cache(maxsize=64)  # asked for each tensor at each checkpoint; a job has a handful of meshes
def _ranks_of_mesh(mesh: DeviceMesh) -> frozenset[int]:
    return frozenset(mesh.mesh.reshape(-1).tolist())


def placed(tensor: torch.Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    """Return where the parts of the DTensor lie: equal for those that are placed alike."""
    assert isinstance(tensor, DTensor)
    return tensor.device_mesh, tensor.placements


def is_replica(placement: object) -> bool:
    """Return whether every rank along this mesh dimension holds the same."""
    return isinstance(placement, Replicate)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the storage of this rank's part, without a copy and without a trace for autograd."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        local = tensor.to_local()
    wait = getattr(local, "wait", None)  # a result of a collective that is still on its way
    return wait() if callable(wait) else local


def empty_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an empty tensor of ``dtype``, placed as the DTensor ``tensor`` is."""
    assert isinstance(tensor, DTensor)
    local = local_of(tensor)
    return DTensor.from_local(
        torch.empty_like(local, dtype=dtype, requires_grad=False),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def empty_replica(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Return an empty DTensor that every rank of ``like``'s mesh holds whole."""
    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    local = torch.empty(shape, dtype=dtype, device=local_of(like).device)
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
