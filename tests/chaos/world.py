"""Everything that chaos strikes: etcd of three members, an S3 server, two coordinators, three workers, and the links.

Each service reaches each etcd member by a link of its own, each coordinator is reached by a link, and storage is
reached by a link and then by a proxy that speaks HTTP. All of it is on this machine's loopback, and all processes
carry one mark.
"""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.etcd_members import EtcdMembers, is_alive, replacing, send
from tests.chaos.storage_proxy import StorageProxy
from tests.support.cluster import Service
from tests.support.facts import wait_for
from tests.support.guardian import guarded
from tests.support.ports import free_ports
from tests.support.processes import MARK, end_all, free_shared_memory, marked, new_mark, shared_folders
from tests.support.s3_server import Seaweed, seaweedfs
from tests.support.tcp_proxy import TcpProxy

COORDINATORS = 2
WORKERS = 3
STORAGE = "storage"
DOOR_HOST = "127.0.0.2"  # loopback too: a coordinator's door has its port on another address
GONE_S = 20.0
TERMINATE_S = 30.0


@dataclass(slots=True, kw_only=True)
class World:
    """What runs, by name. ``down`` names the services that are to stay down for now."""

    folder: Path
    mark: str
    env: dict[str, str]
    etcd: EtcdMembers
    storage: Seaweed
    storage_proxy: StorageProxy
    storage_link: TcpProxy
    services: dict[str, Service] = field(default_factory=dict)
    etcd_links: dict[str, list[TcpProxy]] = field(default_factory=dict)  # by service
    doors: dict[str, TcpProxy] = field(default_factory=dict)  # by coordinator
    down: set[str] = field(default_factory=set)
    restart_at: dict[str, float] = field(default_factory=dict)

    @property
    def store(self) -> str:
        return f"s3://{self.storage.bucket}/runs?endpoint=http://{self.storage_link.endpoint}&region=us-east-1"

    def names(self, role: str) -> list[str]:
        return [name for name in self.services if name.startswith(role)]

    def processes(self, role: str) -> dict[int, str]:
        """Pid and owner's mark of the ranks (``trainer``), their keepers, or the warm processes."""
        found = {}
        for pid, command in marked(self.mark).items():
            rank = _variable(pid, "DTRAIN_TRAINER")
            is_keeper = command.startswith("dtrain-keeper") or "keeper.py" in command
            is_zygote = command.startswith("dtrain-zygote") or "zygote.py" in command
            kind = "keeper" if is_keeper else "zygote" if is_zygote else "trainer" if rank else ""
            if kind == role:
                found[pid] = rank
        return found

    def journal_of(self, worker: str) -> str:
        path = self.folder / worker / "journal.sqlite"
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as database:
            row = database.execute("select value from meta where name = 'journal'").fetchone()
            return str(row[0]) if row else ""
        return ""

    def supervise(self, delay_s: float) -> None:
        """Start what has ended, ``delay_s`` after it was seen to."""
        now = time.monotonic()
        for name, service in self.services.items():
            if is_alive(service) or name in self.down:
                self.restart_at.pop(name, None)
            elif now >= self.restart_at.setdefault(name, now + delay_s):
                service.start()
        if not self.storage.is_alive and STORAGE not in self.down:
            self.storage.start()

    def run(self, *args: str) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-m", "dtrain", args[0], "--etcd", ",".join(self.etcd.endpoints), *args[1:]]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=90, check=False)

    def stop(self) -> None:
        """End everything as an operator would; nothing may be left."""
        for name in (*self.names("w"), *self.names("c")):
            service = self.services[name]
            if is_alive(service):
                code = service.terminate(TERMINATE_S)
                assert code == 0, f"{name} ended with {code}"
        for member in self.etcd.members:
            send(member, signal.SIGTERM)
            if member.process is not None:
                member.process.wait(TERMINATE_S)
        gone = lambda: not marked(self.mark).keys() - {self.storage.pid}  # noqa: E731
        try:
            wait_for("no orphan process", gone, deadline_s=GONE_S)
        except AssertionError:
            raise AssertionError(f"orphans: {marked(self.mark)}") from None
        left = shared_folders(self.folder)
        assert not left, f"left in shared memory: {left}"

    def logs(self, last_bytes: int = 3000) -> str:
        texts = []
        for path in sorted(self.folder.rglob("*.log")):
            if "storage" not in path.parts:
                texts.append(f"---- {path.relative_to(self.folder)}\n{path.read_text(errors='replace')[-last_bytes:]}")
        return "\n".join(texts)


def _variable(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            key, _, value = entry.partition(b"=")
            if key.decode(errors="replace") == name:
                return value.decode(errors="replace")
    return ""


@contextlib.contextmanager
def world(folder: Path, *, remove: Path | None = None) -> Iterator[World]:
    """Everything up, in ``folder``. On leaving whatever is left is killed; ``World.stop`` is the orderly end.

    If this process is killed, what it left is ended, and ``remove`` removed.
    """
    mark = new_mark()
    env = {name: value for name, value in os.environ.items() if not name.startswith("DTRAIN_")}
    env |= {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder / "tmp")}
    for name in ("etcd", "tmp"):
        (folder / name).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(guarded(mark, folder, remove=remove))
        stack.callback(free_shared_memory, folder)
        stack.callback(end_all, mark)
        storage = stack.enter_context(seaweedfs(folder / "storage", env={MARK: mark}))
        proxy = stack.enter_context(StorageProxy(storage.endpoint.removeprefix("http://")))
        link = stack.enter_context(TcpProxy(proxy.endpoint))
        env |= storage.environment
        etcd = stack.enter_context(replacing(EtcdMembers(folder / "etcd", env)))
        etcd.start()
        etcd.wait_ready()
        it = World(
            folder=folder, mark=mark, env=env, etcd=etcd, storage=storage, storage_proxy=proxy, storage_link=link
        )
        for number, port in enumerate(free_ports(COORDINATORS)):
            name = f"c{number}"
            it.doors[name] = stack.enter_context(TcpProxy(f"127.0.0.1:{port}", listen=f"{DOOR_HOST}:{port}"))
            more = ("--listen", f"127.0.0.1:{port}", "--advertise", DOOR_HOST, "--identity", name)
            _add(it, stack, name, "coordinator", more)
        for number in range(WORKERS):
            name = f"w{number}"
            _add(it, stack, name, "worker", ("--worker-id", name, "--slots", "1", "--data-dir", str(folder / name)))
        yield it


def _add(it: World, stack: contextlib.ExitStack, name: str, verb: str, more: tuple[str, ...]) -> None:
    it.etcd_links[name] = [stack.enter_context(TcpProxy(endpoint)) for endpoint in it.etcd.endpoints]
    endpoints = ",".join(link.endpoint for link in it.etcd_links[name])
    argv = [sys.executable, "-m", "dtrain", verb, "--etcd", endpoints, "--etcd-wait", "60", *more]
    it.services[name] = Service(argv, it.env, it.folder / f"{name}.log")
    it.services[name].start()
