"""The index of a shard: its header and the digest of every tensor, in a small object beside it.

Whoever restores needs parts of many shards, and must know what is where, and what it has to be, before a byte of
them is read. And whoever finds damage should name the tensor, not a file of gigabytes. So the worker that uploads a
shard also uploads ``rank-00000.index.json``: canonical JSON with the text of the shard's header and, for each tensor,
the digests of its pieces of at most PIECE_BYTES. The manifest holds the index's own digest, so the chain of trust
goes event, manifest, index, bytes, and any range of a shard can be proved without the rest of it.

An index describes the shard as it was staged, whole: its *image*. In storage some tensors of the image may lie in
packs instead (see :mod:`dtrain.storage.packing`); where, only the index says. Whoever reads works on the image.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec
import xxhash

from dtrain.common.digests import BLOB_ALGORITHM
from dtrain.common.errors import ShardDamagedError
from dtrain.common.packs import PACKS_MAX, Pack
from dtrain.storage import shards
from dtrain.storage.shards import LENGTH_BYTES, ShardHeader, TensorLayout

INDEX_VERSION = 2  # 1 knew no packs; it is read for ever
PIECE_BYTES = 64 * 1024 * 1024  # what one digest covers, and so what a restore reads at least of a larger tensor
HASH_BYTES = 256 * 1024  # hashed twice (piece and shard) while it lies in the cache
_HEX = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What the index object says."""

    version: int = INDEX_VERSION
    algorithm: str = BLOB_ALGORITHM
    piece_bytes: int  # what one digest covers, but for the last of a tensor
    header: str  # the JSON text of the image's header, without its padding
    data_start: int  # where the tensors' bytes begin in the image
    size_bytes: int  # of the whole image
    digests: dict[str, tuple[str, ...]]  # tensor -> 32 hex digits a piece, in order; an empty tensor has none
    packs: tuple[Pack, ...] = ()  # by key: what of the image lies elsewhere than in the shard
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # tensor -> (which pack, where it begins there)
    shard_start: int = 0  # with packs: where the tensors' bytes begin in the shard as stored
    shard_header_digest: str = ""  # with packs: 32 hex digits of everything before them


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of an image that one digest covers."""

    tensor: str
    begin: int  # position in the image
    end: int
    digest: str  # 32 hex digits
    key: str  # of the object that it lies in
    at: int  # where it begins there


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedShard:
    """A shard as its index tells it, checked."""

    key: str  # of the shard
    index: ShardIndex
    header: ShardHeader  # of the image
    layout: dict[str, TensorLayout]  # which part of its whole each tensor is
    places: dict[str, tuple[str, int]]  # tensor -> (the object it lies in, where it begins there)
    stored_bytes: int  # size of the shard as stored

    @property
    def header_bytes(self) -> bytes:
        """The first ``data_start`` bytes of the image."""
        room = self.index.data_start - LENGTH_BYTES
        return room.to_bytes(LENGTH_BYTES, "little") + self.index.header.encode().ljust(room)

    @property
    def stored_header_bytes(self) -> int:
        """How many bytes of the shard as stored come before the tensors'."""
        return self.index.shard_start if self.index.packs else self.index.data_start

    def stored_header_is_sound(self, data: memoryview) -> bool:
        """Return whether ``data`` is the header of the shard as stored."""
        if not self.index.packs:
            return bool(data == self.header_bytes)
        return bool(xxhash.xxh3_128(data).hexdigest() == self.index.shard_header_digest)

    def pieces(self, name: str, begin: int, end: int) -> list[Piece]:
        """Return the pieces that hold bytes ``begin`` to ``end`` of the tensor ``name`` of this shard."""
        span, size = self.header.tensors[name], self.index.piece_bytes
        start, length = self.header.data_start + span.begin, span.end - span.begin
        key, at = self.places[name]
        return [
            Piece(
                tensor=name,
                begin=start + number * size,
                end=start + min((number + 1) * size, length),
                digest=self.index.digests[name][number],
                key=key,
                at=at + number * size,
            )
            for number in range(begin // size, -(-min(end, length) // size))
        ]


def index_shard(shard: memoryview, *, key: str = "shard") -> tuple[bytes, str]:
    """Return the index object of a shard that is stored whole, and its digest, having read each byte once.

    Raises :class:`ShardDamagedError` if these bytes are no shard.
    """
    header = shards.parse_header(shard, key=key, total_bytes=len(shard))
    shards.layout_of(header, key=key)
    digests, whole = digest_image(shard, header, shard[: header.data_start], elsewhere=())
    return encode_index(shard, header, digests), whole


def digest_image(
    image: memoryview, header: ShardHeader, stored_header: bytes | memoryview, *, elsewhere: Container[str]
) -> tuple[dict[str, tuple[str, ...]], str]:
    """Return the digests of every tensor, and that of a shard which holds them all but those ``elsewhere``.

    Each byte is read once: it is hashed for both while it lies in the cache.
    """
    whole = xxhash.xxh3_128(stored_header)
    digests: dict[str, tuple[str, ...]] = {}
    for name, span in header.tensors.items():
        start, end = header.data_start + span.begin, header.data_start + span.end
        found: list[str] = []
        for begin in range(start, end, PIECE_BYTES):
            piece, stop = xxhash.xxh3_128(), min(begin + PIECE_BYTES, end)
            for part in range(begin, stop, HASH_BYTES):
                view = image[part : min(part + HASH_BYTES, stop)]
                piece.update(view)
                if name not in elsewhere:
                    whole.update(view)
            found.append(piece.hexdigest())
        digests[name] = tuple(found)
    return digests, f"{BLOB_ALGORITHM}:{whole.hexdigest()}"


def encode_index(
    image: memoryview,
    header: ShardHeader,
    digests: dict[str, tuple[str, ...]],
    *,
    packs: tuple[Pack, ...] = (),
    places: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    stored_header: bytes = b"",
) -> bytes:
    """Return the index object of an image, of which ``places`` lie in ``packs`` and the rest behind the header."""
    index = ShardIndex(
        piece_bytes=PIECE_BYTES,
        header=bytes(image[LENGTH_BYTES : header.data_start]).decode().rstrip(" "),
        data_start=header.data_start,
        size_bytes=len(image),
        digests=digests,
        packs=packs,
        places=dict(places),
        shard_start=len(stored_header),
        shard_header_digest=xxhash.xxh3_128(stored_header).hexdigest() if packs else "",
    )
    return msgspec.json.encode(index, order="sorted")


def open_index(data: bytes, *, key: str, shard_key: str) -> IndexedShard:
    """Return what the index object ``data`` says of the shard. Raises :class:`ShardDamagedError` naming ``key``."""
    try:
        index = msgspec.json.decode(data, type=ShardIndex)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardDamagedError(key, f"cannot be read: {error}") from error
    if not 1 <= index.version <= INDEX_VERSION or index.algorithm != BLOB_ALGORITHM or index.piece_bytes < 1:
        raise ShardDamagedError(
            key,
            f"has version {index.version} with digests {index.algorithm[:40]!r}; this dtrain reads versions "
            f"1 to {INDEX_VERSION} with {BLOB_ALGORITHM}",
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
    if why := _bad_places(index, header):
        raise ShardDamagedError(key, why)
    places: dict[str, tuple[str, int]] = {}
    position = index.shard_start if index.packs else index.data_start
    for name, span in header.tensors.items():
        if name in index.places:
            number, begin = index.places[name]
            places[name] = index.packs[number].key, begin
        else:
            places[name] = shard_key, position
            position += span.end - span.begin
    return IndexedShard(key=shard_key, index=index, header=header, layout=layout, places=places, stored_bytes=position)


def _bad_places(index: ShardIndex, header: ShardHeader) -> str:
    """Return what is wrong with what an index says of packs; empty if nothing is."""
    if bool(index.packs) != bool(index.places) or len(index.packs) > (PACKS_MAX if index.version > 1 else 0):
        return f"names {len(index.packs)} packs for {len(index.places)} tensors"
    if index.packs and index.shard_start < LENGTH_BYTES:
        return f"says that its shard's header takes {index.shard_start} bytes"
    for name, (number, begin) in index.places.items():
        span = header.tensors.get(name)
        if span is None or not 0 <= number < len(index.packs):
            return f"says that tensor {name!r} is in pack {number}, and one of the two there is not"
        if not 0 <= begin <= begin + span.end - span.begin <= index.packs[number].size_bytes:
            return f"says that tensor {name!r} begins at {begin} of a pack that is too small for it"
    return ""


def piece_is_sound(piece: Piece, data: memoryview) -> bool:
    """Return whether ``data`` is what the piece's digest says."""
    hasher = xxhash.xxh3_128()
    for part in range(0, len(data), HASH_BYTES):
        hasher.update(data[part : part + HASH_BYTES])
    return bool(hasher.hexdigest() == piece.digest)
