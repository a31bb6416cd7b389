"""Makes a committed checkpoint in a store, as a job would have left it, for tests of whatever reads one."""

from collections.abc import Sequence

from dtrain.common.digests import blob_digest
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step
from dtrain.storage.keys import manifest_key, marker_key, shard_key
from dtrain.storage.manifests import CommitMarker, Manifest, ShardEntry, encode
from dtrain.storage.objects import ObjectStore


def write_checkpoint(
    store: ObjectStore,
    shards: Sequence[bytes],
    *,
    job: str = "mnist",
    checkpoint: int = 1,
    attempt: int = 1,
    generation: int = 1,
    step: int = 100,
    position_seq: int = 7,
) -> CommitMarker:
    """Put one shard a rank, the manifest and the marker, in this order; return the marker."""
    name, number, try_number = JobName(job), CheckpointNumber(checkpoint), AttemptNumber(attempt)
    entries = []
    for rank, data in enumerate(shards):
        key = shard_key(name, number, try_number, rank)
        store.put(key, data)
        entries.append(ShardEntry(rank=rank, key=key, size_bytes=len(data), digest=blob_digest(data)))
    manifest = encode(
        Manifest(
            job=name,
            checkpoint=number,
            attempt=try_number,
            generation=Generation(generation),
            step=Step(step),
            world_size=len(shards),
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
