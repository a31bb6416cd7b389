"""S3, and whatever speaks like it, as an object store.

boto3's defaults cost four to six times the CPU time that the bytes need, and break older servers. So:

- A body hands out slices of the caller's memory (``_Body``); nothing is copied on its way to the socket.
- Payloads are not signed. Instead each carries its CRC32C, computed here: https guards the rest, and over
  plain http the digest in the manifest finds what a server that ignores the checksum lets through.
- Checksums otherwise only where the operation demands them (``when_required``).
- Objects above one part go up as parts, two at a time; large reads come down as ranges, four at a time,
  straight into the caller's buffer.

Create-only is ``If-None-Match: *``. Whether a server honours it is tried out once, before the first such put.
Where it does not, the store looks before it puts: then two writers at the very same moment may both be told
that they won, and the later bytes stay. dtrain's own create-only objects are the same bytes whoever writes
them, so nothing is lost by it; a foreign program's may be. Above one part the look before is always made as
well, because some servers honour the condition for plain puts only.

A put that ends by an error after its parts began takes them back; parts that a killed process left are
invisible, and a lifecycle rule of the bucket (abort incomplete uploads) should remove them.
"""

import base64
import io
import logging
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, cast
from urllib.parse import quote

import boto3.session
import google_crc32c
from botocore.config import Config

from dtrain.common.errors import DtrainError, ShardDamagedError
from dtrain.storage.keys import KEY_MAX_BYTES, InvalidKey, validate_key, validate_prefix
from dtrain.storage.objects import (
    AlreadyExists,
    NotFound,
    ObjectInfo,
    StorageRefused,
    StorageUnavailable,
)
from dtrain.storage.parts import FileParts, Scattered
from dtrain.storage.s3_errors import S3Place, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        CompleteMultipartUploadRequestTypeDef,
        GetObjectRequestTypeDef,
        PutObjectRequestTypeDef,
    )

PART_BYTES = 64 * 1024 * 1024  # of a multipart upload; measured best with two at a time
PART_MIN_BYTES = 5 * 1024 * 1024  # S3's rule for all parts but the last
PARTS_MAX = 10_000  # S3's rule; larger objects get larger parts
UPLOAD_THREADS = 2
RANGE_BYTES = 32 * 1024 * 1024  # of a ranged read; measured best with four at a time
DOWNLOAD_THREADS = 4
SLICE_MIN_BYTES = 1024 * 1024  # least that a body hands out at a time, whatever the HTTP library asks for
CHECKSUM_BYTES = 1024 * 1024  # checksummed at a time
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30  # between two bytes, not for the whole: a slow upload is fine, a silent server is not
TRIES = 2  # botocore's own, for a connection that went stale in the pool; the caller retries with a deadline
POOL_CONNECTIONS = 16  # some ranks' uploads at a time

_log = logging.getLogger(__name__)


class S3Store:
    """Objects below a prefix of a bucket. See the port for what each call does. One client, any thread."""

    def __init__(
        self,
        *,
        bucket: str,
        prefix: str = "",
        endpoint: str | None = None,
        region: str | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._bucket = bucket
        self._prefix = validate_key(prefix) + "/" if prefix else ""
        self._place = S3Place(bucket=bucket, endpoint=endpoint or "AWS")
        self._part_bytes = max(part_bytes, PART_MIN_BYTES)
        self._uri = _uri(bucket, prefix, endpoint, region)
        with translated(self._place, prefix, reading=False):
            self._client = _make_client(endpoint, region)
        self._lock = threading.Lock()
        self._creates_only: bool | None = None  # whether the server honours If-None-Match; None until tried

    @property
    def uri(self) -> str:
        return self._uri

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> None:
        name = self._name(key)
        self._put(key, name, Scattered([memoryview(data)]), if_absent=if_absent)

    def put_file(self, key: str, source: FileParts) -> None:
        name = self._name(key)
        self._put(key, name, source.mapped(), if_absent=False)

    def _put(self, key: str, name: str, data: Scattered, *, if_absent: bool) -> None:
        conditional = if_absent and self._honours_create_only()
        if if_absent and (not conditional or len(data) > self._part_bytes) and self.head(key) is not None:
            raise AlreadyExists(f"{key} is already in bucket {self._bucket!r}")
        if len(data) > self._part_bytes:
            with translated(self._place, key, reading=False):
                self._put_parts(name, data, conditional=conditional)
        else:
            self._put_whole(key, name, data, conditional=conditional)

    def get(self, key: str) -> bytes:
        name = self._name(key)
        with translated(self._place, key, reading=True):
            return self._client.get_object(Bucket=self._bucket, Key=name)["Body"].read()

    def read_into(self, key: str, target: memoryview, *, offset: int = 0) -> None:
        view = target.cast("B")
        if 0 < len(view) <= RANGE_BYTES:
            self._read_range(key, view, offset, None)
            return
        with translated(self._place, key, reading=True):
            found = self._client.head_object(Bucket=self._bucket, Key=self._name(key))
        if found["ContentLength"] < offset + len(view):
            raise ShardDamagedError(
                key, f"has {found['ContentLength']} bytes, too few for {len(view)} from {offset} on"
            )
        starts = range(0, len(view), RANGE_BYTES)
        if not starts:
            return
        # The ETag keeps the ranges from being parts of two objects, if the key is replaced meanwhile.
        with ThreadPoolExecutor(DOWNLOAD_THREADS, thread_name_prefix="s3-read") as pool:
            ranges = [
                pool.submit(self._read_range, key, view[start : start + RANGE_BYTES], offset + start, found["ETag"])
                for start in starts
            ]
            try:
                for future in ranges:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those that run
                raise

    def head(self, key: str) -> ObjectInfo | None:
        name = self._name(key)
        try:
            with translated(self._place, key, reading=True):
                found = self._client.head_object(Bucket=self._bucket, Key=name)
        except NotFound:
            return None
        return ObjectInfo(key=key, size_bytes=found["ContentLength"])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        start = self._prefix + validate_prefix(prefix)
        found: dict[str, int] = {}
        with translated(self._place, prefix, reading=False):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start):
                for item in page.get("Contents", []):
                    # Consoles mark empty folders by objects whose key ends with a slash: no object of ours.
                    if not item["Key"].endswith("/"):
                        found[item["Key"].removeprefix(self._prefix)] = item["Size"]
        # Servers that keep folders list in another order than S3 itself.
        for key in sorted(found, key=str.encode):
            yield ObjectInfo(key=key, size_bytes=found[key])

    def delete(self, key: str) -> None:
        name = self._name(key)
        try:
            with translated(self._place, key, reading=True):
                self._client.delete_object(Bucket=self._bucket, Key=name)
        except NotFound:
            return

    def _name(self, key: str) -> str:
        name = self._prefix + validate_key(key)
        if len(name.encode()) > KEY_MAX_BYTES:
            raise InvalidKey(f"with the store's prefix, key {name[:80]!r}... has more than {KEY_MAX_BYTES} bytes")
        return name

    def _put_whole(self, key: str, name: str, data: Scattered, *, conditional: bool) -> None:
        request: PutObjectRequestTypeDef = {
            "Bucket": self._bucket,
            "Key": name,
            "Body": _body(data),
            "ContentLength": len(data),
            "ChecksumCRC32C": _crc32c(data),
        }
        if conditional:
            request["IfNoneMatch"] = "*"
        with translated(self._place, key, reading=False):
            self._client.put_object(**request)

    def _put_parts(self, name: str, data: Scattered, *, conditional: bool) -> None:
        size_bytes = max(self._part_bytes, -(-len(data) // PARTS_MAX))
        upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=name, ChecksumAlgorithm="CRC32C")
        upload_id = upload["UploadId"]
        try:
            with ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="s3-put") as pool:
                futures = [
                    pool.submit(self._put_part, name, upload_id, number, data.part(start, start + size_bytes))
                    for number, start in enumerate(range(0, len(data), size_bytes), start=1)
                ]
                try:
                    parts = [future.result() for future in futures]
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those that run
                    raise
            request: CompleteMultipartUploadRequestTypeDef = {
                "Bucket": self._bucket,
                "Key": name,
                "UploadId": upload_id,
                "MultipartUpload": {"Parts": parts},
            }
            if conditional:
                request["IfNoneMatch"] = "*"
            self._client.complete_multipart_upload(**request)
        except BaseException:
            self._take_back(name, upload_id)
            raise

    def _put_part(self, name: str, upload_id: str, number: int, data: Scattered) -> "CompletedPartTypeDef":
        checksum = _crc32c(data)
        answer = self._client.upload_part(
            Bucket=self._bucket,
            Key=name,
            UploadId=upload_id,
            PartNumber=number,
            Body=_body(data),
            ContentLength=len(data),
            ChecksumCRC32C=checksum,
        )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32C": checksum}

    def _take_back(self, name: str, upload_id: str) -> None:
        try:
            with translated(self._place, name, reading=True):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id)
        except DtrainError as error:  # the error that brought us here is the one to be told
            _log.warning("parts of an upload of %s may be left in the bucket: %s", name, error)

    def _read_range(self, key: str, view: memoryview, offset: int, etag: str | None) -> None:
        request: GetObjectRequestTypeDef = {
            "Bucket": self._bucket,
            "Key": self._name(key),
            "Range": f"bytes={offset}-{offset + len(view) - 1}",
        }
        if etag is not None:
            request["IfMatch"] = etag
        try:
            with translated(self._place, key, reading=True):
                answer = self._client.get_object(**request)
                body = answer["Body"]
                try:
                    if offset and not answer.get("ContentRange"):
                        raise StorageRefused(f"S3 at {self._place.endpoint} ignores ranges: use another server.")
                    if answer["ContentLength"] < len(view):
                        raise ShardDamagedError(key, f"has too few bytes for {len(view)} from {offset} on")
                    done = 0
                    while done < len(view):
                        count = body.readinto(cast("IO[bytes]", view[done:]))  # a buffer; the stubs say otherwise
                        if not count:
                            raise StorageUnavailable(f"S3 at {self._place.endpoint} broke off within {key}")
                        done += count
                finally:
                    body.close()
        except AlreadyExists as error:  # 412: here it is about If-Match
            raise StorageUnavailable(f"{key} was replaced while it was read") from error

    def _honours_create_only(self) -> bool:
        """Return whether ``If-None-Match: *`` keeps a second put out; tried with an object made for it."""
        with self._lock:
            if self._creates_only is None:
                self._creates_only = self._try_create_only()
                if not self._creates_only:
                    _log.warning(
                        "S3 at %s ignores If-None-Match: create-only puts look first, which two writers at the "
                        "same moment can pass together",
                        self._place.endpoint,
                    )
            return self._creates_only

    def _try_create_only(self) -> bool:
        key = "dtrain-probe-" + secrets.token_hex(8)
        name = self._name(key)
        first, second = Scattered([memoryview(b"1")]), Scattered([memoryview(b"2")])
        self._put_whole(key, name, first, conditional=False)  # whatever fails here has nothing to do with it
        try:
            self._put_whole(key, name, second, conditional=True)
        except AlreadyExists:
            return True
        except StorageRefused:  # "not implemented", in one of many spellings
            return False
        finally:
            self.delete(key)
        return False


class _Body(io.RawIOBase):
    """Memory as the file that botocore wants: rewindable, and generous.

    urllib3 asks for 16 KiB at a time; answering with a larger slice of the same memory spares the copying.
    """

    def __init__(self, data: Scattered) -> None:
        self._data = data
        self._size_bytes = len(data)
        self._at = 0

    def __len__(self) -> int:
        return self._size_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            rest = self._data.part(self._at, self._size_bytes)
            part = rest.views[0] if len(rest.views) == 1 else memoryview(rest.joined())
        else:
            part = self._data.first(self._at, max(size, SLICE_MIN_BYTES))
        self._at += len(part)
        return cast(bytes, part)  # a buffer is all that a socket needs

    def readinto(self, target: object, /) -> int:
        room = memoryview(cast(bytearray, target)).cast("B")
        part = self._data.first(self._at, len(room))
        room[: len(part)] = part
        self._at += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        self._at = min(max(base + offset, 0), self._size_bytes)
        return self._at

    def tell(self) -> int:
        return self._at


def _body(data: Scattered) -> IO[bytes]:
    return cast(IO[bytes], _Body(data))


def _crc32c(data: Scattered) -> str:
    # The library takes no memoryview. Copying small pieces stays within the cache, and costs nothing measurable.
    value = 0
    for view in data.views:
        for start in range(0, len(view), CHECKSUM_BYTES):
            value = google_crc32c.extend(value, view[start : start + CHECKSUM_BYTES].tobytes())
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def _make_client(endpoint: str | None, region: str | None) -> "S3Client":
    session = boto3.session.Session(region_name=region)  # its own: the shared default one is not thread-safe
    config = Config(
        region_name=region or session.region_name or "us-east-1",
        signature_version="s3v4",
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": TRIES},
        max_pool_connections=POOL_CONNECTIONS,
        tcp_keepalive=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": False, "addressing_style": "path" if endpoint else "auto"},
    )
    return session.client("s3", endpoint_url=endpoint, config=config)


def _uri(bucket: str, prefix: str, endpoint: str | None, region: str | None) -> str:
    asked = [
        f"{name}={quote(value, safe=':/')}" for name, value in (("endpoint", endpoint), ("region", region)) if value
    ]
    return f"s3://{bucket}/{quote(prefix)}".rstrip("/") + ("?" + "&".join(asked) if asked else "")
