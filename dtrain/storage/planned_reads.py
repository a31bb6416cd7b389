"""Reading a checkpoint in another world than the one that saved it, as torch's own planner says.

torch.distributed.checkpoint knows every way in which torch shards a tensor, so its planner decides which ranges of
which saved parts go where. It is told what there is in its own terms (``Metadata``, made from the checkpoint's
indexes), and reads through a reader of ours, which names the bytes that a plan needs and has them brought: by a
node's worker to its trainers, or from a store. No rank talks to another: each plans what it holds itself.

This is one of the few files of this room that import torch, for those who have it: nothing else here may import it.
"""

import io
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dtrain.common.errors import UserError
from dtrain.storage.catalogs import TensorChunk, WholeTensor, contiguous_range
from dtrain.storage.ranges import Bring, NeededRange
from dtrain.storage.tensor_codes import DTYPE_OF_CODE, view_bytes


class RangeReader(StorageReader):
    """Serves the ranges of a checkpoint's parts that a plan names. ``bring`` says where their bytes come from."""

    def __init__(self, bring: Bring, tensors: Mapping[str, WholeTensor], opaque: Collection[str] = ()) -> None:
        """``opaque``: names of what was no tensor before it was stored."""
        self._pairs: Collection[str] = ()  # names of complex tensors that are stored as pairs of real numbers
        self._bring = bring
        self._tensors = tensors
        self._opaque = opaque

    def reset(self, checkpoint_id: object = None) -> None:
        """Begin: nothing is kept between two reads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the checkpoint holds, as torch's planner wants it. What is a rank's own is left out."""
        found: dict[str, BytesStorageMetadata | TensorStorageMetadata] = {}
        for name, whole in self._tensors.items():
            if name in self._opaque:
                found[name] = BytesStorageMetadata()
            else:
                dtype, last = DTYPE_OF_CODE[whole.dtype], len(whole.shape)
                if name in self._pairs:
                    dtype, last = torch.complex128, last - 1
                found[name] = TensorStorageMetadata(
                    properties=TensorProperties(dtype=dtype),
                    size=torch.Size(whole.shape[:last]),
                    chunks=[_chunk_metadata(chunk, last) for chunk in whole.chunks if chunk.volume],
                )
        return Metadata(state_dict_metadata=found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Bring what the plan needs, verified, and copy it to its targets. Raises ShardDamagedError."""
        chunks = {
            (name, chunk.offsets[:-1] if name in self._pairs else chunk.offsets): chunk
            for name, whole in self._tensors.items()
            for chunk in whole.chunks
            if chunk.volume
        }
        work: list[tuple[ReadItem, TensorChunk, NeededRange]] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                chunk = self._tensors[name].chunks[0]
                begin, end = 0, chunk.end - chunk.begin
            elif 0 in item.lengths:  # a part without elements on this rank
                continue
            else:
                chunk = chunks[name, tuple(item.storage_index.offset or ())]
                pair = ((0,), (2,)) if name in self._pairs else ((), ())
                begin, end = contiguous_range(chunk, (*item.storage_offsets, *pair[0]), (*item.lengths, *pair[1]))
            work.append((item, chunk, NeededRange(shard=chunk.shard, tensor=name, begin=begin, end=end)))
        images = self._bring({needed for _, _, needed in work})
        for item, chunk, _ in work:
            self._copy(item, chunk, images[chunk.shard], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _copy(self, item: ReadItem, chunk: TensorChunk, image: memoryview, planner: LoadPlanner) -> None:
        if item.type is LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(image[chunk.begin : chunk.end]))
            return
        target = planner.resolve_tensor(item).detach()
        name = item.storage_index.fqn
        source = view_bytes(image, self._tensors[name].dtype, chunk.shape, chunk.begin)
        if name in self._pairs:
            source = torch.view_as_complex(source)
        for dimension, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            source = source.narrow(dimension, start, size)
        target.copy_(source)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Where to read is said when this is made, never by an id."""
        return False


def read_planned(targets: Mapping[str, torch.Tensor], wholes: Mapping[str, WholeTensor], bring: Bring) -> None:
    """Fill ``targets``, plain or DTensors of any mesh, as torch's planner says. No rank talks to another.

    Raises :class:`UserError` naming a tensor that the planner cannot lay out.
    """
    reader = RangeReader(bring, {name: wholes[name] for name in targets})
    metadata = reader.read_metadata()
    with torch.no_grad():
        try:
            planner, plan = _planned(targets, metadata)
        except Exception as error:  # whatever torch raises for one of them: its texts seldom say for which
            raise _as_told_by_one(targets, metadata) or error from error
        _check_filled(targets, plan)
        reader.read_data(plan, planner).wait()


def read_whole(name: str, wholes: Mapping[str, WholeTensor], bring: Bring) -> torch.Tensor:
    """Return a tensor of the checkpoint, as it is stored."""
    whole = wholes[name]
    target = torch.empty(whole.shape, dtype=DTYPE_OF_CODE[whole.dtype])
    read_planned({name: target}, wholes, bring)
    return target


def _planned(targets: Mapping[str, torch.Tensor], metadata: Metadata) -> tuple[LoadPlanner, LoadPlan]:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), metadata)
    (plan,) = planner.create_global_plan([planner.create_local_plan()])
    return planner, planner.finish_plan(plan)


def _as_told_by_one(targets: Mapping[str, torch.Tensor], metadata: Metadata) -> UserError | None:
    """Plan one tensor after another, to name the one that fails."""
    for name, target in targets.items():
        try:
            _planned({name: target}, metadata)
        except Exception as error:
            found = UserError(_cannot_lay_out(name, str(error) or type(error).__name__))
            found.__cause__ = error
            return found
    return None


def _check_filled(targets: Mapping[str, torch.Tensor], plan: LoadPlan) -> None:
    """Hold that the plan covers every target: the planner itself does not, and would leave chance bytes in it."""
    planned: dict[str, int] = {}
    for item in plan.items:
        planned[item.dest_index.fqn] = planned.get(item.dest_index.fqn, 0) + math.prod(item.lengths)
    for name, target in targets.items():
        here = target.to_local() if isinstance(target, DTensor) else target
        if planned.get(name, 0) != here.numel():
            raise UserError(
                _cannot_lay_out(name, f"{planned.get(name, 0)} of the {here.numel()} elements on this rank were saved")
            )


def _cannot_lay_out(name: str, why: str) -> str:
    return (
        f"tensor {name!r} of the checkpoint cannot be laid out as this run holds it: {why}. "
        "Build and shard the model so that each rank holds one box of each tensor, of the shape that was saved."
    )


def _chunk_metadata(chunk: TensorChunk, last: int) -> ChunkStorageMetadata:
    """Tell a chunk in its first ``last`` dimensions."""
    return ChunkStorageMetadata(offsets=torch.Size(chunk.offsets[:last]), sizes=torch.Size(chunk.shape[:last]))
