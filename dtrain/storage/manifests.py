"""The two small JSON objects that make a checkpoint out of shards: manifest and commit marker.

Two leaders may write the manifest of the same attempt, and both must write the same bytes: so encoding is
canonical (sorted keys, no white space) and holds no time and no writer. Decoding accepts nothing but what
encoding gives: an unknown field, another order or an unknown version is refused, because a manifest that is
half understood would restore half a model.
"""

import re
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from dtrain.common.digests import BLOB_ALGORITHM
from dtrain.common.errors import DtrainError, ShardDamagedError
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step
from dtrain.common.packs import PACKS_MAX, Pack
from dtrain.storage.keys import job_prefix, manifest_key, shard_key, validate_key

MANIFEST_VERSION = 3  # 1 knew no indexes, 2 no packs
OLDER_MANIFEST_VERSION = 2  # read for ever
MARKER_VERSION = 1
_DIGEST = re.compile(re.escape(BLOB_ALGORITHM) + ":[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One rank's blob, as storage confirmed it."""

    rank: int  # 0 <= rank < world_size
    key: str
    size_bytes: int  # > 0: a shard has at least its header
    digest: str  # "xxh3-128:<hex>" of the whole blob
    index_key: str
    index_digest: str  # "xxh3-128:<hex>" of the index's bytes
    packs: tuple[Pack, ...] = ()  # by key, each once: what else the rank's state lies in

    @property
    def objects(self) -> "tuple[ShardEntry | Pack, ...]":
        """Everything that holds bytes of the rank's state."""
        return (self, *self.packs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The immutable list of an attempt's shards."""

    version: int = MANIFEST_VERSION
    job: JobName
    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    generation: Generation
    step: Step
    world_size: int  # >= 1
    shards: tuple[ShardEntry, ...]  # exactly one of each rank, in the order of ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitMarker:
    """Says in storage that a checkpoint is committed, and which event of the log said it first."""

    version: int = MARKER_VERSION
    job: JobName
    checkpoint: CheckpointNumber
    attempt: AttemptNumber
    step: Step
    manifest_key: str
    manifest_digest: str  # "xxh3-128:<hex>" of the manifest's bytes
    position_seq: int  # sequence number of the job's CheckpointCommitted event, >= 1
    position_digest: str  # chain digest of that event, 64 hex digits


class _Version(msgspec.Struct):
    version: int


_Record = TypeVar("_Record", Manifest, CommitMarker)


def encode(record: Manifest | CommitMarker) -> bytes:
    """Return the canonical JSON. The same record gives the same bytes, always. Raises ValueError on nonsense."""
    _check(record)
    if isinstance(record, Manifest) and record.version == OLDER_MANIFEST_VERSION:
        document = msgspec.to_builtins(record)
        for shard in document["shards"]:
            del shard["packs"]
        return msgspec.json.encode(document, order="sorted")
    return msgspec.json.encode(record, order="sorted")


def decode_manifest(data: bytes, *, key: str = "manifest") -> Manifest:
    """Return the manifest in ``data``; raise :class:`ShardDamagedError` naming ``key`` if it is not one."""
    return _decode(data, Manifest, (OLDER_MANIFEST_VERSION, MANIFEST_VERSION), key)


def decode_marker(data: bytes, *, key: str = "commit marker") -> CommitMarker:
    """Return the commit marker in ``data``; raise :class:`ShardDamagedError` naming ``key`` if it is not one."""
    return _decode(data, CommitMarker, (MARKER_VERSION,), key)


def _decode(data: bytes, kind: type[_Record], versions: tuple[int, ...], key: str) -> _Record:
    try:
        found = msgspec.json.decode(data, type=_Version).version
        if found not in versions:
            readable = " and ".join(map(str, versions))
            raise ShardDamagedError(key, f"has version {found}; this dtrain reads version {readable}")
        record = msgspec.json.decode(data, type=kind)
        canonical = encode(record)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise ShardDamagedError(key, f"cannot be read: {error}") from error
    if canonical != data:
        raise ShardDamagedError(key, "is not in canonical form: it was changed, or holds fields unknown here")
    return record


def _check(record: Manifest | CommitMarker) -> None:
    """Raise ValueError if a field is outside its invariant."""
    try:
        own_manifest_key = manifest_key(record.job, record.checkpoint, record.attempt)
        if isinstance(record, Manifest):
            _check_manifest(record)
        elif record.manifest_key != own_manifest_key:
            raise ValueError(f"manifest_key {record.manifest_key!r} is not {own_manifest_key!r}")
        elif not _DIGEST.fullmatch(record.manifest_digest):
            raise ValueError(f"manifest_digest {record.manifest_digest!r} is no digest")
        elif record.position_seq < 1 or not re.fullmatch("[0-9a-f]{64}", record.position_digest):
            raise ValueError("the position in the log is not valid")
    except DtrainError as error:  # a bad job name or number
        raise ValueError(str(error)) from error
    if record.step < 0:
        raise ValueError(f"step {record.step} is negative")


def _check_manifest(manifest: Manifest) -> None:
    if manifest.generation < 1 or manifest.world_size < 1:
        raise ValueError("generation and world_size must be 1 or more")
    if [entry.rank for entry in manifest.shards] != list(range(manifest.world_size)):
        raise ValueError(f"the shards must be those of ranks 0 to {manifest.world_size - 1}, in order")
    folder = job_prefix(manifest.job)
    for entry in manifest.shards:
        shard_key(manifest.job, manifest.checkpoint, manifest.attempt, entry.rank)  # checks the rank's range
        for key, digest in ((entry.key, entry.digest), (entry.index_key, entry.index_digest)):
            if not validate_key(key).startswith(folder):
                raise ValueError(f"key {key!r} is not under {folder}")
            if entry.size_bytes < 1 or not _DIGEST.fullmatch(digest):
                raise ValueError(f"size or digest of {key} is not valid")
        _check_packs(entry, folder, manifest.version)


def _check_packs(entry: ShardEntry, folder: str, version: int) -> None:
    if len(entry.packs) > (PACKS_MAX if version == MANIFEST_VERSION else 0):
        raise ValueError(f"rank {entry.rank} names {len(entry.packs)} packs, which is too many")
    if [pack.key for pack in entry.packs] != sorted({pack.key for pack in entry.packs}):
        raise ValueError(f"the packs of rank {entry.rank} are not in order, or one is named twice")
    for pack in entry.packs:
        if not validate_key(pack.key).startswith(f"{folder}packs/"):
            raise ValueError(f"pack {pack.key!r} is not under {folder}packs/")
        if pack.size_bytes < 1 or not _DIGEST.fullmatch(pack.digest):
            raise ValueError(f"size or digest of {pack.key} is not valid")
