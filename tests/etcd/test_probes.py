"""A wrong address of etcd is one clear sentence with the mend."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest

from dtrain.common.errors import UserError
from dtrain.etcd.probes import known_lossy, probe
from tests.support.etcd_server import EtcdServer
from tests.support.tcp_proxy import TcpProxy

TIMEOUT_S = 5.0


@pytest.fixture
def web_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def closing_server() -> Iterator[str]:
    with TcpProxy("127.0.0.1:1") as proxy:
        proxy.cut()
        yield proxy.endpoint


def told(endpoints: list[str], timeout_s: float = TIMEOUT_S) -> str:
    with pytest.raises(UserError) as caught:
        asyncio.run(probe(endpoints, timeout_s))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_working_etcd_tells_its_version(etcd: EtcdServer) -> None:
    version = asyncio.run(probe([etcd.endpoint], TIMEOUT_S))
    assert version.startswith("3.")


def test_one_working_endpoint_is_enough(etcd: EtcdServer, unused_endpoint: str) -> None:
    assert asyncio.run(probe([unused_endpoint, f"http://{etcd.endpoint}"], TIMEOUT_S)).startswith("3.")


def test_nothing_listening_is_said_with_the_address(unused_endpoint: str) -> None:
    text = told([unused_endpoint])
    assert text.startswith(f"nothing listens at {unused_endpoint} (connection refused)") and "start etcd there" in text


def test_a_name_that_does_not_exist_is_said() -> None:
    assert "name" in told(["no-such-host.invalid:2379"])


def test_a_web_server_is_not_etcd(web_server: str) -> None:
    assert told([web_server], 2.0).startswith(f"what listens at {web_server} is not etcd")


def test_a_server_that_closes_every_connection_is_not_etcd(closing_server: str) -> None:
    assert told([closing_server], 2.0).startswith(f"what listens at {closing_server} is not etcd")


def test_another_grpc_server_is_not_etcd() -> None:
    async def run() -> str:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            await probe([f"127.0.0.1:{port}"], TIMEOUT_S)
        finally:
            await server.stop(None)
        return ""

    with pytest.raises(UserError, match="is not etcd's client API"):
        asyncio.run(run())


def test_an_etcd_that_does_not_answer_is_told_apart_from_one_that_is_not_there(etcd: EtcdServer) -> None:
    etcd.pause()
    assert f"{etcd.endpoint} accepts connections but does not answer" in told([etcd.endpoint], 1.0)


def test_all_wrong_addresses_are_told_of(unused_endpoint: str, closing_server: str) -> None:
    text = told([unused_endpoint, closing_server], 2.0)
    assert unused_endpoint in text and closing_server in text


@pytest.mark.parametrize(("version", "lossy"), [("3.5.0", True), ("3.5.2", True), ("3.5.3", False), ("3.4.23", False)])
def test_versions_that_lose_acknowledged_writes_are_known(version: str, lossy: bool) -> None:
    warning = known_lossy(version)
    assert (warning is not None) is lossy
    assert warning is None or version in warning
