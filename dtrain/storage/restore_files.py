"""Names and texts of the files through which a trainer and its worker restore together.

They lie in the generation's folder in shared memory; trainer/restoring.py tells their order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from dtrain.common.errors import PermanentError
from dtrain.storage.indexes import IndexedShard, Piece
from dtrain.storage.ranges import NeededRange, Span, covers

RESTORE_FOLDER = "restore"  # in the generation's folder
MANIFEST_FILE = "manifest.json"  # written last: then all indexes are there
INDEX_FILE = "rank-{:05d}.index.json"
SOURCES_FILE = "sources.json"  # written before the manifest
SHARD_FILE = "rank-{:05d}.safetensors"  # as large as the shard, with holes where nothing is needed
NEEDS_FILE = "needs.json"  # in a rank's folder


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOfImage:
    """A file laid out as a shard's image, of which only some is there."""

    path: str
    spans: list[Span]  # in order, none touching another

    def holds(self, piece: Piece) -> bool:
        return covers(self.spans, piece.begin, piece.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where on this node a checkpoint's bytes probably lie. Nothing of it is verified."""

    images: dict[int, str] = field(default_factory=dict)  # shard -> path of a file that begins with its image
    parts: dict[int, PartOfImage] = field(default_factory=dict)  # shard -> what the node fetched of it before
    objects: dict[str, str] = field(default_factory=dict)  # key of an object -> path of a file that is the object

    def place_of(self, shard: int, piece: Piece) -> tuple[str, int] | None:
        """Return the file that the piece probably lies in, and where it begins there; None if nowhere on this node."""
        if shard in self.images:
            return self.images[shard], piece.begin
        if shard in self.parts and self.parts[shard].holds(piece):
            return self.parts[shard].path, piece.begin
        if piece.key in self.objects:
            return self.objects[piece.key], piece.at
        return None


def encode_sources(sources: Sources) -> bytes:
    return msgspec.json.encode(sources)


def decode_sources(data: bytes) -> Sources:
    """Return what :func:`encode_sources` was given. Raises :class:`PermanentError` if that is not what this is."""
    try:
        return msgspec.json.decode(data, type=Sources)
    except msgspec.DecodeError as error:
        raise PermanentError(f"the worker's {SOURCES_FILE} cannot be read: {error}") from error


def encode_needs(needed: Iterable[NeededRange]) -> bytes:
    """Return what a rank needs as JSON."""
    return msgspec.json.encode([(part.shard, part.tensor, part.begin, part.end) for part in sorted(needed)])


def decode_needs(data: bytes, shards: Sequence[IndexedShard]) -> list[NeededRange]:
    """Return what :func:`encode_needs` was given. Raises :class:`PermanentError` if that is not in ``shards``."""
    try:
        rows = msgspec.json.decode(data, type=list[tuple[int, str, int, int]])
    except msgspec.DecodeError as error:
        raise PermanentError(f"a trainer's {NEEDS_FILE} cannot be read: {error}") from error
    needed = [NeededRange(shard=shard, tensor=tensor, begin=begin, end=end) for shard, tensor, begin, end in rows]
    for part in needed:
        span = shards[part.shard].header.tensors.get(part.tensor) if 0 <= part.shard < len(shards) else None
        if span is None or not 0 <= part.begin <= part.end <= span.end - span.begin:
            raise PermanentError(f"a trainer's {NEEDS_FILE} names {part}, which the checkpoint does not have")
    return needed
