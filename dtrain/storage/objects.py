"""The port between checkpoints and wherever their bytes are kept.

Everything above this file must work alike on a folder, on S3 and in a test's memory, so the port is narrow:
whole objects are put, parts of them are read, and nothing is ever changed in place.

Rules that every store keeps:

- **Durable.** When :meth:`ObjectStore.put` returns, the object survives the loss of power (as far as the
  storage itself keeps its word). A put that raises may have happened, or not; it never leaves half an object
  to be seen.
- **Atomic.** A reader sees the whole old object, the whole new one, or none.
- **Create-only.** With ``if_absent`` exactly one of any number of writers wins. :class:`AlreadyExists` may
  also be the answer to one's own earlier try whose answer was lost: the caller reads the object back and
  compares. Where a server cannot do this, the store says so (see ``s3.py``).
- **Keys** are checked by :func:`dtrain.storage.keys.validate_key`; no key is the folder of another.

Order of calls for a checkpoint: ``put`` each shard; then ``put`` the manifest ``if_absent``; then ``put`` the
commit marker. Readers go the other way: marker, manifest, shards. Retention deletes the marker first.

Every call blocks and may be made from any thread. Errors are the classes below (and
:class:`~dtrain.storage.keys.InvalidKey`): the retryable ones go through :mod:`dtrain.storage.retrying`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dtrain.common.errors import PermanentError, RetryableError
from dtrain.storage.metering import UNMETERED, Meter
from dtrain.storage.parts import FileParts


class StorageUnavailable(RetryableError):
    """The storage did not answer, or answered that it cannot now."""


class StorageFull(RetryableError):
    """No room. Retryable, because somebody may make room while training goes on."""


class StorageRefused(PermanentError):
    """The storage refuses for good (no right, no such bucket, not a folder). The text names the mend."""


class NotFound(PermanentError):
    """There is no object of this key."""


class AlreadyExists(PermanentError):
    """A create-only put found an object of this key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What a store tells of an object without reading it."""

    key: str
    size_bytes: int  # >= 0


class ObjectStore(Protocol):
    """Blobs by key. See the module's text for the order of calls and the rules of durability."""

    @property
    def uri(self) -> str:
        """Where this is, in the form that :func:`dtrain.storage.uris.open_store` takes. Holds no secret."""
        ...

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> None:
        """Store ``data``; durable when this returns. ``if_absent``: raise :class:`AlreadyExists` if present.

        ``data`` must not change until the call returns.
        """
        ...

    def put_file(self, key: str, source: FileParts, *, meter: Meter = UNMETERED) -> None:
        """Store the parts of an open file, as :meth:`put` does.

        For large objects: a store that can leaves the bytes in the kernel, and goes on with what an earlier call for
        this key, also one of a process that was killed, has sent already.
        ``meter`` is asked before each slice and told after it.
        """
        ...

    def abandon(self, prefix: str) -> None:
        """Give back the room of puts that were cut off and whose keys start with ``prefix``.

        For attempts that nobody wants any more, before their objects are listed and deleted: a put under way fails,
        or has its object listed. Nothing that a reader can see changes.
        """
        ...

    def get(self, key: str) -> bytes:
        """Return the whole object. For small ones: manifests and markers. Raises :class:`NotFound`."""
        ...

    def read_into(self, key: str, target: memoryview, *, offset: int = 0) -> None:
        """Fill ``target`` (writable) with the object's bytes from ``offset`` on.

        Raises :class:`NotFound`, or :class:`~dtrain.common.errors.ShardDamagedError` if the object ends before
        ``target`` is full; what ``target`` then holds is not defined.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """Return where a process on this node may find the object as a file of the same bytes; None if nowhere.

        A hint, which touches nothing: there may be no such file, or another one. Whoever reads it verifies what it
        reads, and goes back to :meth:`read_into` for whatever is not as it should be.
        """
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of the object, or None if there is none."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with ``prefix`` (plain text, any place in the key), by key order.

        The order is that of the keys' UTF-8 bytes. An object put or deleted meanwhile may or may not be seen.
        """
        ...

    def delete(self, key: str) -> None:
        """Delete the object; fine if there is none. Durable when this returns."""
        ...
