from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer, etcd_server
from tests.worker import nodes
from tests.worker.nursery import Nursery, nursery_in


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def node(tmp_path: Path, etcd: EtcdServer) -> Iterator[nodes.Node]:
    with nodes.node(tmp_path, etcd) as it:
        yield it


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery_in(tmp_path_factory.mktemp("nursery"), {}) as it:
        yield it


@pytest.fixture
def barren_nursery(tmp_path: Path) -> Iterator[Nursery]:
    """One in which no keeper can be made to wait: there is no interpreter for it."""
    source = "import sys\ndef preload(): sys.executable = '/nowhere'\ndef settle(environment): pass\n"
    with nursery_in(tmp_path, {"barren": source}) as it:
        yield it


@pytest.fixture
def quick_nursery(tmp_path: Path) -> Iterator[Nursery]:
    """One whose zygote imports nothing."""
    with nursery_in(tmp_path, {"nothing": "def preload(): pass\ndef settle(environment): pass\n"}) as it:
        yield it
