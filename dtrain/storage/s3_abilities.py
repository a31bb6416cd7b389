"""What the server behind an S3 store can do: tried out with objects made for it, once a process and store.

Servers that speak S3 differ in what they leave out, and many leave it out silently: a condition that is ignored
looks like success. So what dtrain relies on is tried, not believed:

| ability | without it |
|---|---|
| a CRC32C beside a body | Content-MD5 instead, or nothing: the digests in the manifest find all damage later |
| ranged reads | refused: no checkpoint could be read back |
| ``If-None-Match: *`` at a put, at the end of a put in parts | the store looks before it puts |
| the list of parts under way | an interrupted upload starts anew; a rule of the bucket must remove its parts |

The first three are tried before the first put, the others before the first put in parts. Each is some small requests.
"""

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.common.errors import DtrainError
from dtrain.storage.metering import UNMETERED
from dtrain.storage.objects import AlreadyExists, NotFound, StorageRefused
from dtrain.storage.parts import Scattered
from dtrain.storage.s3_bodies import Checksum, add_checksum, body
from dtrain.storage.s3_errors import S3Place, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        CreateMultipartUploadRequestTypeDef,
        PutObjectRequestTypeDef,
        UploadPartRequestTypeDef,
    )

_BYTES = b"dtrain writes this to see what the server can do, and deletes it again\n"
_BODY = Scattered([memoryview(_BYTES)])
_RANGE = (7, 12)  # first and last byte of the part that is read back

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PutAbilities:
    """Of plain puts and reads. Ranged reads are not among them: without these, nothing is put."""

    checksum: Checksum  # the best that the server takes
    creates_only: bool  # a put honours If-None-Match


@dataclass(frozen=True, slots=True, kw_only=True)
class PartAbilities:
    """Of puts in parts."""

    creates_only: bool  # the end of a put in parts honours If-None-Match
    lists: bool  # uploads under way, and their parts with sizes, can be listed


class Abilities:
    """What was found out about one store, when it is first asked for. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_puts: PutAbilities | None = None
        self._of_parts: PartAbilities | None = None

    def of_puts(self, trial: "Trial") -> PutAbilities:
        with self._lock:
            if self._of_puts is None:
                self._of_puts = trial.puts()
            return self._of_puts

    def of_parts(self, trial: "Trial") -> PartAbilities:
        checksum = self.of_puts(trial).checksum
        with self._lock:
            if self._of_parts is None:
                self._of_parts = trial.parts(checksum)
            return self._of_parts


_known: dict[str, Abilities] = {}  # by the store's URI: a process uses few
_known_lock = threading.Lock()


def abilities_of(uri: str) -> Abilities:
    """Return what this process knows of the store."""
    with _known_lock:
        return _known.setdefault(uri, Abilities())


class Trial:
    """Tries a server out. Raises the port's errors if it cannot be used at all just now."""

    def __init__(self, client: "S3Client", place: S3Place, prefix: str) -> None:
        """``prefix``: what the names of the store's objects start with."""
        self._client = client
        self._place = place
        self._prefix = prefix

    def puts(self) -> PutAbilities:
        name = self._name()
        checksum = self._best_checksum(name)
        try:
            self._read_range(name)
            creates_only = _is_kept_out(lambda: self._put(name, checksum, conditional=True))
        finally:
            self._delete(name)
        if checksum is Checksum.MD5:
            self._say("takes no CRC32C: Content-MD5 guards what is sent, which takes over a second a GiB")
        if checksum is Checksum.NONE:
            self._say("takes no checksum: what is damaged on its way is found by its digest, when it is read")
        if not creates_only:
            self._say(
                "ignores If-None-Match: create-only puts look first, which two writers at the same moment can pass "
                "together"
            )
        return PutAbilities(checksum=checksum, creates_only=creates_only)

    def parts(self, checksum: Checksum) -> PartAbilities:
        name = self._name()
        self._put(name, checksum)
        try:
            with translated(self._place, name, reading=False):
                upload_id = begin_upload(self._client, self._place.bucket, name, checksum)
            try:
                part = self._put_part(name, upload_id, checksum)
                lists = self._lists(name, upload_id)
                creates_only = _is_kept_out(lambda: self._complete(name, upload_id, part))
            finally:
                self._abort(name, upload_id)
        finally:
            self._delete(name)
        if not lists:
            self._say(
                "does not list uploads under way: an interrupted one starts anew, and a lifecycle rule of the bucket "
                "must remove its parts"
            )
        if not creates_only:
            self._say(
                "ignores If-None-Match at the end of an upload in parts: create-only puts of that size look first"
            )
        return PartAbilities(creates_only=creates_only, lists=lists)

    def _name(self) -> str:
        return f"{self._prefix}dtrain-probe-{secrets.token_hex(8)}"

    def _say(self, what: str) -> None:
        _log.warning("S3 at %s %s", self._place.endpoint, what)

    def _best_checksum(self, name: str) -> Checksum:
        first: StorageRefused | None = None
        for checksum in Checksum:
            try:
                self._put(name, checksum)
                return checksum
            except StorageRefused as error:  # "not implemented", in one of many spellings, or something else
                first = first or error
        assert first is not None
        raise first  # it has nothing to do with checksums

    def _put(self, name: str, checksum: Checksum, *, conditional: bool = False) -> None:
        request: PutObjectRequestTypeDef = {
            "Bucket": self._place.bucket,
            "Key": name,
            "Body": body(_BODY, UNMETERED),
            "ContentLength": len(_BYTES),
        }
        add_checksum(request, _BODY, checksum)
        if conditional:
            request["IfNoneMatch"] = "*"
        with translated(self._place, name, reading=False):
            self._client.put_object(**request)

    def _read_range(self, name: str) -> None:
        first, last = _RANGE
        with translated(self._place, name, reading=True):
            answer = self._client.get_object(Bucket=self._place.bucket, Key=name, Range=f"bytes={first}-{last}")
            with answer["Body"] as stream:
                found = stream.read()
        if not answer.get("ContentRange") or found != _BYTES[first : last + 1]:
            raise StorageRefused(
                f"S3 at {self._place.endpoint} ignores ranges, so no checkpoint could be read back: use another server."
            )

    def _put_part(self, name: str, upload_id: str, checksum: Checksum) -> "CompletedPartTypeDef":
        request: UploadPartRequestTypeDef = {
            "Bucket": self._place.bucket,
            "Key": name,
            "UploadId": upload_id,
            "PartNumber": 1,
            "Body": body(_BODY, UNMETERED),
            "ContentLength": len(_BYTES),
        }
        add_checksum(request, _BODY, checksum)
        with translated(self._place, name, reading=False):
            return completed_part(1, self._client.upload_part(**request)["ETag"], request)

    def _lists(self, name: str, upload_id: str) -> bool:
        try:
            with translated(self._place, name, reading=True):
                listed = self._client.list_multipart_uploads(Bucket=self._place.bucket, Prefix=name)
                parts = self._client.list_parts(Bucket=self._place.bucket, Key=name, UploadId=upload_id)
        except DtrainError:  # whatever it is: nothing hangs on it but time
            return False
        found = [upload.get("UploadId") for upload in listed.get("Uploads", []) if upload.get("Key") == name]
        return found == [upload_id] and [part.get("Size") for part in parts.get("Parts", [])] == [len(_BYTES)]

    def _complete(self, name: str, upload_id: str, part: "CompletedPartTypeDef") -> None:
        with translated(self._place, name, reading=False):
            self._client.complete_multipart_upload(
                Bucket=self._place.bucket,
                Key=name,
                UploadId=upload_id,
                MultipartUpload={"Parts": [part]},
                IfNoneMatch="*",
            )

    def _abort(self, name: str, upload_id: str) -> None:
        try:
            with translated(self._place, name, reading=True):
                self._client.abort_multipart_upload(Bucket=self._place.bucket, Key=name, UploadId=upload_id)
        except DtrainError as error:  # completed after all, or for the lifecycle rule
            _log.debug("the upload made for a trial is left: %s", error)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(NotFound), translated(self._place, name, reading=True):
            self._client.delete_object(Bucket=self._place.bucket, Key=name)


def begin_upload(client: "S3Client", bucket: str, name: str, checksum: Checksum) -> str:
    """Begin an upload in parts; return its id."""
    request: CreateMultipartUploadRequestTypeDef = {"Bucket": bucket, "Key": name}
    if checksum is Checksum.CRC32C:
        request["ChecksumAlgorithm"] = "CRC32C"
    return client.create_multipart_upload(**request)["UploadId"]


def completed_part(number: int, etag: str, sent: "UploadPartRequestTypeDef") -> "CompletedPartTypeDef":
    """Return what the end of the upload says of a part: with its checksum, if the server takes one."""
    part: CompletedPartTypeDef = {"PartNumber": number, "ETag": etag}
    if "ChecksumCRC32C" in sent:
        part["ChecksumCRC32C"] = sent["ChecksumCRC32C"]
    return part


def _is_kept_out(put: Callable[[], None]) -> bool:
    """Return whether a conditional put of what exists already is refused as such."""
    try:
        put()
    except AlreadyExists:
        return True
    except StorageRefused:  # "not implemented", in one of many spellings
        return False
    return False
