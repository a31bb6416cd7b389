"""The stores under test: a model in memory, a folder, and two S3 servers. Servers live for the session."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from dtrain.storage.local import LocalFolder
from dtrain.storage.objects import ObjectStore
from dtrain.storage.s3 import S3Store
from dtrain.storage.s3_parts import PART_MIN_BYTES
from dtrain.storage.uris import open_store
from tests.support.memory_store import MemoryStore
from tests.support.s3_server import S3Server, moto, seaweedfs

settings.register_profile("no-traces", database=None, deadline=None)  # no files left; a slow machine is no failure
settings.load_profile("no-traces")


@pytest.fixture(scope="session")
def seaweed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    with moto() as server:
        yield server


@pytest.fixture
def seaweed(seaweed_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The real S3 server, with the environment set for it."""
    _set_environment(seaweed_server, monkeypatch)
    return seaweed_server


@pytest.fixture(params=["memory", "folder", "seaweedfs", "moto"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """One store of each kind, empty: on a server, each test has a prefix of its own."""
    match request.param:
        case "memory":
            return MemoryStore()
        case "folder":
            return LocalFolder(request.getfixturevalue("tmp_path") / "store")
        case kind:
            server: S3Server = request.getfixturevalue("seaweed_server" if kind == "seaweedfs" else "moto_server")
            _set_environment(server, monkeypatch)
            return open_store(server.uri(f"contract/{abs(hash(request.node.name)):x}"))


@pytest.fixture
def small_parts(seaweed: S3Server, request: pytest.FixtureRequest) -> S3Store:
    """A store on the real server with small parts, so that a few megabytes go the way of many."""
    return S3Store(
        bucket=seaweed.bucket,
        prefix=f"s3/{request.node.name}",
        endpoint=seaweed.endpoint,
        region="us-east-1",
        part_bytes=PART_MIN_BYTES,
    )


def _set_environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
