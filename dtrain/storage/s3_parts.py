"""Large objects go to S3 in parts, and an upload that was cut off goes on where it stopped.

The server keeps the parts of an unfinished upload, invisible, until it is completed or aborted. So after a crash of
the uploader, or of the way to the server, the next try for the same key

1. lists the uploads under way of exactly this key; the newest goes on, older ones are aborted;
2. lists its parts, and believes none of them: a part counts if it has the number, the size and the checksum of the
   bytes that are to be stored (its CRC32C, or its ETag, which is the MD5 of a part that the server does not encrypt);
3. sends what is missing, and completes.

Where the server lists nothing, every try begins anew, and one that fails takes its parts back. Whoever deletes an
attempt aborts what is under way below its prefix (:meth:`PartUploads.abandon`), so that nothing is left of an
uploader that never came back. Some servers list by exact keys only (MinIO): they expire unfinished uploads
themselves. On others a lifecycle rule of the bucket should, as a last resort.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.common.errors import DtrainError, RetryableError
from dtrain.storage.metering import Meter
from dtrain.storage.objects import NotFound, StorageRefused
from dtrain.storage.parts import Scattered
from dtrain.storage.retrying import GaveUp
from dtrain.storage.s3_abilities import begin_upload, completed_part
from dtrain.storage.s3_bodies import Checksum, add_checksum, body, crc32c, etag
from dtrain.storage.s3_errors import S3Place, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        CompleteMultipartUploadRequestTypeDef,
        MultipartUploadTypeDef,
        PartTypeDef,
        UploadPartRequestTypeDef,
    )

PART_BYTES = 64 * 1024 * 1024  # measured best with two at a time
PART_MIN_BYTES = 5 * 1024 * 1024  # S3's rule for all parts but the last
PARTS_MAX = 10_000  # S3's rule; larger objects get larger parts
UPLOAD_THREADS = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Upload:
    """One upload under way, and what goes into it."""

    key: str  # as the caller knows it
    name: str  # as the server does
    id: str
    parts: Sequence[Scattered]  # part n is parts[n - 1]
    there: Mapping[int, "PartTypeDef"]  # by number: what the server lists; not compared yet
    checksum: Checksum
    meter: Meter


class PartUploads:
    """Uploads in parts to one bucket. Any thread."""

    def __init__(self, client: "S3Client", place: S3Place, part_bytes: int) -> None:
        self._client = client
        self._place = place
        self._warned = False  # that uploads cannot be listed
        self.part_bytes = max(part_bytes, PART_MIN_BYTES)

    def put(
        self,
        key: str,
        name: str,
        data: Scattered,
        *,
        meter: Meter,
        checksum: Checksum,
        conditional: bool,
        resumable: bool,
    ) -> None:
        """Store ``data`` as the object ``name``.

        ``resumable``: go on with what an earlier try left, and leave the parts to the next try if this one fails
        by an error that may pass. Else the parts are taken back.
        """
        size_bytes = max(self.part_bytes, -(-len(data) // PARTS_MAX))
        parts = [data.part(start, start + size_bytes) for start in range(0, len(data), size_bytes)]
        found = self._dangling(key, name) if resumable else None
        with translated(self._place, key, reading=False):
            upload_id = found or begin_upload(self._client, self._place.bucket, name, checksum)
        try:
            with translated(self._place, key, reading=False):
                there = self._listed(name, upload_id) if found else {}
                upload = _Upload(
                    key=key, name=name, id=upload_id, parts=parts, there=there, checksum=checksum, meter=meter
                )
                self._complete(upload, self._send(upload), conditional=conditional)
        except (RetryableError, GaveUp):
            if not resumable:
                self._take_back(name, upload_id)
            raise
        except BaseException:
            self._take_back(name, upload_id)
            raise

    def abandon(self, prefix: str) -> None:
        """Abort every upload whose object's name starts with ``prefix``; content if the server lists none."""
        try:
            with translated(self._place, prefix, reading=False):
                uploads = list(self._under_way(prefix))
        except StorageRefused as error:  # not implemented, or not allowed: nothing but room hangs on it
            if not self._warned:
                _log.warning("uploads that were cut off cannot be found, and their parts stay: %s", error)
            self._warned = True
            return
        for upload in uploads:
            self._abort(upload["Key"], upload["UploadId"])

    def _dangling(self, key: str, name: str) -> str | None:
        """Return the id of the upload to go on with, if there is one; abort older ones of the same key."""
        with translated(self._place, key, reading=False):
            uploads = [upload for upload in self._under_way(name) if upload["Key"] == name]
        uploads.sort(key=lambda upload: upload["Initiated"])
        for upload in uploads[:-1]:
            self._take_back(name, upload["UploadId"])
        if not uploads:
            return None
        _log.info("the upload of %s goes on where an earlier one was cut off", key)
        return uploads[-1]["UploadId"]

    def _under_way(self, prefix: str) -> Iterator["MultipartUploadTypeDef"]:
        pages = self._client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=self._place.bucket, Prefix=prefix):
            # Not every server keeps to the prefix.
            yield from (upload for upload in page.get("Uploads", []) if upload["Key"].startswith(prefix))

    def _listed(self, name: str, upload_id: str) -> dict[int, "PartTypeDef"]:
        pages = self._client.get_paginator("list_parts").paginate(
            Bucket=self._place.bucket, Key=name, UploadId=upload_id
        )
        return {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}

    def _send(self, upload: _Upload) -> list["CompletedPartTypeDef"]:
        with ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="s3-put") as pool:
            futures = [pool.submit(self._put_part, upload, number) for number in range(1, len(upload.parts) + 1)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those that run
                raise

    def _put_part(self, upload: _Upload, number: int) -> "CompletedPartTypeDef":
        data, there = upload.parts[number - 1], upload.there.get(number)
        request: UploadPartRequestTypeDef = {
            "Bucket": self._place.bucket,
            "Key": upload.name,
            "UploadId": upload.id,
            "PartNumber": number,
            "Body": body(data, upload.meter),
            "ContentLength": len(data),
        }
        add_checksum(request, data, upload.checksum)
        if there is not None and _is_of(there, data, request.get("ChecksumCRC32C")):
            upload.meter.moved(len(data))
            return completed_part(number, there["ETag"], request)
        return completed_part(number, self._client.upload_part(**request)["ETag"], request)

    def _complete(self, upload: _Upload, parts: Sequence["CompletedPartTypeDef"], *, conditional: bool) -> None:
        request: CompleteMultipartUploadRequestTypeDef = {
            "Bucket": self._place.bucket,
            "Key": upload.name,
            "UploadId": upload.id,
            "MultipartUpload": {"Parts": parts},
        }
        if conditional:
            request["IfNoneMatch"] = "*"
        self._client.complete_multipart_upload(**request)

    def _take_back(self, name: str, upload_id: str) -> None:
        try:
            self._abort(name, upload_id)
        except DtrainError as error:  # the error that brought us here is the one to be told
            _log.warning("parts of an upload of %s may be left in the bucket: %s", name, error)

    def _abort(self, name: str, upload_id: str) -> None:
        try:
            with translated(self._place, name, reading=True):
                self._client.abort_multipart_upload(Bucket=self._place.bucket, Key=name, UploadId=upload_id)
        except NotFound:
            return


def _is_of(part: "PartTypeDef", data: Scattered, known_crc32c: str | None) -> bool:
    """Return whether a listed part holds exactly these bytes."""
    if part.get("Size") != len(data):
        return False
    if "ChecksumCRC32C" in part:
        return part["ChecksumCRC32C"] == (known_crc32c or crc32c(data))
    return part.get("ETag", "").strip('"') == etag(data)
