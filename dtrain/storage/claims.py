"""Attempts of programs that no coordinator numbers: each save claims one, so that no two saves share a key.

Nobody stands between two programs that save the same checkpoint, or between two saves of one program. What one of
them has committed must never change, so whoever begins takes a number that nobody had: create-only, before anything
else is written. Whose marker comes first has the checkpoint; the other's attempt stays aside, as an aborted one does.
"""

import itertools
import json
import re

from dtrain.common.errors import ShardDamagedError, UserError
from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName
from dtrain.storage.catalogs import is_of_job
from dtrain.storage.keys import (
    ATTEMPT_MAX,
    MARKER_NAME,
    checkpoint_prefix,
    claim_key,
    job_prefix,
    marker_key,
)
from dtrain.storage.objects import AlreadyExists, ObjectStore
from dtrain.storage.retrying import read_again_if_damaged, with_retries
from dtrain.storage.shards import TREE_ENTRY
from dtrain.storage.verify import read_index, read_manifest, read_marker

LOOKED_AT_MAX = 1000  # objects of a job among which a marker is looked for: what one request to S3 lists
_CLAIM = b"a program outside of a job took this number for a save\n"
_ATTEMPT = re.compile(r"attempt-([0-9]{6})/")


def claim_attempt(
    store: ObjectStore, job: JobName, checkpoint: CheckpointNumber, *, deadline_s: float
) -> AttemptNumber:
    """Return the number of an attempt that is this caller's alone.

    Raises :class:`UserError` if the checkpoint is committed, or if the name is that of a job of dtrain's own.
    """
    check_free(store, job, checkpoint, deadline_s=deadline_s)
    if with_retries(lambda: _is_of_own_job(store, job), deadline_s=deadline_s):
        raise UserError(
            f"{job} in {store.uri} is a job that ran under dtrain, whose log knows nothing of other programs: "
            "give job= another name."
        )
    prefix = checkpoint_prefix(job, checkpoint)
    there = with_retries(lambda: list(store.list(prefix)), deadline_s=deadline_s)
    taken = [int(found[1]) for info in there if (found := _ATTEMPT.match(info.key, len(prefix)))]
    for number in range(max(taken, default=0) + 1, ATTEMPT_MAX + 1):
        attempt = AttemptNumber(number)
        try:
            _claim(store, claim_key(job, checkpoint, attempt), deadline_s)
        except AlreadyExists:  # another's, or our own of a try whose answer was lost: there are numbers enough
            continue
        return attempt
    raise UserError(f"checkpoint {checkpoint} of {job} has no attempt left: give another number.")


def check_free(store: ObjectStore, job: JobName, checkpoint: CheckpointNumber, *, deadline_s: float) -> None:
    """Raise :class:`UserError` if the checkpoint is committed."""
    if with_retries(lambda: store.head(marker_key(job, checkpoint)), deadline_s=deadline_s) is not None:
        raise UserError(f"checkpoint {checkpoint} of {job} is in {store.uri} already: give another number.")


def _claim(store: ObjectStore, key: str, deadline_s: float) -> None:
    with_retries(lambda: store.put(key, _CLAIM, if_absent=True), deadline_s=deadline_s)


def _is_of_own_job(store: ObjectStore, job: JobName) -> bool:
    """Return whether the job's first committed checkpoint, if it is found at once, has what only dtrain's jobs keep."""
    listed = itertools.islice(store.list(job_prefix(job)), LOOKED_AT_MAX)
    key = next((info.key for info in listed if info.key.endswith("/" + MARKER_NAME)), None)
    if key is None:
        return False
    try:
        marker = read_again_if_damaged(lambda: read_marker(store, key))
        manifest = read_again_if_damaged(lambda: read_manifest(store, marker.manifest_key, marker.manifest_digest))
        shard, _ = read_again_if_damaged(lambda: read_index(store, manifest.shards[0]))
        return is_of_job(json.loads(shard.header.metadata[TREE_ENTRY]))
    except (ShardDamagedError, KeyError, ValueError):  # says nothing about whose it is
        return False
