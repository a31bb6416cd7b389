"""Joining: nothing of another generation is seen, and every wait ends. Leaving: gloo's threads are at rest before."""

import contextlib
import ctypes
import itertools
import socket
import struct
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore, HashStore  # type: ignore[attr-defined]

from dtrain.common.errors import PermanentError
from dtrain.trainer import process_group, surroundings, tcp_stores
from dtrain.trainer.surroundings import Surroundings

TIMEOUT_S = 1.0


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def of(generation: int, rendezvous: str, *, rank: int = 0, world_size: int = 2) -> Surroundings:
    """A rank under a worker."""
    environment = {
        "DTRAIN_RANK_DIR": "/shm/rank",
        "DTRAIN_JOB": "digits",
        "DTRAIN_GENERATION": str(generation),
        "DTRAIN_RENDEZVOUS": rendezvous,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    return surroundings.read(environment)


@pytest.fixture(params=["file", "tcp"])
def rendezvous(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path / 'rendezvous'}" if request.param == "file" else f"tcp://127.0.0.1:{free_port()}"


def test_a_rank_of_a_dead_generation_that_comes_to_the_same_port_is_not_seen() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    timeout = timedelta(seconds=10)
    host = process_group._store(of(2, address, world_size=1), timeout)  # of one: it does not wait for the other
    late = process_group._store(of(1, address, rank=1), timeout)
    peer = process_group._store(of(2, address, rank=1), timeout)
    late.set("address of rank 1", "dead")
    assert not host.check(["address of rank 1"])
    peer.set("address of rank 1", "alive")
    assert host.get("address of rank 1") == b"alive"
    assert late.get("address of rank 1") == b"dead"


def test_a_generation_on_one_node_meets_in_a_file_and_asks_no_network(tmp_path: Path) -> None:
    found = process_group._store(of(1, f"file://{tmp_path / 'rendezvous'}"), timedelta(seconds=TIMEOUT_S))
    assert isinstance(found, FileStore)


def test_a_wait_for_a_peer_that_does_not_come_ends(rendezvous: str) -> None:
    began = time.monotonic()
    with pytest.raises(PermanentError, match="rank 0 could not join the process group of 2 within 1 s"):
        process_group.join_group(of(1, rendezvous), torch.device("cpu"), timeout_s=TIMEOUT_S)
    assert time.monotonic() - began < 20 * TIMEOUT_S, "some other timeout than the one given ended it"
    assert not dist.is_initialized()


def test_a_wait_for_a_host_that_does_not_come_ends() -> None:
    began = time.monotonic()
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(PermanentError, match="rank 1 could not join the process group of 2 within 1 s"):
        process_group.join_group(of(1, address, rank=1), torch.device("cpu"), timeout_s=TIMEOUT_S)
    assert time.monotonic() - began < 20 * TIMEOUT_S


class Resolver(ctypes.Structure):
    """The beginning of what glibc's resolver keeps for a thread (resolv.h)."""

    _fields_ = (
        ("retrans_s", ctypes.c_int),
        ("retry", ctypes.c_int),
        ("options", ctypes.c_ulong),
        ("name_servers", ctypes.c_int),
        ("first_name_server", ctypes.c_char * 16),  # a sockaddr_in
    )


def ask_only(port: int) -> Callable[[], None]:
    """Make this port the only name server of this thread; return what takes that back."""
    libc = ctypes.CDLL(None)
    libc["__res_init"]()
    state = libc["__res_state"]
    state.restype = ctypes.c_void_p
    address = state()
    resolver, before = Resolver.from_address(address), ctypes.string_at(address, ctypes.sizeof(Resolver))
    resolver.retrans_s, resolver.retry, resolver.name_servers = 1, 1, 1
    server = struct.pack("=h", socket.AF_INET) + struct.pack("!H4s8x", port, bytes((127, 0, 0, 1)))
    ctypes.memmove(address + Resolver.first_name_server.offset, server, len(server))
    return lambda: ctypes.memmove(address, before, len(before)) and None


@pytest.fixture
def questions() -> Iterator[Callable[[], int]]:
    """How many packets this thread sent to its name server."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        undo = ask_only(server.getsockname()[1])

        def count() -> int:
            found = 0
            with contextlib.suppress(BlockingIOError):
                while server.recv(512):
                    found += 1
            return found

        try:
            yield count
        finally:
            undo()


def test_no_name_server_is_asked_while_the_store_of_several_nodes_is_made(questions: Callable[[], int]) -> None:
    with contextlib.suppress(OSError):
        socket.gethostbyaddr("192.0.2.1")
    if questions() == 0:
        pytest.skip("names of addresses do not come from a name server here")
    address = f"tcp://127.0.0.1:{free_port()}"
    timeout = timedelta(seconds=10)
    host = process_group._store(of(1, address, world_size=1), timeout)
    peer = process_group._store(of(1, address, rank=1), timeout)
    peer.set("there", "yes")
    assert host.get("there") == b"yes"
    assert questions() == 0
    with contextlib.suppress(OSError):
        socket.gethostbyaddr("192.0.2.1")
    assert questions() > 0, "the script's own questions go out again"


def test_a_name_that_nobody_is_asked_for_is_no_error() -> None:
    """torch would write a warning into each rank's log."""
    with tcp_stores.no_names_asked():
        assert socket.getnameinfo(("192.0.2.1", 80), socket.NI_NUMERICSERV) == ("192.0.2.1", "80")


def test_a_rank_that_is_there_before_its_host_connects_only_when_somebody_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch would wait up to half a second longer after a first try in vain."""
    port, looks = free_port(), itertools.count(1)
    listens = tcp_stores._listens
    listening: list[socket.socket] = []

    def look(family: socket.AddressFamily, address: str, at: int) -> bool:
        if next(looks) == 3:
            listening.append(socket.create_server(("127.0.0.1", port)))
        return listens(family, address, at)

    def connect(address: str, at: int, *_: object, **__: object) -> HashStore:
        socket.create_connection((address, at), TIMEOUT_S).close()
        return HashStore()

    monkeypatch.setattr(tcp_stores, "_listens", look)
    monkeypatch.setattr(tcp_stores, "TCPStore", connect)
    process_group._store(of(1, f"tcp://127.0.0.1:{port}", rank=1), timedelta(seconds=10))
    assert next(looks) == 4
    listening.pop().close()


def test_a_socket_that_met_itself_is_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone(socket.socket):
        def connect(self, address: object) -> None:
            self.bind(address)  # type: ignore[arg-type]
            super().connect(address)  # type: ignore[arg-type]

    monkeypatch.setattr(tcp_stores.socket, "socket", Alone)
    assert not tcp_stores._listens(socket.AF_INET, "127.0.0.1", free_port())


def test_leaving_waits_until_every_gloo_thread_slept_through_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [
        {"7": ("S", "1", "0"), "8": ("S", "4", "0")},
        {"7": ("S", "2", "0"), "8": ("S", "4", "0")},  # it worked meanwhile
        {"7": ("R", "2", "0"), "8": ("S", "4", "0")},  # it works
        {"7": ("R", "2", "0"), "8": ("S", "4", "0")},  # ready, and not let run
        {"7": ("S", "3", "0"), "8": ("S", "4", "0")},
        {"7": ("S", "3", "0"), "8": ("S", "4", "0")},
    ]
    looks = iter(seen)
    monkeypatch.setattr(process_group, "_gloo_threads", lambda: next(looks))
    process_group._wait_until_gloo_rests()
    assert next(looks, None) is None


def test_without_gloo_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([{}])
    monkeypatch.setattr(process_group, "_gloo_threads", lambda: next(looks))
    process_group._wait_until_gloo_rests()


def test_gloo_threads_are_found_by_the_name_that_torch_gives_them() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(1))
        assert process_group._gloo_threads()
    finally:
        dist.destroy_process_group()
