"""An S3 server that keeps nothing: what an upload costs when the other side costs as little as can be.

    python -m benchmarks.checkpoint.sink        prints its port, serves until its standard input ends

It answers the few requests that an upload makes, and reads bodies into one buffer. One thread a connection, no
signature is checked. Small objects are kept, so that an upload's own questions are answered right.
"""

import re
import socket
import sys
import threading
from itertools import count

BUFFER_BYTES = 4 * 1024 * 1024
KEEP_MAX_BYTES = 1024 * 1024

_uploads = count(1)
_kept: dict[str, bytes] = {}


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    sys.stdin.read()


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with connection, connection.makefile("rb", buffering=65536) as read:
        while line := read.readline():
            method, target, _ = line.decode().split(" ", 2)
            headers = {}
            while (header := read.readline().strip()) != b"":
                name, _, value = header.decode().partition(":")
                headers[name.lower()] = value.strip()
            if headers.get("expect", "").lower() == "100-continue":
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            left = int(headers.get("content-length", "0"))
            body = b""
            if left <= KEEP_MAX_BYTES:
                body = read.read(left)
            else:
                while left:
                    left -= read.readinto(buffer[: min(left, BUFFER_BYTES)]) or 0
            status, more, text = _answer(method, target, headers, body)
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n{more}\r\n".encode()
            connection.sendall(head + (b"" if method == "HEAD" else text))


def _answer(method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[str, str, bytes]:
    path, _, query = target.partition("?")
    if method == "POST" and re.search(r"\buploads\b", query):
        text = f"<InitiateMultipartUploadResult><UploadId>{next(_uploads)}</UploadId></InitiateMultipartUploadResult>"
        return "200 OK", "", text.encode()
    if method == "POST":
        return "200 OK", "", b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
    if method == "PUT":
        if "if-none-match" in headers and path in _kept:
            return "412 Precondition Failed", "", b"<Error><Code>PreconditionFailed</Code></Error>"
        if "partNumber" not in query:
            _kept[path] = body
        return "200 OK", 'ETag: "x"\r\n', b""
    if method == "DELETE":
        _kept.pop(path, None)
        return "204 No Content", "", b""
    if path in _kept:
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", "")):
            first, last = int(asked[1]), min(int(asked[2]), len(_kept[path]) - 1)
            more = f'ETag: "x"\r\nContent-Range: bytes {first}-{last}/{len(_kept[path])}\r\n'
            return "206 Partial Content", more, _kept[path][first : last + 1]
        return "200 OK", 'ETag: "x"\r\n', _kept[path]
    if "uploads" in query:
        return "200 OK", "", b"<ListMultipartUploadsResult></ListMultipartUploadsResult>"
    if "list-type" in query:
        return "200 OK", "", b"<ListBucketResult></ListBucketResult>"
    return "404 Not Found", "", b"<Error><Code>NoSuchKey</Code></Error>"


if __name__ == "__main__":
    main()
