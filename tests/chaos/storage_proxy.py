"""An HTTP proxy in front of an S3 server: it can answer 503 to everything, take its time, or flip bits.

Bits are flipped in the bodies of objects only, which are guarded by digests; in a list nothing but TLS would notice.
And never in one object more than twice in a row: a way that damages everything cannot be told from a damaged object.

Requests pass unchanged, the Host header included, because it is part of what was signed.
"""

import http.client
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
UPSTREAM_S = 60.0
DAMAGED_IN_A_ROW_MAX = 2
_OBJECTS = ("/checkpoints/", "/packs/")  # in the path of a request for an object, and of no other
_HOP = ("connection", "transfer-encoding", "keep-alive")


class StorageProxy:
    """Listens on a free port and passes on to ``target`` ("host:port")."""

    def __init__(self, target: str) -> None:
        self.refusing = False  # every request is answered by 503
        self.delay_s = 0.0  # every request waits so long
        self.refused = 0
        self.passed = 0
        self.damaged = 0  # bodies
        self._damaged_of: Counter[tuple[str, ...]] | None = None  # bodies of each object, while bits are flipped
        self._lock = threading.Lock()
        self._healed = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self, "target": target})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="storage proxy", daemon=True)
        self.endpoint = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._healed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def flip_bits(self, wanted: bool) -> None:
        with self._lock:
            self._damaged_of = Counter() if wanted else None

    def damages(self, *request: str) -> bool:
        """Whether the body of this request, or of its answer, is to be damaged."""
        with self._lock:
            counts = self._damaged_of
            if counts is None or counts[request] >= DAMAGED_IN_A_ROW_MAX:
                return False
            counts[request] += 1
            self.damaged += 1
            return True

    def dawdle(self) -> None:
        if self.delay_s:
            self._healed.wait(self.delay_s)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: StorageProxy
    target: str

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a test has its own words."""

    def _pass_on(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.send_error(501)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.proxy.refusing:
            self.proxy.refused += 1
            self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        self.proxy.dawdle()
        self.proxy.passed += 1
        is_of_object = self.command in ("GET", "PUT") and any(part in self.path for part in _OBJECTS)
        is_damaged = is_of_object and self.proxy.damages(self.command, self.path, self.headers.get("Range", ""))
        if is_damaged and self.command == "PUT":
            body = _flipped(body)
        upstream = http.client.HTTPConnection(self.target, timeout=UPSTREAM_S)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in (*_HOP, "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            found = answer.read()
            if is_damaged and self.command == "GET" and answer.status in (200, 206):
                found = _flipped(found)
            self._answer(answer.status, answer.getheaders(), found)
        except (OSError, http.client.HTTPException):
            self.close_connection = True
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in (*_HOP, "content-length"):
                self.send_header(name, value)
        length = next((v for n, v in headers if n.lower() == "content-length"), "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on


def _flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if data else data
