"""Reading parts of shards: which pieces are needed, in which reads they come, and that each is what it should be.

A restore on another world size needs some tensors of every shard. What lands in memory is either verified or the
restore ends with the tensor's name: a piece counts as there only once its digest was compared.

Pieces that lie side by side are read at once, because a request to S3 costs as much time as megabytes do.
"""

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from dtrain.common.errors import ShardDamagedError, ShardMissingError
from dtrain.storage.indexes import IndexedShard, Piece, piece_is_sound
from dtrain.storage.objects import NotFound, ObjectStore
from dtrain.storage.retrying import read_again_if_damaged

RUN_BYTES = 64 * 1024 * 1024  # read at once, unless one piece is larger


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class NeededRange:
    """Bytes of one tensor of one shard, counted from the tensor's own start there."""

    shard: int  # rank that saved it
    tensor: str
    begin: int
    end: int


Span: TypeAlias = tuple[int, int]  # where a range of an image begins and ends; not empty


def joined_spans(spans: Iterable[Span]) -> list[Span]:
    """Return the same bytes in order, as few spans as possible."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def covers(joined: Sequence[Span], begin: int, end: int) -> bool:
    """Return whether what :func:`joined_spans` gave holds all of a range."""
    before = bisect_right(joined, begin, key=lambda span: span[0])
    return before > 0 and joined[before - 1][1] >= end


# Returns writable memory laid out as the shards are, in which the ranges are there and verified. By shard.
Bring: TypeAlias = Callable[[set[NeededRange]], Mapping[int, memoryview]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Pieces of one shard that lie side by side, in its image and in one object."""

    shard: int
    pieces: tuple[Piece, ...]  # not empty

    @property
    def key(self) -> str:
        """Of the object."""
        return self.pieces[0].key

    @property
    def at(self) -> int:
        """Position in the object."""
        return self.pieces[0].at

    @property
    def begin(self) -> int:
        return self.pieces[0].begin

    @property
    def end(self) -> int:
        return self.pieces[-1].end


def pieces_of(shards: Sequence[IndexedShard], needed: Iterable[NeededRange]) -> dict[int, set[Piece]]:
    """Return the pieces that hold what is needed, by shard. A shard that is needed at all has an entry."""
    found: dict[int, set[Piece]] = {}
    for part in needed:
        found.setdefault(part.shard, set()).update(shards[part.shard].pieces(part.tensor, part.begin, part.end))
    return found


def runs_of(shard: int, pieces: Iterable[Piece]) -> list[Run]:
    """Join pieces of one shard that touch, up to RUN_BYTES."""
    runs: list[Run] = []
    joined: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        if joined and (not _touch(joined[-1], piece) or piece.end - joined[0].begin > RUN_BYTES):
            runs.append(Run(shard=shard, pieces=tuple(joined)))
            joined = []
        joined.append(piece)
    if joined:
        runs.append(Run(shard=shard, pieces=tuple(joined)))
    return runs


def _touch(one: Piece, other: Piece) -> bool:
    length = one.end - one.begin
    return one.end == other.begin and one.key == other.key and one.at + length == other.at


def read_run(store: ObjectStore, run: Run, image: memoryview) -> None:
    """Read the run to its place in ``image`` and verify it.

    Raises :class:`ShardDamagedError` naming the object and the tensor.
    """
    read_range(store, run.key, image[run.begin : run.end], offset=run.at)
    for piece in run.pieces:
        if not piece_is_sound(piece, image[piece.begin : piece.end]):
            raise ShardDamagedError(run.key, f"tensor {piece.tensor!r} does not match its digest")


def read_header(store: ObjectStore, shard: IndexedShard) -> None:
    """Read the header of the shard as stored. Raises :class:`ShardDamagedError` if it is another."""
    found = memoryview(bytearray(shard.stored_header_bytes))
    read_range(store, shard.key, found, offset=0)
    if not shard.stored_header_is_sound(found):
        raise ShardDamagedError(shard.key, "its header does not match its digest: it is not the one in its index")


def read_needed(
    store: ObjectStore, shards: Sequence[IndexedShard], needed: Iterable[NeededRange]
) -> dict[int, memoryview]:
    """Return the images of the shards, in which what is needed was read and verified; read again if it came damaged.

    What is not needed is never touched, and so takes no memory.
    """
    images: dict[int, memoryview] = {}
    for number, pieces in pieces_of(shards, needed).items():
        shard = shards[number]
        images[number] = memoryview(mmap.mmap(-1, shard.header.total_bytes))
        read_again_if_damaged(partial(read_header, store, shard))
        images[number][: shard.header.data_start] = shard.header_bytes
        for run in runs_of(number, pieces):
            read_again_if_damaged(partial(read_run, store, run, images[number]))
    return images


def read_range(store: ObjectStore, key: str, target: memoryview, *, offset: int) -> None:
    """Fill ``target``. Raises :class:`ShardDamagedError` if the object is missing or ends too soon."""
    try:
        store.read_into(key, target, offset=offset)
    except NotFound as error:
        raise ShardMissingError(key) from error
