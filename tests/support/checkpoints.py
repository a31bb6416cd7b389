"""Makes a committed checkpoint in a store, as a job would have left it, for tests of whatever reads one."""

import json
from collections.abc import Mapping, Sequence

from dtrain.common.digests import blob_digest
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step
from dtrain.storage.indexes import index_shard
from dtrain.storage.keys import index_key, manifest_key, marker_key, shard_key
from dtrain.storage.manifests import CommitMarker, Manifest, ShardEntry, encode
from dtrain.storage.objects import ObjectStore
from dtrain.storage.shards import (
    RANK_ENTRY,
    STEP_ENTRY,
    TREE_ENTRY,
    WORLD_SIZE_ENTRY,
    TensorEntry,
    plan,
)

SPREAD = "all.spread"  # a tensor of which each rank has a part
SPREAD_BYTES = 16  # in each part


def shard_of(
    payload: bytes,
    *,
    rank: int,
    world_size: int,
    step: int,
    beside: Mapping[str, bytes] | None = None,
    place: int | None = None,
) -> bytes:
    """Return a shard whose last tensor, named after its rank, is the payload; ``beside``: those before it, by name.

    With ``place`` there is a tensor that all ranks share, in equal parts; this shard has the part with that number.
    """
    name = f"payload.{rank}"
    before = sorted({**(beside or {}), **({} if place is None else {SPREAD: bytes([place] * SPREAD_BYTES)})}.items())
    assert all(other < name for other, _ in before), "tensors lie in the order of their names"
    tensors = [
        _tensor(other, data) if other != SPREAD else _tensor(other, data, begin=(place or 0) * len(data), of=world_size)
        for other, data in (*before, (name, payload))
    ]
    metadata = {
        STEP_ENTRY: str(step),
        RANK_ENTRY: str(rank),
        WORLD_SIZE_ENTRY: str(world_size),
        TREE_ENTRY: json.dumps(
            {"objects": {other: {"tensor": other} for other, _ in before}, "local": {}, "random": {"tensor": name}}
        ),
    }
    return b"".join((plan(tensors, metadata).header, *(data for _, data in before), payload))


def _tensor(name: str, data: bytes, *, begin: int = 0, of: int = 1) -> TensorEntry:
    return TensorEntry(
        name=name,
        dtype="U8",
        shape=(len(data),),
        offsets_in_whole=(begin,),
        global_shape=(of * len(data),),
        size_bytes=len(data),
    )


def put_shard(
    store: ObjectStore, data: bytes, rank: int, *, job: str = "mnist", checkpoint: int = 1, attempt: int = 1
) -> ShardEntry:
    """Put a shard and its index as a worker would."""
    name, number, try_number = JobName(job), CheckpointNumber(checkpoint), AttemptNumber(attempt)
    key, beside = shard_key(name, number, try_number, rank), index_key(name, number, try_number, rank)
    index, digest = index_shard(memoryview(data))
    store.put(key, data)
    store.put(beside, index)
    return ShardEntry(
        rank=rank,
        key=key,
        size_bytes=len(data),
        digest=digest,
        index_key=beside,
        index_digest=blob_digest(index),
    )


def write_checkpoint(
    store: ObjectStore,
    payloads: Sequence[bytes],
    *,
    job: str = "mnist",
    checkpoint: int = 1,
    attempt: int = 1,
    generation: int = 1,
    step: int = 100,
    position_seq: int = 7,
) -> CommitMarker:
    """Put one shard a rank, which holds its payload, then the manifest and the marker; return the marker."""
    name, number, try_number = JobName(job), CheckpointNumber(checkpoint), AttemptNumber(attempt)
    entries = []
    for rank, payload in enumerate(payloads):
        data = shard_of(payload, rank=rank, world_size=len(payloads), step=step)
        entries.append(put_shard(store, data, rank, job=job, checkpoint=checkpoint, attempt=attempt))
    manifest = encode(
        Manifest(
            job=name,
            checkpoint=number,
            attempt=try_number,
            generation=Generation(generation),
            step=Step(step),
            world_size=len(payloads),
            shards=tuple(entries),
        )
    )
    store.put(manifest_key(name, number, try_number), manifest, if_absent=True)
    marker = CommitMarker(
        job=name,
        checkpoint=number,
        attempt=try_number,
        step=Step(step),
        manifest_key=manifest_key(name, number, try_number),
        manifest_digest=blob_digest(manifest),
        position_seq=position_seq,
        position_digest="0" * 64,
    )
    store.put(marker_key(name, number), encode(marker))
    return marker
