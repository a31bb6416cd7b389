"""A real etcd for each test that asks for one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer, etcd_server


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd that no other test sees."""
    with etcd_server(tmp_path / "etcd") as server:
        yield server
