"""The indexes that uploads are compared with: what of a rank's state lies in storage already.

The coordinator names the base of an attempt by the index and its digest, as they are in the log. Mostly this worker
uploaded that index itself and still has it; after a restart, or when the rank came from another node, it is read from
storage. A base only spares bytes: where it cannot be had, everything is sent.
"""

import logging
import threading

from dtrain.common.digests import blob_digest
from dtrain.common.errors import DtrainError, ShardDamagedError
from dtrain.common.names import JobName
from dtrain.storage.indexes import IndexedShard, open_index
from dtrain.storage.objects import ObjectStore
from dtrain.storage.retrying import GaveUp, with_retries
from dtrain.worker.core.actions import Upload
from dtrain.worker.core.states import BaseIndex

logger = logging.getLogger(__name__)

DEADLINE_S = 20.0  # to read an index; after it sending everything is the quicker way
KEPT_A_RANK = 2  # the newest committed one's, and that of an attempt which may become it


class Bases:
    """Indexes that this worker uploaded, by rank. Used from threads, at most one a rank."""

    def __init__(self) -> None:
        self._kept: dict[tuple[JobName, int], dict[str, bytes]] = {}

    def keep(self, upload: Upload, index: bytes) -> None:
        """Remember what was uploaded; the oldest is forgotten."""
        found = self._kept.setdefault((upload.job, upload.rank), {})
        found[blob_digest(index)] = index
        while len(found) > KEPT_A_RANK:
            del found[next(iter(found))]

    def forget(self, job: JobName) -> None:
        """The job has left this node."""
        for key in [key for key in self._kept if key[0] == job]:
            del self._kept[key]

    def find(self, upload: Upload, store: ObjectStore, give_up: threading.Event) -> IndexedShard | None:
        """Return the base of this upload, verified, or None. Raises GaveUp."""
        named = next((base for base in upload.request.bases if base.rank == upload.rank), None)
        if named is None:
            return None
        data = self._kept.get((upload.job, upload.rank), {}).get(named.index_digest)
        try:
            if data is None:
                data = _read(named, store, give_up)
            return open_index(data, key=named.index_key, shard_key=named.index_key)
        except GaveUp:
            raise
        except DtrainError as error:
            logger.warning("%s rank %d is sent whole, for what it builds upon: %s", upload.job, upload.rank, error)
            return None


def _read(named: BaseIndex, store: ObjectStore, give_up: threading.Event) -> bytes:
    data = with_retries(lambda: store.get(named.index_key), deadline_s=DEADLINE_S, give_up=give_up)
    if (digest := blob_digest(data)) != named.index_digest:
        raise ShardDamagedError(named.index_key, f"has digest {digest}, but {named.index_digest} is recorded")
    return data
