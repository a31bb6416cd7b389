"""A real etcd for the tests of this folder, each test in a folder of its own."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer, etcd_server


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd that no other test sees, so that it may be killed and its revisions counted."""
    with etcd_server(tmp_path / "etcd") as server:
        yield server


@pytest.fixture
def unused_endpoint() -> Iterator[str]:
    """An address of this machine at which nothing listens, and nothing can begin to while the test runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused, and the port is taken
        yield f"127.0.0.1:{held.getsockname()[1]}"
