"""The index of a shard: its header and the digest of every tensor, in a small object beside it.

Whoever restores needs parts of many shards, and must know what is where, and what it has to be, before a byte of
them is read. And whoever finds damage should name the tensor, not a file of gigabytes. So the worker that uploads a
shard also uploads ``rank-00000.index.json``: canonical JSON with the text of the shard's header and, for each tensor,
the digests of its pieces of at most PIECE_BYTES. The manifest holds the index's own digest, so the chain of trust
goes event, manifest, index, bytes, and any range of a shard can be proved without the rest of it.
"""

import re
from dataclasses import dataclass

import msgspec
import xxhash

from dtrain.common.digests import BLOB_ALGORITHM
from dtrain.common.errors import ShardDamagedError
from dtrain.storage import shards
from dtrain.storage.shards import LENGTH_BYTES, ShardHeader, TensorLayout

INDEX_VERSION = 1
PIECE_BYTES = 64 * 1024 * 1024  # what one digest covers, and so what a restore reads at least of a larger tensor
HASH_BYTES = 1024 * 1024  # hashed twice (piece and shard) while it lies in the cache
_HEX = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What the index object says."""

    version: int = INDEX_VERSION
    algorithm: str = BLOB_ALGORITHM
    piece_bytes: int  # what one digest covers, but for the last of a tensor
    header: str  # the JSON text of the shard's header, without its padding
    data_start: int  # where the tensors' bytes begin in the shard
    size_bytes: int  # of the whole shard
    digests: dict[str, tuple[str, ...]]  # tensor -> 32 hex digits a piece, in order; an empty tensor has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of a shard that one digest covers."""

    tensor: str
    begin: int  # position in the shard
    end: int
    digest: str  # 32 hex digits


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedShard:
    """A shard as its index tells it, checked."""

    key: str  # of the shard
    index: ShardIndex
    header: ShardHeader
    layout: dict[str, TensorLayout]  # which part of its whole each tensor is

    @property
    def header_bytes(self) -> bytes:
        """The first ``data_start`` bytes of the shard."""
        room = self.index.data_start - LENGTH_BYTES
        return room.to_bytes(LENGTH_BYTES, "little") + self.index.header.encode().ljust(room)

    def pieces(self, name: str, begin: int, end: int) -> list[Piece]:
        """Return the pieces that hold bytes ``begin`` to ``end`` of the tensor ``name`` of this shard."""
        span, size = self.header.tensors[name], self.index.piece_bytes
        start, length = self.header.data_start + span.begin, span.end - span.begin
        return [
            Piece(
                tensor=name,
                begin=start + number * size,
                end=start + min((number + 1) * size, length),
                digest=self.index.digests[name][number],
            )
            for number in range(begin // size, -(-min(end, length) // size))
        ]


def index_shard(shard: memoryview, *, key: str = "shard") -> tuple[bytes, str]:
    """Return the index object of these bytes and the digest of the whole shard, having read each byte once.

    Raises :class:`ShardDamagedError` if they are no shard.
    """
    header = shards.parse_header(shard, key=key, total_bytes=len(shard))
    shards.layout_of(header, key=key)
    whole = xxhash.xxh3_128(shard[: header.data_start])
    digests: dict[str, tuple[str, ...]] = {}
    for name, span in header.tensors.items():
        start, end = header.data_start + span.begin, header.data_start + span.end
        found: list[str] = []
        for begin in range(start, end, PIECE_BYTES):
            piece, stop = xxhash.xxh3_128(), min(begin + PIECE_BYTES, end)
            for part in range(begin, stop, HASH_BYTES):
                view = shard[part : min(part + HASH_BYTES, stop)]
                piece.update(view)
                whole.update(view)
            found.append(piece.hexdigest())
        digests[name] = tuple(found)
    index = ShardIndex(
        piece_bytes=PIECE_BYTES,
        header=bytes(shard[LENGTH_BYTES : header.data_start]).decode().rstrip(" "),
        data_start=header.data_start,
        size_bytes=len(shard),
        digests=digests,
    )
    return msgspec.json.encode(index, order="sorted"), f"{BLOB_ALGORITHM}:{whole.hexdigest()}"


def open_index(data: bytes, *, key: str, shard_key: str) -> IndexedShard:
    """Return what the index object ``data`` says of the shard. Raises :class:`ShardDamagedError` naming ``key``."""
    try:
        index = msgspec.json.decode(data, type=ShardIndex)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardDamagedError(key, f"cannot be read: {error}") from error
    if (index.version, index.algorithm) != (INDEX_VERSION, BLOB_ALGORITHM) or index.piece_bytes < 1:
        raise ShardDamagedError(
            key,
            f"has version {index.version} with digests {index.algorithm[:40]!r}; this dtrain reads version "
            f"{INDEX_VERSION} with {BLOB_ALGORITHM}",
        )
    text, room = index.header.encode(), index.data_start - LENGTH_BYTES
    if not len(text) <= room <= shards.HEADER_MAX_BYTES:
        raise ShardDamagedError(key, f"has a header of {len(text)} bytes in front of data at {index.data_start}")
    prefix = room.to_bytes(LENGTH_BYTES, "little") + text.ljust(room)
    header = shards.parse_header(prefix, key=key, total_bytes=index.size_bytes)
    layout = shards.layout_of(header, key=key)
    if index.digests.keys() != header.tensors.keys():
        raise ShardDamagedError(key, "has digests of other tensors than its header names")
    for name, span in header.tensors.items():
        found = index.digests[name]
        if len(found) != -(-(span.end - span.begin) // index.piece_bytes) or not all(map(_HEX.fullmatch, found)):
            raise ShardDamagedError(key, f"has not one digest for each piece of tensor {name!r}")
    return IndexedShard(key=shard_key, index=index, header=header, layout=layout)


def piece_is_sound(piece: Piece, data: memoryview) -> bool:
    """Return whether ``data`` is what the piece's digest says."""
    hasher = xxhash.xxh3_128()
    for part in range(0, len(data), HASH_BYTES):
        hasher.update(data[part : part + HASH_BYTES])
    return bool(hasher.hexdigest() == piece.digest)
