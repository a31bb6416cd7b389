"""Puts the models where production code expects an operating system, for as long as a schedule runs.

Only names that stand for the outside world are replaced: clocks, randomness, threads, gRPC's channels and servers,
SQLite's connection, the store's opening, and the agent's keepers. All of it is given back at the end.
"""

import contextlib
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc.aio
from greenlet import getcurrent

import dtrain.coordinator.service  # noqa: F401  with it, everything of a coordinator is loaded
from dtrain.coordinator import election
from dtrain.coordinator.election import ProcessIdentity
from dtrain.storage import packing, uris
from dtrain.worker import agent, journal, uploads
from tests.sim import nodes, trainers
from tests.sim.loop import CURRENT, SimLoop
from tests.sim.rpc import Channel, GrpcServer

if TYPE_CHECKING:
    from tests.sim.world import World

POLL_S = 0.1  # how often an agent looks at its mailboxes: five times slower than in production, for speed


class Threads:
    """Stands for a pool of threads. Work given to the loop becomes a greenlet there; work given here is done here."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *args: Any) -> None:
        call(*args)

    def map(self, call: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
        return map(call, *items)

    def shutdown(self, **_: object) -> None:
        pass


def _event_class(loop: SimLoop) -> type:
    class Event:
        """Stands for threading.Event: waiting takes virtual time."""

        LOOK_S = 0.25  # a set event is noticed by a waiting thread within this

        def __init__(self) -> None:
            self._set = False

        def is_set(self) -> bool:
            return self._set

        def set(self) -> None:
            self._set = True

        def wait(self, timeout: float | None = None) -> bool:
            left_s = float("inf") if timeout is None else timeout
            while not self._set and left_s > 0 and not loop.over:
                part_s = min(left_s, self.LOOK_S)
                loop.block(part_s)
                left_s -= part_s
            return self._set

    return Event


@contextlib.contextmanager
def installed(world: "World") -> Iterator[None]:
    """Have production code live in ``world``."""
    loop = world.loop
    replaced: list[tuple[object, str, Any]] = []

    def replace(owner: object, name: str, value: Any) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def mono() -> float:
        process = CURRENT.get()
        return loop.now_s if process is None else process.machine.mono(loop.now_s)

    def wall() -> float:
        process = CURRENT.get()
        return loop.now_s if process is None else process.machine.wall(loop.now_s)

    def kill_strays(is_stray: Callable[[str], bool]) -> dict[int, int]:
        process = CURRENT.get()
        assert process is not None
        return process.machine.node.kill_strays(is_stray)  # type: ignore[attr-defined, no-any-return]

    replace(time, "monotonic", mono)
    replace(time, "time", wall)
    replace(time, "sleep", lambda seconds: loop.block(seconds) if getcurrent().parent else None)
    replace(secrets, "token_hex", lambda nbytes=8: f"{world.tokens.getrandbits(8 * nbytes):0{2 * nbytes}x}")
    replace(grpc.aio, "insecure_channel", lambda target, **_: Channel(world.net, target))
    replace(grpc.aio, "server", lambda *_, **__: GrpcServer(world.net))
    replace(uris, "_open_folder", lambda path: world.blobs)
    replace(election, "this_process", lambda: _identity())
    replace(election, "is_gone", lambda process: _is_gone(world, process))
    replace(journal, "sqlite3", nodes.Sqlite)
    replace(agent, "Keepers", nodes.Keepers)
    replace(agent, "Zygotes", nodes.Zygotes)
    replace(agent, "HeldPort", nodes.HeldPort)
    replace(agent, "kill_strays", kill_strays)
    replace(agent, "POLL_S", POLL_S)
    replace(packing, "TENSOR_MIN_BYTES", trainers.FROZEN_BYTES)  # so that these small trainers' states are packed
    replace(packing, "PACK_MIN_BYTES", trainers.FROZEN_BYTES)
    modelled = SimpleNamespace(**{**vars(threading), "Event": _event_class(loop)})
    for name, module in list(sys.modules.items()):
        if name.startswith("dtrain."):
            if getattr(module, "ThreadPoolExecutor", None) is ThreadPoolExecutor:
                replace(module, "ThreadPoolExecutor", Threads)
            if getattr(module, "threading", None) is threading:
                replace(module, "threading", modelled)
    uploads.shared_store.cache_clear()
    state = random.getstate()
    random.seed(world.seed)
    try:
        yield
    finally:
        random.setstate(state)
        uploads.shared_store.cache_clear()
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)


def _identity() -> ProcessIdentity:
    process = CURRENT.get()
    assert process is not None
    return ProcessIdentity(boot=process.machine.name, pid_namespace=1, pid=process.pid, start_ticks=process.pid)


def _is_gone(world: "World", process: ProcessIdentity) -> bool:
    """What a process can know: of its own machine only, and for certain."""
    here = CURRENT.get()
    if here is None or here.machine.name != process.boot:
        return False
    return all(other.pid != process.pid for other in here.machine.processes)
