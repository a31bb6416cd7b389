"""The floors: the same bytes sent in the plainest way, without a checkpoint around them."""

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import boto3.session
from botocore.config import Config

from dtrain.storage.metering import UNMETERED
from dtrain.storage.parts import Scattered
from dtrain.storage.s3_bodies import body

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

SEND_BYTES = 16 * 1024 * 1024
PART_BYTES = 64 * 1024 * 1024
THREADS = 2


def bare_send(source: Path, size_bytes: int) -> float:
    """Seconds of ``sendfile`` and fsync into a file on the disk that holds ``BENCH_FOLDER``."""
    target = Path(os.environ["BENCH_FOLDER"]) / f"bare-{source.parent.name}"
    began = time.perf_counter()
    with source.open("rb") as read, target.open("wb") as write:
        position = 0
        while position < size_bytes:
            length = min(SEND_BYTES, size_bytes - position)
            position += os.sendfile(write.fileno(), read.fileno(), position, length)
        os.fsync(write.fileno())
    took_s = time.perf_counter() - began
    target.unlink()
    return took_s


def client(endpoint: str) -> "S3Client":
    """A boto3 client with the settings that measured best; credentials come from the environment."""
    config = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path", "payload_signing_enabled": False},
        max_pool_connections=8,
    )
    return boto3.session.Session(region_name="us-east-1").client("s3", endpoint_url=endpoint, config=config)


def whole_put(s3: "S3Client", bucket: str, view: memoryview) -> None:
    """One put of everything."""
    s3.put_object(Bucket=bucket, Key="bare", Body=body(Scattered([view]), UNMETERED), ContentLength=len(view))


def multipart_put(s3: "S3Client", bucket: str, view: memoryview) -> None:
    """Parts of 64 MiB, two at a time."""
    upload = s3.create_multipart_upload(Bucket=bucket, Key="bare")["UploadId"]

    def part(number: int) -> "CompletedPartTypeDef":
        piece = view[(number - 1) * PART_BYTES : number * PART_BYTES]
        answer = s3.upload_part(
            Bucket=bucket,
            Key="bare",
            UploadId=upload,
            PartNumber=number,
            Body=body(Scattered([piece]), UNMETERED),
            ContentLength=len(piece),
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(part, range(1, -(-len(view) // PART_BYTES) + 1)))
    s3.complete_multipart_upload(Bucket=bucket, Key="bare", UploadId=upload, MultipartUpload={"Parts": parts})


def mapped(
    put: Callable[["S3Client", str, memoryview], None], s3: "S3Client", bucket: str
) -> Callable[[Path, int], float]:
    """Return what sends the first bytes of a file by ``put``, and gives the seconds it took."""

    def send(source: Path, size_bytes: int) -> float:
        began = time.perf_counter()
        with source.open("rb") as file:
            page = mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ)
        put(s3, bucket, memoryview(page))  # unmapped with the last body that boto3 lets go of
        return time.perf_counter() - began

    return send
