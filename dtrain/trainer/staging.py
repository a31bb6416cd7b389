"""Staging: a rank's state laid out as the shard that it will be, while training stands still.

Training stands still only while the bytes are copied, so the copy is all that happens here: the shard is laid out
in memory exactly as it will lie in storage, and whoever uploads it needs no torch.

Where each tensor goes is worked out once for as long as names, shapes and types stay the same. The header has room
to spare, so that the data start at the same place when the rest of it grows by a digit.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import torch

from dtrain.storage import shards
from dtrain.storage.catalogs import Json
from dtrain.storage.shards import ShardLayout, ShardPlan, TensorEntry
from dtrain.storage.tensor_codes import CODE_OF_DTYPE, size_bytes
from dtrain.trainer.copying import Arriving, Copier, copy_tensors
from dtrain.trainer.parts import TensorPart, kind_of
from dtrain.trainer.tracking import CapturedState

# Headers are padded to a multiple of a page, with this much to spare (a quarter of what they hold now): numbers grow
# by a digit, schedulers by an entry.
HEADER_PAGE_BYTES = 4096
HEADER_SPARE_DIVISOR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardImage:
    """A shard laid out, and the tensors whose bytes go there."""

    plan: ShardPlan
    tensors: dict[str, torch.Tensor]
    starts: dict[str, int]  # where each begins in the shard

    def copy_into(self, target: memoryview, copier: Copier, *, pinned: bool = False) -> Arriving | None:
        """Write the shard at the start of ``target``, which has ``plan.total_bytes`` at least.

        ``pinned``: CUDA knows the pages of ``target``; then bytes may still be on their way, which is returned.
        """
        start = self.plan.data_start
        arriving = copy_tensors(copier, self.tensors, self.starts, target, pinned=pinned)
        target[:start] = self.plan.header
        return arriving


class ShardLayouts:
    """Lays out one rank's shards, one after another."""

    def __init__(self, *, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._known: tuple[object, ...] = ()  # of what _layout is: names, types and shapes, and parts
        self._layout: ShardLayout | None = None
        self._header_bytes = 0  # what headers are padded to
        self._starts: dict[str, int] | None = None  # of _layout, behind a header of _data_start bytes
        self._data_start = 0

    def lay_out(self, state: CapturedState) -> ShardImage:
        """Plan the shard that holds ``state``."""
        metadata = {
            shards.STEP_ENTRY: str(state.step),
            shards.RANK_ENTRY: str(self._rank),
            shards.WORLD_SIZE_ENTRY: str(self._world_size),
            shards.TREE_ENTRY: tree_text(state.tree),
        }
        if state.first_counts:
            metadata[shards.FIRST_COUNTS_ENTRY] = json.dumps(state.first_counts, separators=(",", ":"))
        layout = self._layout_of(state)
        plan = layout.plan(metadata, header_min_bytes=self._header_bytes)
        if plan.data_start > self._header_bytes:
            roomy = plan.data_start + plan.data_start // HEADER_SPARE_DIVISOR
            self._header_bytes = roomy + -roomy % HEADER_PAGE_BYTES
            plan = layout.plan(metadata, header_min_bytes=self._header_bytes)
        if self._starts is None or self._data_start != plan.data_start:
            self._data_start = plan.data_start
            self._starts = {name: plan.data_start + begin for name, (begin, _) in plan.data_offsets.items()}
        return ShardImage(plan=plan, tensors=state.tensors, starts=self._starts)

    def _layout_of(self, state: CapturedState) -> ShardLayout:
        parts = state.parts
        known = (list(state.tensors), list(map(kind_of, state.tensors.values())), parts)
        if self._layout is None or known != self._known:
            self._layout = shards.lay_out(
                _entry(name, tensor, parts.get(name)) for name, tensor in state.tensors.items()
            )
            self._known, self._header_bytes, self._starts = known, 0, None
        return self._layout


def tree_text(tree: Mapping[str, Json]) -> str:
    """Return what json.dumps() makes of the tree, to the byte, but many times as fast where nothing is escaped."""
    try:
        quick = msgspec.json.encode(tree)
    except (OverflowError, UnicodeEncodeError, RecursionError):
        return json.dumps(tree, separators=(",", ":"))
    # The two differ in what they escape only: json.dumps() has a \u more where this has another byte than ASCII.
    if quick.isascii() and b"\\u" not in quick and b"\x7f" not in quick:
        return quick.decode()
    return json.dumps(tree, separators=(",", ":"))


def _entry(name: str, tensor: torch.Tensor, part: TensorPart | None) -> TensorEntry:
    shape = tuple(tensor.shape)
    return TensorEntry(
        name=name,
        dtype=CODE_OF_DTYPE[tensor.dtype],
        shape=shape,
        offsets_in_whole=(0,) * len(shape) if part is None else part.offsets,
        global_shape=shape if part is None else part.global_shape,
        size_bytes=size_bytes(tensor),
    )
