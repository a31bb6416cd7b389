"""A real cluster for a test: etcd, coordinators and worker agents, each a process that can be killed at will."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dtrain.common.names import JobName
from dtrain.coordinator.core.events import RecordedEvent
from dtrain.coordinator.history import read_history
from dtrain.etcd.client import EtcdClient
from tests.support.etcd_server import EtcdServer
from tests.support.facts import wait_for
from tests.support.processes import MARK, end_all, free_shared_memory, marked, new_mark, shared_folders

_Result = TypeVar("_Result")
PREFIX = "/dtrain"
ENDED = ("JobSucceeded", "JobFailed", "JobCancelled")


@dataclass(slots=True)
class Service:
    """One process of the cluster, restarted on demand with the same arguments."""

    argv: list[str]
    env: dict[str, str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """kill -9, and wait for its end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self, deadline_s: float = 20.0) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline_s)


@dataclass(slots=True)
class Cluster:
    """etcd, one or more coordinators, one or more workers."""

    folder: Path
    mark: str
    etcd: EtcdServer
    env: dict[str, str]
    coordinators: list[Service] = field(default_factory=list)
    workers: list[Service] = field(default_factory=list)

    @property
    def etcdctl_env(self) -> dict[str, str]:
        return {**self.env, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": self.etcd.endpoint}

    def add_coordinator(self) -> Service:
        number = len(self.coordinators)
        argv = [sys.executable, "-m", "dtrain", "coordinator", "--etcd", self.etcd.endpoint, "--listen", "127.0.0.1:0"]
        service = Service(argv, self.env, self.folder / f"coordinator{number}.log")
        service.start()
        self.coordinators.append(service)
        return service

    def add_worker(self, *, slots: int = 2) -> Service:
        number = len(self.workers)
        name = f"w{number}"
        argv = [sys.executable, "-m", "dtrain", "worker", "--etcd", self.etcd.endpoint, "--worker-id", name]
        argv += ["--slots", str(slots), "--data-dir", str(self.folder / name)]
        service = Service(argv, self.env, self.folder / f"{name}.log")
        service.start()
        self.workers.append(service)
        return service

    def wait_for_worker(self, service: Service) -> None:
        """Wait until the worker has registered: from then on it ends well when it is asked to."""
        key = f"{PREFIX}/workers/{service.log.stem}"
        wait_for(f"{key} in etcd", lambda: self._etcd(lambda client: client.get(key)), deadline_s=60.0)

    def run(self, verb: str, *args: str, deadline_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """Run a dtrain command against this cluster to its end."""
        argv = [sys.executable, "-m", "dtrain", verb, "--etcd", self.etcd.endpoint, *args]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=deadline_s, check=False)

    def submit(self, script: Path, *args: str, options: tuple[str, ...]) -> None:
        """Submit a job and leave it to the cluster."""
        argv = [sys.executable, "-m", "dtrain", "submit", "--etcd", self.etcd.endpoint, *options, str(script), *args]
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    def history(self, job: str) -> list[RecordedEvent]:
        """The job's events, chain checked; empty while etcd is away."""
        return self._etcd(lambda client: read_history(client, PREFIX, JobName(job)))

    def status(self, job: str) -> dict[str, Any]:
        done = self.run("status", job, "-o", "json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def wait_for_event(self, job: str, kind: str, *, count: int = 1, deadline_s: float = 60.0) -> list[RecordedEvent]:
        """Wait until ``count`` events of this type are in the log; return them all."""

        def look() -> list[RecordedEvent] | None:
            found = [event for event in self.history(job) if event.type == kind]
            return found if len(found) >= count else None

        return wait_for(f"{count} {kind} in the log of {job}", look, deadline_s=deadline_s)

    def wait_for_end(self, job: str, *, deadline_s: float = 120.0) -> RecordedEvent:
        """Wait until the job has ended; return the event that says so."""

        def look() -> RecordedEvent | None:
            # Deletions follow the end, any number of them.
            return next((event for event in reversed(self.history(job)) if event.type in ENDED), None)

        return wait_for(f"the end of {job}", look, deadline_s=deadline_s)

    def _etcd(self, call: Any) -> Any:
        async def once() -> Any:
            async with EtcdClient((self.etcd.endpoint,), timeout_s=10.0) as client:
                return await call(client)

        return _run(once())

    def shared_folders(self) -> list[Path]:
        """The folders that this cluster's agents have in shared memory."""
        return shared_folders(self.folder)

    def logs(self) -> str:
        """All service logs, for a failure's message."""
        texts = []
        for path in sorted(self.folder.rglob("*.log")):
            texts.append(f"---- {path.relative_to(self.folder)}\n{path.read_text(errors='replace')[-4000:]}")
        return "\n".join(texts)


def _run(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    return asyncio.run(coroutine)


@contextmanager
def cluster(folder: Path, *, coordinators: int = 1, workers: int = 1, slots: int = 2) -> Iterator[Cluster]:
    """A running cluster in ``folder``. At the end everything is stopped as an operator would, and must be gone."""
    mark = new_mark()
    env = {name: value for name, value in os.environ.items() if not name.startswith("DTRAIN_")}
    env |= {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    (folder / "etcd").mkdir(parents=True)
    it = Cluster(folder, mark, EtcdServer(folder / "etcd"), env)
    try:
        _run(it.etcd.up())
        for _ in range(coordinators):
            it.add_coordinator()
        for _ in range(workers):
            it.add_worker(slots=slots)
        yield it
        for service in [*it.workers, *it.coordinators]:
            if service.process is not None and service.process.poll() is None:
                assert service.terminate() == 0, it.logs()
        wait_for("no process left behind", lambda: not marked(mark), deadline_s=10.0)
        assert not it.shared_folders(), "left in shared memory"
    except BaseException:
        print(it.logs())
        raise
    finally:
        it.etcd.stop()
        end_all(mark)
        free_shared_memory(folder)
