"""S3, and whatever speaks like it, as an object store.

boto3's defaults cost four to six times the CPU time that the bytes need, and break older servers. So:

- A body hands out slices of the caller's memory (s3_bodies.py); nothing is copied on its way to the socket.
- Payloads are not signed. Instead each carries its CRC32C, computed here: https guards the rest, and over
  plain http the digest in the manifest finds what a server that ignores the checksum lets through.
- Checksums otherwise only where the operation demands them (``when_required``).
- Objects above one part go up as parts, two at a time, and go on where they were cut off (s3_parts.py); large
  reads come down as ranges, four at a time, straight into the caller's buffer.
- What the server can do is tried out before the first put (s3_abilities.py).

Create-only is ``If-None-Match: *``. Where a server does not honour it, the store looks before it puts: then two
writers at the very same moment may both be told that they won, and the later bytes stay. dtrain's own create-only
objects are the same bytes whoever writes them, so nothing is lost by it; a foreign program's may be.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast
from urllib.parse import quote

import boto3.session
from botocore.config import Config

from dtrain.common.errors import ShardDamagedError
from dtrain.storage.keys import KEY_MAX_BYTES, InvalidKey, validate_key, validate_prefix
from dtrain.storage.metering import UNMETERED, Meter
from dtrain.storage.objects import (
    AlreadyExists,
    NotFound,
    ObjectInfo,
    StorageRefused,
    StorageUnavailable,
)
from dtrain.storage.parts import FileParts, Scattered
from dtrain.storage.s3_abilities import Trial, abilities_of
from dtrain.storage.s3_bodies import Checksum, add_checksum, body
from dtrain.storage.s3_errors import S3Place, refuse_empty_answer, translated
from dtrain.storage.s3_parts import PART_BYTES, PartUploads

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef, PutObjectRequestTypeDef

RANGE_BYTES = 32 * 1024 * 1024  # of a ranged read; measured best with four at a time
DOWNLOAD_THREADS = 4
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30  # between two bytes, not for the whole: a slow upload is fine, a silent server is not
TRIES = 2  # botocore's own, for a connection that went stale in the pool; the caller retries with a deadline
POOL_CONNECTIONS = 16  # some ranks' uploads at a time


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
        self._uri = _uri(bucket, prefix, endpoint, region)
        with translated(self._place, prefix, reading=False):
            self._client = _make_client(endpoint, region)
        self._uploads = PartUploads(self._client, self._place, part_bytes)
        self._trial = Trial(self._client, self._place, self._prefix)
        self._abilities = abilities_of(self._uri)

    @property
    def uri(self) -> str:
        return self._uri

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> None:
        self._put(key, Scattered([memoryview(data)]), if_absent=if_absent, meter=UNMETERED, resumable=False)

    def put_file(self, key: str, source: FileParts, *, meter: Meter = UNMETERED) -> None:
        self._put(key, source.mapped(), if_absent=False, meter=meter, resumable=True)

    def _put(self, key: str, data: Scattered, *, if_absent: bool, meter: Meter, resumable: bool) -> None:
        name = self._name(key)
        able = self._abilities.of_puts(self._trial)
        if len(data) <= self._uploads.part_bytes:
            if if_absent and not able.creates_only:
                self._refuse_present(key)
            self._put_whole(
                key, name, data, checksum=able.checksum, conditional=if_absent and able.creates_only, meter=meter
            )
            return
        of_parts = self._abilities.of_parts(self._trial)
        if if_absent:
            self._refuse_present(key)  # whatever the server can do: it spares the sending
        self._uploads.put(
            key,
            name,
            data,
            meter=meter,
            checksum=able.checksum,
            conditional=if_absent and of_parts.creates_only,
            resumable=resumable and of_parts.lists,
        )

    def _refuse_present(self, key: str) -> None:
        if self.head(key) is not None:
            raise AlreadyExists(f"{key} is already in bucket {self._bucket!r}")

    def abandon(self, prefix: str) -> None:
        self._uploads.abandon(self._prefix + validate_prefix(prefix))

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

    def local_path(self, key: str) -> Path | None:
        return None

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

    def _put_whole(
        self, key: str, name: str, data: Scattered, *, checksum: Checksum, conditional: bool, meter: Meter
    ) -> None:
        request: PutObjectRequestTypeDef = {
            "Bucket": self._bucket,
            "Key": name,
            "Body": body(data, meter),
            "ContentLength": len(data),
        }
        add_checksum(request, data, checksum)
        if conditional:
            request["IfNoneMatch"] = "*"
        with translated(self._place, key, reading=False):
            self._client.put_object(**request)

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
    client = session.client("s3", endpoint_url=endpoint, config=config)
    client.meta.events.register("before-parse.s3", refuse_empty_answer)
    return client


def _uri(bucket: str, prefix: str, endpoint: str | None, region: str | None) -> str:
    asked = [
        f"{name}={quote(value, safe=':/')}" for name, value in (("endpoint", endpoint), ("region", region)) if value
    ]
    return f"s3://{bucket}/{quote(prefix)}".rstrip("/") + ("?" + "&".join(asked) if asked else "")
