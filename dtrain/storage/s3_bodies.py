"""What is sent to S3: the caller's memory as a file, and the checksum that goes with it.

urllib3 asks a body for 16 KiB at a time; answering with a larger slice of the same memory spares the copying, which
is most of what boto3's defaults cost.
"""

import base64
import hashlib
import io
from enum import StrEnum
from typing import IO, TYPE_CHECKING, cast

import crc32c as crc32c_checksum

from dtrain.storage.metering import Meter
from dtrain.storage.parts import Scattered

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import PutObjectRequestTypeDef, UploadPartRequestTypeDef

SLICE_MIN_BYTES = 1024 * 1024  # least that a body hands out at a time, whatever the HTTP library asks for
CHECKSUM_BYTES = 1024 * 1024  # checksummed at a time


class Checksum(StrEnum):
    """What a server can be given to check a body by, the best first."""

    CRC32C = "CRC32C"
    MD5 = "Content-MD5"
    NONE = "none"


class Body(io.RawIOBase):
    """Memory as the file that botocore wants: rewindable, and generous."""

    def __init__(self, data: Scattered, meter: Meter) -> None:
        self._data = data
        self._size_bytes = len(data)
        self._meter = meter
        self._at = 0
        self._told = 0  # how many bytes the meter was told of: less again after a rewind

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
        if part:
            self._meter.before(len(part))
        self._at += len(part)
        self._tell(max(self._told, self._at))
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
        self._tell(min(self._told, self._at))
        return self._at

    def tell(self) -> int:
        return self._at

    def _tell(self, told: int) -> None:
        if told != self._told:
            self._meter.moved(told - self._told)
            self._told = told


def body(data: Scattered, meter: Meter) -> IO[bytes]:
    return cast(IO[bytes], Body(data, meter))


def add_checksum(
    request: "PutObjectRequestTypeDef | UploadPartRequestTypeDef", data: Scattered, checksum: Checksum
) -> None:
    """Let the server check the bytes when they arrive."""
    match checksum:
        case Checksum.CRC32C:
            request["ChecksumCRC32C"] = crc32c(data)
        case Checksum.MD5:
            request["ContentMD5"] = base64.b64encode(_md5(data)).decode()
        case Checksum.NONE:
            pass


def crc32c(data: Scattered) -> str:
    """Return the checksum as S3 writes it."""
    value = 0
    for view in data.views:
        for start in range(0, len(view), CHECKSUM_BYTES):
            value = crc32c_checksum.crc32c(view[start : start + CHECKSUM_BYTES], value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def etag(data: Scattered) -> str:
    """Return the ETag, without its quotes, that S3 gives these bytes if it does not encrypt them."""
    return _md5(data).hex()


def _md5(data: Scattered) -> bytes:
    hasher = hashlib.md5(usedforsecurity=False)
    for view in data.views:
        hasher.update(view)
    return hasher.digest()
