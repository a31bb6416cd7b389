"""Uploads in parts that are cut off: what is sent again, what is believed, and what is left behind."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dtrain.storage import s3_parts
from dtrain.storage.objects import StorageUnavailable
from dtrain.storage.parts import FileParts
from dtrain.storage.s3 import S3Store
from dtrain.storage.s3_parts import PART_MIN_BYTES
from tests.support.s3_server import S3Server, open_uploads

SENT_PARTS = 2  # of four, before the uploader is killed
LARGE = os.urandom(3 * PART_MIN_BYTES + 12_345)

# Sends some parts, one after another, says so, and waits there for ever.
UPLOADER = """
import os, sys
from dtrain.storage import s3_parts
from dtrain.storage.parts import FileParts
from dtrain.storage.s3 import S3Store
bucket, prefix, endpoint, path, limit = sys.argv[1:]
s3_parts.UPLOAD_THREADS = 1
class Halting:
    sent = 0
    def before(self, count_bytes):
        if self.sent + count_bytes > int(limit):
            print("halted", flush=True)
            sys.stdin.read()
        self.sent += count_bytes
    def moved(self, count_bytes):
        pass
store = S3Store(bucket=bucket, prefix=prefix, endpoint=endpoint, region="us-east-1", part_bytes=s3_parts.PART_MIN_BYTES)
with open(path, "rb") as file:
    whole = FileParts(file=file.fileno(), ranges=((0, os.fstat(file.fileno()).st_size),))
    store.put_file("shard", whole, meter=Halting())
"""


class Counting:
    """A meter that adds up."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.moved_bytes = 0
        self._lock = threading.Lock()

    def before(self, count_bytes: int) -> None:
        with self._lock:
            self.sent_bytes += count_bytes

    def moved(self, count_bytes: int) -> None:
        with self._lock:
            self.moved_bytes += count_bytes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "slot"
    path.write_bytes(LARGE)
    return path


@contextmanager
def halted_uploader(server: S3Server, store: S3Store, file: Path) -> Iterator["subprocess.Popen[str]"]:
    limit = SENT_PARTS * PART_MIN_BYTES
    arguments = [server.bucket, store._prefix.rstrip("/"), server.endpoint, str(file), str(limit)]
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOADER, *arguments],
        env={**os.environ, **server.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "halted\n"
            yield process
        finally:
            process.kill()


def leave_killed_upload(server: S3Server, store: S3Store, file: Path) -> None:
    with halted_uploader(server, store, file) as process:
        process.kill()
    assert open_uploads(server, store._prefix) == [f"{store._prefix}shard"]


def put(store: S3Store, path: Path) -> Counting:
    meter = Counting()
    with path.open("rb") as file:
        whole = FileParts(file=file.fileno(), ranges=((0, path.stat().st_size),))
        store.put_file("shard", whole, meter=meter)
    return meter


def test_an_upload_whose_process_was_killed_sends_only_what_was_missing(
    small_parts: S3Store, seaweed: S3Server, file: Path
) -> None:
    leave_killed_upload(seaweed, small_parts, file)
    meter = put(small_parts, file)
    assert meter.sent_bytes == len(LARGE) - SENT_PARTS * PART_MIN_BYTES
    assert meter.moved_bytes == len(LARGE)
    assert small_parts.get("shard") == LARGE
    assert open_uploads(seaweed, small_parts._prefix) == []


def test_parts_of_other_bytes_are_not_believed(small_parts: S3Store, seaweed: S3Server, file: Path) -> None:
    leave_killed_upload(seaweed, small_parts, file)
    changed = bytearray(LARGE)
    changed[PART_MIN_BYTES - 1] ^= 1  # the last byte of the first part
    file.write_bytes(changed)
    meter = put(small_parts, file)
    assert meter.sent_bytes == len(LARGE) - (SENT_PARTS - 1) * PART_MIN_BYTES
    assert small_parts.get("shard") == changed
    assert open_uploads(seaweed, small_parts._prefix) == []


def test_an_upload_of_another_cut_begins_with_its_own_parts(
    small_parts: S3Store, seaweed: S3Server, file: Path
) -> None:
    leave_killed_upload(seaweed, small_parts, file)
    small_parts._uploads.part_bytes += 1
    put(small_parts, file)
    assert small_parts.get("shard") == LARGE
    assert open_uploads(seaweed, small_parts._prefix) == []


def test_of_several_uploads_of_a_key_one_goes_on_and_the_others_go(
    small_parts: S3Store, seaweed: S3Server, file: Path
) -> None:
    client, name = seaweed.client(), f"{small_parts._prefix}shard"
    client.create_multipart_upload(Bucket=seaweed.bucket, Key=name)
    client.create_multipart_upload(Bucket=seaweed.bucket, Key=name + "-of-another")
    leave = open_uploads(seaweed, small_parts._prefix)
    assert len(leave) == 2
    client.create_multipart_upload(Bucket=seaweed.bucket, Key=name)
    put(small_parts, file)
    assert small_parts.get("shard") == LARGE
    assert open_uploads(seaweed, small_parts._prefix) == [name + "-of-another"]


def cut_the_third_part(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    original = store._uploads._put_part

    def put_part(upload: s3_parts._Upload, number: int) -> object:
        if number == 3:
            raise ConnectionResetError("cut")
        return original(upload, number)

    monkeypatch.setattr(store._uploads, "_put_part", put_part)


def test_a_file_whose_upload_fails_goes_on_with_the_next_try(
    small_parts: S3Store, seaweed: S3Server, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken, pytest.raises(StorageUnavailable, match="cut"):
        cut_the_third_part(small_parts, broken)
        put(small_parts, file)
    assert small_parts.head("shard") is None
    assert put(small_parts, file).sent_bytes <= len(LARGE) - 2 * PART_MIN_BYTES
    assert small_parts.get("shard") == LARGE
    assert open_uploads(seaweed, small_parts._prefix) == []


def test_memory_whose_upload_fails_takes_its_parts_back(
    small_parts: S3Store, seaweed: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_the_third_part(small_parts, monkeypatch)
    with pytest.raises(StorageUnavailable, match="cut"):
        small_parts.put("shard", LARGE)
    assert small_parts.head("shard") is None
    assert open_uploads(seaweed, small_parts._prefix) == []


def test_what_is_under_way_below_an_abandoned_prefix_is_aborted(small_parts: S3Store, seaweed: S3Server) -> None:
    client = seaweed.client()
    for key in ("attempt-1/rank-0", "attempt-1/rank-1", "attempt-11/rank-0"):
        client.create_multipart_upload(Bucket=seaweed.bucket, Key=small_parts._prefix + key)
    small_parts.put("attempt-1/index", b"stays")
    small_parts.abandon("attempt-1/")
    assert open_uploads(seaweed, small_parts._prefix) == [f"{small_parts._prefix}attempt-11/rank-0"]
    assert small_parts.get("attempt-1/index") == b"stays"
    small_parts.abandon("")
    assert open_uploads(seaweed, small_parts._prefix) == []
