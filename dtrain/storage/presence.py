"""Is everything of a checkpoint there, at its recorded size? Reads manifest and indexes, and of the shards nothing.

This finds what was deleted or cut short, at the cost of two questions a shard; a flipped bit it does not find.
For that see :mod:`dtrain.storage.verify`, which reads every byte.
"""

from functools import partial

from dtrain.common.errors import ShardDamagedError
from dtrain.common.names import JobName
from dtrain.storage.keys import MANIFEST_NAME, MARKER_NAME, job_prefix
from dtrain.storage.objects import ObjectStore
from dtrain.storage.retrying import read_again_if_damaged
from dtrain.storage.verify import read_index, read_manifest, read_marker, see_object


def shows_checkpoints(store: ObjectStore, job: JobName) -> bool:
    """Return whether the store shows anything that the coordinator wrote of the job: a manifest or a commit marker.

    One that shows none is far more often another machine's folder, or one that is not mounted here, than a store that
    lost them all; and a node may have left shards of its own in such a folder.
    """
    names = (MANIFEST_NAME, MARKER_NAME)
    return any(info.key.rpartition("/")[2] in names for info in store.list(job_prefix(job)))


def missing_parts(store: ObjectStore, manifest_key: str, manifest_digest: str) -> list[ShardDamagedError]:
    """Return what is not there as recorded; the digest of the manifest is the log's.

    Errors of the store itself (unreachable, refused) are raised: they say nothing about the checkpoint.
    """
    try:
        manifest = read_again_if_damaged(partial(read_manifest, store, manifest_key, manifest_digest))
    except ShardDamagedError as finding:
        return [finding]
    found = []
    for entry in manifest.shards:
        for part in entry.objects:
            try:
                see_object(store, part)
            except ShardDamagedError as finding:
                found.append(finding)
        try:
            read_again_if_damaged(partial(read_index, store, entry))
        except ShardDamagedError as finding:
            found.append(finding)
    return found


def damaged_marker(store: ObjectStore, marker_key: str, manifest_digest: str) -> ShardDamagedError | None:
    """Return what is wrong with a commit marker, None if it is sound. Nothing is restored by it: it is a notice."""
    try:
        marker = read_again_if_damaged(partial(read_marker, store, marker_key))
    except ShardDamagedError as finding:
        return finding
    if marker.manifest_digest != manifest_digest:
        return ShardDamagedError(marker_key, f"names a manifest of digest {marker.manifest_digest}, not the log's")
    return None
