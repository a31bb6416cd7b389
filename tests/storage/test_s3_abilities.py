"""Servers that leave something out are found out before anything hangs on it, and told of once, in words."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from dtrain.storage.objects import AlreadyExists, StorageRefused
from dtrain.storage.parts import FileParts
from dtrain.storage.s3 import S3Store
from dtrain.storage.s3_parts import PART_MIN_BYTES
from tests.support.s3_server import S3Server, open_uploads

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest

LARGE = bytes(range(256)) * (PART_MIN_BYTES // 256 + 1)


class Answer:
    """What botocore takes for a server's answer."""

    status_code = 501
    headers: Mapping[str, str] = MappingProxyType({})


def not_implemented(**_: object) -> tuple[Answer, dict[str, Any]]:
    return Answer(), {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}


def refuse(store: S3Store, operation: str, when: Callable[[dict[str, str]], bool] = lambda headers: True) -> None:
    """Let the server behind the store know nothing of an operation, or of some headers."""

    def answer(params: dict[str, Any], **_: object) -> tuple[Answer, dict[str, Any]] | None:
        return not_implemented() if when(params["headers"]) else None

    store._client.meta.events.register(f"before-call.s3.{operation}", answer)


def forget_header(store: S3Store, operation: str, header: str) -> None:
    """Let the server behind the store ignore a header: it never gets to see it."""

    def forget(request: "AWSRequest", **_: object) -> None:
        if header in request.headers:
            del request.headers[header]

    store._client.meta.events.register(f"before-sign.s3.{operation}", forget)


def sent_headers(store: S3Store, operation: str) -> list[dict[str, str]]:
    seen: list[dict[str, str]] = []

    def look(request: "AWSRequest", **_: object) -> None:
        seen.append({name.lower(): str(value) for name, value in request.headers.items()})

    store._client.meta.events.register(f"before-send.s3.{operation}", look)
    return seen


def test_a_server_that_can_everything_is_tried_once_a_process(
    small_parts: S3Store, seaweed: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    puts, ends = sent_headers(small_parts, "PutObject"), sent_headers(small_parts, "CompleteMultipartUpload")
    for number in range(3):
        small_parts.put(f"blob{number}", b"x", if_absent=True)
    assert len(puts) == 2 + 3
    for number in range(2):
        small_parts.put(f"large{number}", LARGE, if_absent=True)
    assert (len(puts), len(ends)) == (2 + 3 + 1, 1 + 2)
    again = S3Store(
        bucket=seaweed.bucket,
        prefix=small_parts.uri.partition("?")[0].removeprefix(f"s3://{seaweed.bucket}/"),
        endpoint=seaweed.endpoint,
        region="us-east-1",
    )
    assert again.uri == small_parts.uri
    puts = sent_headers(again, "PutObject")
    again.put("blob", b"x", if_absent=True)
    assert len(puts) == 1
    assert caplog.text == ""
    assert len(list(small_parts.list(""))) == 6, "the trials took their objects away"


def test_a_server_that_ignores_the_condition_is_looked_at_first(
    small_parts: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    for operation in ("PutObject", "CompleteMultipartUpload"):
        forget_header(small_parts, operation, "If-None-Match")
    for name, first in (("blob", b"first"), ("large", LARGE)):
        small_parts.put(name, first, if_absent=True)
        with pytest.raises(AlreadyExists):
            small_parts.put(name, bytes(len(first)), if_absent=True)
        assert small_parts.get(name) == first
    assert caplog.text.count("ignores If-None-Match:") == 1
    assert caplog.text.count("ignores If-None-Match at the end of an upload in parts") == 1
    assert [info.key for info in small_parts.list("")] == ["blob", "large"]


@pytest.mark.parametrize(
    ("unknown", "sent", "words"),
    [
        (["x-amz-checksum-crc32c"], "content-md5", "takes no CRC32C: Content-MD5 guards what is sent"),
        (["x-amz-checksum-crc32c", "Content-MD5"], "", "takes no checksum: what is damaged on its way is found by"),
    ],
)
def test_a_server_that_refuses_a_checksum_gets_the_next_best(
    small_parts: S3Store, caplog: pytest.LogCaptureFixture, unknown: list[str], sent: str, words: str
) -> None:
    for operation in ("PutObject", "UploadPart"):
        refuse(small_parts, operation, lambda headers: any(name in headers for name in unknown))
    small_parts.put("before", b"")
    assert caplog.text.count(words) == 1
    puts, parts = sent_headers(small_parts, "PutObject"), sent_headers(small_parts, "UploadPart")
    small_parts.put("blob", b"x")
    small_parts.put("large", LARGE)
    assert small_parts.get("blob") == b"x" and small_parts.get("large") == LARGE
    for headers in puts + parts:
        assert [name for name in ("x-amz-checksum-crc32c", "content-md5") if name in headers] == [sent] * bool(sent)
    assert caplog.text.count(words) == 1


def test_a_server_that_ignores_ranges_is_refused_before_anything_is_stored_there(small_parts: S3Store) -> None:
    forget_header(small_parts, "GetObject", "Range")
    with pytest.raises(StorageRefused, match="no checkpoint could be read back: use another server"):
        small_parts.put("blob", b"x")
    assert list(small_parts.list("")) == []


def test_on_a_server_that_lists_no_uploads_one_that_failed_starts_anew(
    small_parts: S3Store, seaweed: S3Server, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    refuse(small_parts, "ListMultipartUploads")
    cut = [True]

    def cut_once(**_: object) -> None:
        if cut:
            cut.clear()
            raise ConnectionResetError("cut")

    small_parts.put("other", LARGE)
    small_parts._client.meta.events.register("before-call.s3.UploadPart", cut_once)
    (tmp_path / "file").write_bytes(LARGE)
    with (tmp_path / "file").open("rb") as file:
        for _ in range(2):
            try:
                small_parts.put_file("large", FileParts(file=file.fileno(), ranges=((0, len(LARGE)),)))
            except Exception as error:
                assert "cut" in str(error)
                assert open_uploads(seaweed, small_parts._prefix) == [], "nothing is left that nobody can find"
    assert not cut and small_parts.get("large") == LARGE
    assert caplog.text.count("does not list uploads under way") == 1
    small_parts.abandon("")
    small_parts.abandon("")
    assert caplog.text.count("cannot be found") == 1
