"""What only S3 can do to us: parts, ranges, signatures, servers that ignore conditions, lost connections."""

import os
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from urllib3.exceptions import SSLError

from dtrain.common.errors import DtrainError, ShardDamagedError, UserError
from dtrain.storage import s3, s3_bodies
from dtrain.storage.metering import UNMETERED
from dtrain.storage.objects import AlreadyExists, StorageRefused, StorageUnavailable
from dtrain.storage.parts import Scattered
from dtrain.storage.s3 import S3Store
from dtrain.storage.s3_errors import S3Place, translated
from dtrain.storage.s3_parts import PART_MIN_BYTES
from dtrain.storage.uris import open_store, probe
from tests.support.s3_server import S3Server, open_uploads

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest

LARGE = os.urandom(2 * PART_MIN_BYTES + 12_345)  # three parts of the smallest size


@pytest.fixture
def store(small_parts: S3Store) -> S3Store:
    return small_parts


@pytest.mark.parametrize("length", ["Content-Length: 1306", "Transfer-Encoding: chunked"])
def test_a_list_that_broke_off_before_its_first_byte_is_not_a_list_of_nothing(
    length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "thing")
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\n{length}\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(s3.TRIES):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(head)

        server = threading.Thread(target=answer)
        server.start()
        store = S3Store(bucket="any", endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}", region="us-east-1")
        with pytest.raises(StorageUnavailable):
            list(store.list("jobs/"))
        server.join()


def test_a_large_object_goes_up_in_parts_and_comes_down_in_ranges(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "RANGE_BYTES", 1_000_000)
    store.put("large", memoryview(bytearray(LARGE)))
    assert store.get("large") == LARGE
    target = bytearray(len(LARGE) - 10)
    store.read_into("large", memoryview(target), offset=7)
    assert target == LARGE[7:-3]
    with pytest.raises(ShardDamagedError, match="too few"):
        store.read_into("large", memoryview(target), offset=11)


def test_a_large_create_only_put_keeps_what_is_there(store: S3Store, seaweed: S3Server) -> None:
    store.put("large", LARGE, if_absent=True)
    with pytest.raises(AlreadyExists):
        store.put("large", bytes(len(LARGE)), if_absent=True)
    assert store.get("large") == LARGE
    assert open_uploads(seaweed) == []


def test_an_object_replaced_between_two_ranges_is_not_mixed(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "RANGE_BYTES", 1_000)
    store.put("blob", bytes(5_000))
    head = store._client.head_object

    def replace_after_head(**request: object) -> object:
        answer = head(**request)  # type: ignore[arg-type]
        store.put("blob", bytes([1]) * 5_000)
        return answer

    monkeypatch.setattr(store._client, "head_object", replace_after_head)
    with pytest.raises(StorageUnavailable, match="replaced"):
        store.read_into("blob", memoryview(bytearray(5_000)))


def test_payloads_carry_a_checksum_and_no_trailer(store: S3Store) -> None:
    seen: list[dict[str, str]] = []

    def look(request: "AWSRequest", **_: object) -> None:
        seen.append({name.lower(): str(value) for name, value in request.headers.items()})

    store.put("before", b"")  # the server's abilities are tried out with the first put
    store._client.meta.events.register("before-send.s3.PutObject", look)
    store.put("blob", b"123456789")
    [headers] = seen
    assert "x-amz-checksum-crc32c" in headers
    assert "4waSgw==" in headers["x-amz-checksum-crc32c"]  # the check value of CRC-32C: 0xE3069283
    assert "UNSIGNED-PAYLOAD" in headers["x-amz-content-sha256"]
    assert "x-amz-trailer" not in headers


def test_a_body_hands_out_the_callers_memory_and_can_be_read_again() -> None:
    data = memoryview(os.urandom(3 * s3_bodies.SLICE_MIN_BYTES + 5)).toreadonly()
    body = s3_bodies.Body(Scattered([data]), UNMETERED)
    for _ in range(2):
        slices: list[bytes] = []
        while part := body.read(16_384):
            assert isinstance(part, memoryview)
            assert part.obj is data.obj
            slices.append(bytes(part))
        assert [len(part) for part in slices] == [s3_bodies.SLICE_MIN_BYTES] * 3 + [5]
        assert b"".join(slices) == data
        assert (body.seek(0, 2), len(body)) == (len(data), len(data))
        body.seek(0)
    target = bytearray(100)
    assert body.readinto(target) == 100
    assert bytes(target) == bytes(data[:100])
    assert body.tell() == 100


def sentence_of(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        probe(open_store(uri))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_missing_bucket_is_said_with_the_mend(seaweed: S3Server) -> None:
    text = sentence_of(seaweed.uri().replace(seaweed.bucket, "no-such-bucket"))
    assert "bucket 'no-such-bucket'" in text
    assert "does not exist: make it, or mend its name" in text


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_said_with_the_mend(
    seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "wrongwrongwrong")
    text = sentence_of(seaweed.uri())
    assert "does not know these credentials" in text
    assert "mend AWS_ACCESS_KEY_ID" in text
    assert "wrongwrongwrong" not in text


def test_missing_credentials_are_said_with_the_mend(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    assert "set AWS_ACCESS_KEY_ID" in sentence_of(seaweed.uri())


def test_an_endpoint_where_nobody_listens_is_said_with_the_mend(seaweed: S3Server) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else can take it
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        text = sentence_of(f"s3://bucket?endpoint={endpoint}")
    assert f"S3 at {endpoint} cannot be reached" in text
    assert "see that it runs" in text


class Answering:
    """A server that answers every connection with the same bytes, and reads nothing more than it must."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                received = b""
                while b"\r\n\r\n" not in received:
                    received += connection.recv(65_536)
                connection.sendall(self._answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65_536):
                    continue

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(timeout=30)


@pytest.fixture
def answering(request: pytest.FixtureRequest, seaweed: S3Server) -> Iterator[Answering]:
    server = Answering(request.param)
    yield server
    server.close()


def http(status: str, body: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def coded(status: str, code: str) -> bytes:
    return http(status, f"<Error><Code>{code}</Code><Message>said</Message></Error>")


@pytest.mark.parametrize(
    ("answering", "error", "words"),
    [
        (coded("503 Slow Down", "SlowDown"), "StorageUnavailable", "503 SlowDown"),
        (coded("500 Internal", "InternalError"), "StorageUnavailable", "500 InternalError"),
        (coded("409 Conflict", "ConditionalRequestConflict"), "StorageUnavailable", "409"),
        (coded("400 Bad Request", "BadDigest"), "StorageUnavailable", "BadDigest"),
        (coded("507 Full", "InsufficientStorage"), "StorageFull", "no room"),
        (coded("403 Forbidden", "AccessDenied"), "StorageRefused", "give these credentials the right"),
        (coded("403 Forbidden", "RequestTimeTooSkewed"), "StorageRefused", "set the clock"),
        (coded("400 Bad Request", "AuthorizationHeaderMalformed"), "StorageRefused", "another region"),
        (coded("501 Not Implemented", "NotImplemented"), "StorageRefused", "S3 server"),
        (http("404 Not Found", "<html>none</html>"), "StorageRefused", "S3 server"),
        (http("404 Not Found"), "StorageRefused", "does not exist"),
        (http("405 Method Not Allowed"), "StorageRefused", "S3 server"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "StorageUnavailable", "broke off"),
        (b"", "StorageUnavailable", "broke off"),
    ],
    indirect=["answering"],
)
def test_each_answer_becomes_the_error_it_means(answering: Answering, error: str, words: str) -> None:
    store = open_store(f"s3://bucket?endpoint={answering.endpoint}")
    with pytest.raises(DtrainError, match=words) as caught:
        store.put("blob", b"x")
    assert type(caught.value).__name__ == error
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("answering", [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this"], indirect=True)
def test_an_answer_that_breaks_off_is_no_object(answering: Answering) -> None:
    store = open_store(f"s3://bucket?endpoint={answering.endpoint}")
    with pytest.raises(StorageUnavailable):
        store.get("blob")
    with pytest.raises(StorageUnavailable):
        store.read_into("blob", memoryview(bytearray(100)))


@pytest.mark.parametrize("answering", [http("200 OK", "x" * 100)], indirect=True)
def test_a_server_that_ignores_ranges_does_not_give_wrong_bytes(answering: Answering) -> None:
    store = open_store(f"s3://bucket?endpoint={answering.endpoint}")
    with pytest.raises(StorageRefused, match="ignores ranges"):
        store.read_into("blob", memoryview(bytearray(10)), offset=5)


def test_a_record_of_tls_that_was_damaged_on_its_way_is_an_answer_that_broke_off() -> None:
    damaged = SSLError("[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC]")  # from the body, which botocore hands on as it is
    with (
        pytest.raises(StorageUnavailable),
        translated(S3Place(bucket="bucket", endpoint="https://s3"), "key", reading=True),
    ):
        raise damaged
