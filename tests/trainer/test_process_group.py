"""Joining: nothing of another generation is seen, and every wait ends. Leaving: gloo's threads are at rest before."""

import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from dtrain.common.errors import PermanentError
from dtrain.trainer import process_group, surroundings
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
