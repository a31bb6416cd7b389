"""All shards of a checkpoint together: which tensors there are, and where each part of each of them lies.

Ranks write their parts without asking each other, so nothing but this check says that the parts make whole tensors:
of every tensor the parts must agree on its type and shape, must not overlap and must leave no hole, and every tensor
that some rank's tree names must be there. A checkpoint that fails it is never committed. Plain arithmetic on
headers: the coordinator has no torch.

One part may come from several ranks, for a rank cannot know what ranks outside of its mesh hold. The digests say
whether it is the same; then the first rank's is kept. If it is not, two things have one name, and to keep either would
lose the other. Only of buffers and the like, which nothing keeps equal, the first rank's counts whatever the others'.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from dtrain.common.errors import PermanentError
from dtrain.storage.indexes import IndexedShard
from dtrain.storage.shards import FIRST_COUNTS_ENTRY, RANK_ENTRY, TREE_ENTRY

Json: TypeAlias = bool | int | str | list["Json"] | dict[str, "Json"] | None

OWN_PREFIX = "_rank"  # what a rank's own tensors are named after; no tracked name starts with an underscore
SECTIONS_BY_NAME = ("objects", "local")  # sections of a tree whose keys are names that people gave


class IncompleteCheckpoint(PermanentError):
    """The shards do not make whole tensors. The text names the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChunk:
    """The part of a tensor that one shard holds."""

    shard: int  # position in Catalog.shards: the rank that saved it
    shape: tuple[int, ...]
    offsets: tuple[int, ...]  # where the part starts in the whole tensor
    begin: int  # position in the shard of its first byte
    end: int

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTensor:
    """A tensor, and the chunks that cover it exactly."""

    dtype: str  # safetensors' code
    shape: tuple[int, ...]
    chunks: tuple[TensorChunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLeaf:
    """A tensor as a tree names it."""

    name: str
    sharded: bool = False  # its rank held a part of it only
    device: str = "cpu"  # type of the device that it was on
    pairs: bool = False  # complex numbers, stored as pairs of real ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """A whole checkpoint."""

    shards: tuple[IndexedShard, ...]  # by rank
    trees: tuple[dict[str, Json], ...]  # by rank
    tensors: Mapping[str, WholeTensor]


def catalog_of(shards: Sequence[IndexedShard]) -> Catalog:
    """Join the shards of ranks 0, 1, ... Raises :class:`IncompleteCheckpoint` naming the tensor that is not whole."""
    dtypes: dict[str, str] = {}
    wholes: dict[str, tuple[int, ...]] = {}
    chunks: dict[str, list[TensorChunk]] = {}
    first_counts: set[str] = set()
    for rank, shard in enumerate(shards):
        # Equal parts of two ranks are joined, so one rank's shard in the place of another's would pass for a copy.
        if (told := shard.header.metadata.get(RANK_ENTRY, str(rank))) != str(rank):
            raise IncompleteCheckpoint(f"the shard of rank {rank} says that it is that of rank {told[:20]}")
        first_counts.update(_first_counts(shard))
        start = shard.header.data_start
        for name, span in shard.header.tensors.items():
            part = shard.layout[name]
            if dtypes.setdefault(name, span.dtype) != span.dtype:
                raise IncompleteCheckpoint(f"tensor {name!r}: rank {rank} has {span.dtype}, others {dtypes[name]}")
            if wholes.setdefault(name, part.global_shape) != part.global_shape:
                raise IncompleteCheckpoint(
                    f"tensor {name!r}: rank {rank} says shape {part.global_shape}, others {wholes[name]}"
                )
            chunk = TensorChunk(
                shard=rank, shape=span.shape, offsets=part.offsets, begin=start + span.begin, end=start + span.end
            )
            chunks.setdefault(name, []).append(chunk)
    tensors = {}
    for name, stored in chunks.items():
        found = _without_copies(name, stored, shards, may_differ=name in first_counts)
        if why := _why_not_whole(wholes[name], found):
            raise IncompleteCheckpoint(f"tensor {name!r} of shape {wholes[name]}: {why}")
        tensors[name] = WholeTensor(dtype=dtypes[name], shape=wholes[name], chunks=tuple(found))
    trees = tuple(_tree_of(shard) for shard in shards)
    for rank, tree in enumerate(trees):
        for leaf in tensor_leaves(tree):
            if leaf.name not in tensors:
                mend = (
                    "Track it on all ranks of its mesh."
                    if leaf.sharded
                    else "Ranks that track different things give them to run.track_local()."
                )
                raise IncompleteCheckpoint(f"tensor {leaf.name!r}: rank {rank} has it, and no rank stored it. {mend}")
    return Catalog(shards=tuple(shards), trees=trees, tensors=tensors)


def tensor_leaves(tree: Mapping[str, Json]) -> Iterator[TensorLeaf]:
    """Yield every tensor that a rank's tree names."""
    for section, node in tree.items():
        if section in SECTIONS_BY_NAME and isinstance(node, dict):
            for inner in node.values():
                yield from leaves_below(inner)
        else:
            yield from leaves_below(node)


def is_of_job(tree: Mapping[str, Json]) -> bool:
    """Return whether dtrain's trainer wrote the tree: whoever else saves has no position in the data to tell."""
    return "position" in tree


def leaves_below(node: Json) -> Iterator[TensorLeaf]:
    """Yield the tensors of one encoded value."""
    if isinstance(node, list):
        for item in node:
            if isinstance(item, list | dict):
                yield from leaves_below(item)
    elif isinstance(node, dict):
        name = node.get("tensor")
        if isinstance(name, str):
            yield TensorLeaf(
                name=name,
                sharded=bool(node.get("sharded")),
                device=str(node.get("device", "cpu")),
                pairs=bool(node.get("pairs")),
            )
            return
        for item in node.values():
            if isinstance(item, list | dict):
                yield from leaves_below(item)


def _tree_of(shard: IndexedShard) -> dict[str, Json]:
    try:
        tree = json.loads(shard.header.metadata[TREE_ENTRY])
    except (KeyError, ValueError, RecursionError) as error:
        raise IncompleteCheckpoint(f"{shard.key}: its tree cannot be read: {error!r}") from error
    if not isinstance(tree, dict):
        raise IncompleteCheckpoint(f"{shard.key}: its tree is no object")
    return tree


def _first_counts(shard: IndexedShard) -> list[str]:
    try:
        return msgspec.json.decode(shard.header.metadata.get(FIRST_COUNTS_ENTRY, "[]"), type=list[str])
    except msgspec.DecodeError as error:
        raise IncompleteCheckpoint(f"{shard.key}: its {FIRST_COUNTS_ENTRY} cannot be read: {error}") from error


def _without_copies(
    name: str, chunks: Sequence[TensorChunk], shards: Sequence[IndexedShard], *, may_differ: bool
) -> list[TensorChunk]:
    """Return the chunks with each box once: the first rank's. Raises :class:`IncompleteCheckpoint` if copies differ."""
    kept: dict[tuple[tuple[int, ...], tuple[int, ...]], TensorChunk] = {}
    for chunk in chunks:
        first = kept.setdefault((chunk.offsets, chunk.shape), chunk)
        if first is chunk or may_differ:
            continue
        one, other = (shards[found.shard].index for found in (first, chunk))
        if (one.piece_bytes, one.digests[name]) != (other.piece_bytes, other.digests[name]):
            raise IncompleteCheckpoint(
                f"tensor {name!r}: ranks {first.shard} and {chunk.shard} hold different values of the same part. "
                "If they are copies, keep them equal, as DistributedDataParallel does; if each rank has its own, give "
                "it to run.track_local(); if they are stages of a pipeline, track each under a name of its own."
            )
    return list(kept.values())


def _why_not_whole(shape: tuple[int, ...], chunks: Sequence[TensorChunk]) -> str:
    """Return why the chunks do not cover the shape exactly; empty if they do. Each lies within it."""
    filled = [chunk for chunk in chunks if chunk.volume]
    if clash := _overlap(filled):
        one, other = clash
        return f"the parts of ranks {one.shard} and {other.shard} overlap"
    covered, volume = sum(chunk.volume for chunk in filled), math.prod(shape)
    # Within the shape, without overlap, and of its volume: so without a hole.
    return "" if covered == volume else f"its parts hold {covered} of {volume} elements"


def _overlap(chunks: Iterable[TensorChunk]) -> tuple[TensorChunk, TensorChunk] | None:
    """Return two chunks that overlap. Sweeps along the first dimension, so that rows cost no pairs."""
    reaching: list[TensorChunk] = []  # those whose rows may still meet the next chunk's
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets):
        if not chunk.offsets:  # numbers without a dimension: two are one too many
            if reaching:
                return reaching[0], chunk
            reaching.append(chunk)
            continue
        reaching = [other for other in reaching if other.offsets[0] + other.shape[0] > chunk.offsets[0]]
        for other in reaching:
            if all(
                max(a, b) < min(a + m, b + n)
                for a, m, b, n in zip(other.offsets, other.shape, chunk.offsets, chunk.shape, strict=True)
            ):
                return other, chunk
        reaching.append(chunk)
    return None


def contiguous_range(chunk: TensorChunk, offsets: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """Return the bytes of the chunk, counted from its own start, from the first to the last element of a box in it.

    The box has ``shape`` elements from ``offsets`` on, counted within the chunk, and is not empty.
    """
    strides = list(itertools.accumulate(reversed(chunk.shape[1:]), lambda a, b: a * b, initial=1))[::-1]
    first = sum(at * stride for at, stride in zip(offsets, strides, strict=False))
    last = sum((at + size - 1) * stride for at, size, stride in zip(offsets, shape, strides, strict=False))
    length, volume = chunk.end - chunk.begin, chunk.volume
    return first * length // volume, (last + 1) * length // volume
