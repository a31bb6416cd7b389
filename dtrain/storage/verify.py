"""Does storage still hold what the log calls committed? Reads everything, and names what does not match.

A digest proves a blob only if the digest itself is to be trusted, so trust goes down a chain: the event (or
the caller) knows the manifest's digest, the manifest knows the shards'. Memory stays bounded whatever a
shard's size: one chunk at a time. A network may damage what it carries, so damage is what several readings in a
row found, all of them: who reads this writes checkpoints off for ever.
"""

from functools import partial

import xxhash

from dtrain.common.digests import BLOB_ALGORITHM, blob_digest
from dtrain.common.errors import ShardDamagedError, ShardMissingError
from dtrain.common.packs import Pack
from dtrain.storage.indexes import IndexedShard, Piece, open_index, piece_is_sound
from dtrain.storage.keys import MARKER_NAME
from dtrain.storage.manifests import CommitMarker, Manifest, ShardEntry, decode_manifest, decode_marker
from dtrain.storage.objects import NotFound, ObjectStore
from dtrain.storage.ranges import read_header, read_range
from dtrain.storage.retrying import read_again_if_damaged

CHUNK_BYTES = 32 * 1024 * 1024  # read at a time, and the memory used; large enough for one request to S3 to pay


def verify_checkpoint(
    store: ObjectStore, key: str, expected_manifest_digest: str | None = None
) -> list[ShardDamagedError]:
    """Return everything that is wrong with a checkpoint; an empty list says that each byte is as recorded.

    ``key`` is that of a commit marker (whose digest of the manifest is then used) or of a manifest.
    ``expected_manifest_digest`` is what the log says; without it a manifest is believed as it stands.
    Errors of the store itself (unreachable, refused) are raised: they say nothing about the checkpoint.
    """
    try:
        manifest = read_again_if_damaged(partial(_read_from, store, key, expected_manifest_digest))
    except ShardDamagedError as finding:
        return [finding]
    largest_bytes = max(part.size_bytes for entry in manifest.shards for part in entry.objects)
    buffer = memoryview(bytearray(min(CHUNK_BYTES, largest_bytes)))
    found: list[ShardDamagedError] = []
    for entry in manifest.shards:
        for part in entry.objects:
            try:
                _verify_object(store, entry, part, buffer)
            except ShardDamagedError as finding:
                found.append(finding)
        try:
            read_again_if_damaged(partial(read_index, store, entry))
        except ShardDamagedError as finding:
            found.append(finding)
    return found


def read_marker(store: ObjectStore, key: str) -> CommitMarker:
    """Return the commit marker; raise :class:`ShardDamagedError` if it is missing or cannot be read."""
    return decode_marker(_get(store, key), key=key)


def read_manifest(store: ObjectStore, key: str, expected_digest: str | None = None) -> Manifest:
    """Return the manifest; raise :class:`ShardDamagedError` if missing, unreadable or not of this digest."""
    data = _get(store, key)
    if expected_digest is not None and (digest := blob_digest(data)) != expected_digest:
        raise ShardDamagedError(key, f"has digest {digest}, but {expected_digest} is recorded")
    return decode_manifest(data, key=key)


def read_index(store: ObjectStore, entry: ShardEntry) -> tuple[IndexedShard, bytes]:
    """Return a shard's index and its bytes; raise ShardDamagedError if missing, unreadable or not of this digest."""
    data = _get(store, entry.index_key)
    return open_entry(data, entry), data


def open_entry(data: bytes, entry: ShardEntry) -> IndexedShard:
    """Return what ``data``, a shard's index, says; raise ShardDamagedError if it is not what the manifest records."""
    if (digest := blob_digest(data)) != entry.index_digest:
        raise ShardDamagedError(entry.index_key, f"has digest {digest}, but {entry.index_digest} is recorded")
    shard = open_index(data, key=entry.index_key, shard_key=entry.key)
    if shard.stored_bytes != entry.size_bytes:
        raise ShardDamagedError(entry.index_key, f"is of a shard of other size than the {entry.size_bytes} recorded")
    if shard.index.packs != entry.packs:
        raise ShardDamagedError(entry.index_key, "names other packs than are recorded")
    return shard


def _read_from(store: ObjectStore, key: str, expected_manifest_digest: str | None) -> Manifest:
    if key.rpartition("/")[2] != MARKER_NAME:
        return read_manifest(store, key, expected_manifest_digest)
    marker = read_marker(store, key)
    if expected_manifest_digest is not None and marker.manifest_digest != expected_manifest_digest:
        raise ShardDamagedError(
            key, f"says that the manifest has digest {marker.manifest_digest}, but the log {expected_manifest_digest}"
        )
    manifest = read_manifest(store, marker.manifest_key, marker.manifest_digest)
    theirs = (manifest.job, manifest.checkpoint, manifest.attempt, manifest.step)
    if theirs != (marker.job, marker.checkpoint, marker.attempt, marker.step):
        raise ShardDamagedError(marker.manifest_key, f"is not of the checkpoint that {key} names")
    return manifest


def _get(store: ObjectStore, key: str) -> bytes:
    try:
        return store.get(key)
    except NotFound as error:
        raise ShardMissingError(key) from error


def see_object(store: ObjectStore, part: ShardEntry | Pack) -> None:
    """Raise :class:`ShardDamagedError` if the object is missing or has another size than recorded."""
    found = store.head(part.key)
    if found is None:
        raise ShardMissingError(part.key)
    if found.size_bytes != part.size_bytes:
        raise ShardDamagedError(part.key, f"has {found.size_bytes} bytes, but {part.size_bytes} are recorded")


class _OtherDigest(ShardDamagedError):
    """All bytes are there, and they are others."""


def _verify_object(store: ObjectStore, entry: ShardEntry, part: ShardEntry | Pack, buffer: memoryview) -> None:
    """Read a rank's shard or one of its packs, and again if it came damaged. Raises what all readings found.

    Bits that flip on the way do so in every reading of a large object, if the way is bad enough. So what differs is
    believed only once it is found in a part that a restore would read, and in each of as many readings of that part.
    """
    try:
        read_again_if_damaged(partial(_read_object, store, part, buffer))
    except _OtherDigest as other:
        where = _damaged_parts(store, entry, part.key)
        if where:
            raise ShardDamagedError(part.key, f"{other.why}; damaged: {where}") from None


def _read_object(store: ObjectStore, part: ShardEntry | Pack, buffer: memoryview) -> None:
    see_object(store, part)
    hasher = xxhash.xxh3_128()
    for start in range(0, part.size_bytes, len(buffer)):
        chunk = buffer[: min(len(buffer), part.size_bytes - start)]
        try:
            store.read_into(part.key, chunk, offset=start)
        except NotFound as error:
            raise ShardDamagedError(part.key, "went missing while it was read") from error
        hasher.update(chunk)
    digest = f"{BLOB_ALGORITHM}:{hasher.hexdigest()}"
    if digest != part.digest:
        raise _OtherDigest(part.key, f"has digest {digest}, but {part.digest} is recorded")


def _damaged_parts(store: ObjectStore, entry: ShardEntry, key: str) -> str:
    """Name the tensors of a rank that lie in this object and do not match their digests; empty if all do."""
    try:
        shard, _ = read_again_if_damaged(partial(read_index, store, entry))
    except ShardDamagedError as error:
        return f"unknown, for its index is damaged too ({error.why})"
    found: dict[str, None] = {}
    if key == entry.key:
        try:
            read_again_if_damaged(partial(read_header, store, shard))
        except ShardDamagedError:
            found["its header"] = None
    for name, span in shard.header.tensors.items():
        if shard.places[name][0] != key:
            continue
        for piece in shard.pieces(name, 0, span.end - span.begin):
            try:
                read_again_if_damaged(partial(_read_piece, store, piece))
            except ShardDamagedError:
                found[f"tensor {name!r}"] = None
    return ", ".join(found)


def _read_piece(store: ObjectStore, piece: Piece) -> None:
    data = memoryview(bytearray(piece.end - piece.begin))
    read_range(store, piece.key, data, offset=piece.at)
    if not piece_is_sound(piece, data):
        raise ShardDamagedError(piece.key, f"tensor {piece.tensor!r} does not match its digest")
