"""A store whose reads are tried again: for whoever reads a checkpoint outside of a job, and has no other plan.

One request in many thousands is answered "slow down" by any object store, and a checkpoint takes thousands of them.
A job's worker has its own ways to go on; a program that loads, an export and a look at what is there have this. Writes
are left to whoever knows what a second one would do.
"""

from collections.abc import Iterator
from pathlib import Path

from dtrain.storage.metering import UNMETERED, Meter
from dtrain.storage.objects import ObjectInfo, ObjectStore
from dtrain.storage.parts import FileParts
from dtrain.storage.retrying import with_retries


class PatientStore:
    """See :class:`dtrain.storage.objects.ObjectStore`. Writes pass as they are.

    ``deadline_s``: for one call, all tries together; then the last error is raised.
    """

    def __init__(self, store: ObjectStore, *, deadline_s: float) -> None:
        self._store = store
        self._deadline_s = deadline_s

    @property
    def uri(self) -> str:
        return self._store.uri

    def get(self, key: str) -> bytes:
        return with_retries(lambda: self._store.get(key), deadline_s=self._deadline_s)

    def read_into(self, key: str, target: memoryview, *, offset: int = 0) -> None:
        with_retries(lambda: self._store.read_into(key, target, offset=offset), deadline_s=self._deadline_s)

    def head(self, key: str) -> ObjectInfo | None:
        return with_retries(lambda: self._store.head(key), deadline_s=self._deadline_s)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield all of it, once all of it is there."""
        yield from with_retries(lambda: [*self._store.list(prefix)], deadline_s=self._deadline_s)

    def local_path(self, key: str) -> Path | None:
        return self._store.local_path(key)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> None:
        self._store.put(key, data, if_absent=if_absent)

    def put_file(self, key: str, source: FileParts, *, meter: Meter = UNMETERED) -> None:
        self._store.put_file(key, source, meter=meter)

    def abandon(self, prefix: str) -> None:
        self._store.abandon(prefix)

    def delete(self, key: str) -> None:
        self._store.delete(key)
