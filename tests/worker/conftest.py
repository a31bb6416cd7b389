from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer, etcd_server
from tests.worker import nodes


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def node(tmp_path: Path, etcd: EtcdServer) -> Iterator[nodes.Node]:
    with nodes.node(tmp_path, etcd) as it:
        yield it
