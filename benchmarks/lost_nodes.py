"""A node is gone: its agent and its trainer are killed at once, and another node takes over.

Agents on this machine, one rank each, a job of two nodes; the node of rank 1 is killed. dtrain has a third node as a
spare, and runs with the shortest lease that etcd grants. torchrun knows no spare (an agent that waits makes the others
restart again and again), so it is measured in the two ways that it has: the survivor goes on alone (1:2), or a new
agent is started at the moment of the kill (2:2). It runs with the shortest keep-alive it takes, and with its store in
a process of its own, so that no kill takes the store along.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from contenders import BIN, DEADLINE_S, EVERY_STEPS, JOB, SCRIPT, WARM, Line, Record

from dtrain.etcd.embedded import EmbeddedEtcd

SPARES = {"dtrain": 1, "torchrun": 0}
SETTLED_S = 4.0
LEASE_TTL_S = 2
# Lease, etcd's half second, 0.5 s in which a stream may be opened again, and the coordinator's tick.
BOUND_S = LEASE_TTL_S + 0.5 + 0.5 + 0.25
KEEP_ALIVE = "keep_alive_interval=1,keep_alive_max_attempt=2,last_call_timeout=1,read_timeout=5,is_host=false"
NODE = "RECOVERY_NODE"  # in the environment of whatever runs on a node
STORE = "import sys, time; from torch.distributed import TCPStore; "
STORE += "s = TCPStore('127.0.0.1', int(sys.argv[1]), is_master=True, wait_for_workers=False); time.sleep(1e6)"


class Cluster(Record):
    """The nodes of one side, and what else it needs."""

    def __init__(self, folder: Path, name: str, nnodes: str) -> None:
        super().__init__(folder, name)
        self._nnodes = nnodes
        self._nodes = range(2 + SPARES[name])
        self._processes: list[subprocess.Popen[bytes]] = []
        self._etcd: EmbeddedEtcd | None = None
        self._endpoint = ""

    def start(self) -> None:
        if self.name == "dtrain":
            self._etcd = EmbeddedEtcd(self.folder / "etcd", log_path=self.folder / "etcd.log")
            self._etcd.start()
            asyncio.run(self._etcd.wait_ready(DEADLINE_S))
            self._endpoint = self._etcd.endpoint
            self._begin("coordinator", [str(BIN / "dtrain"), "coordinator", "--etcd", self._endpoint])
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self._endpoint = f"127.0.0.1:{port}"
            self._begin("store", [sys.executable, "-c", STORE, str(port)])
        for node in self._nodes:
            self.start_node(node)
        if self.name == "dtrain":
            self._submit()

    def start_node(self, node: int) -> None:
        if self.name == "dtrain":
            command = [str(BIN / "dtrain"), "worker", "--etcd", self._endpoint, "--worker-id", f"node-{node}"]
            command += ["--slots", "1", "--data-dir", str(self.folder / f"node-{node}")]
            command += ["--lease-ttl", str(LEASE_TTL_S)]
        else:
            command = [str(BIN / "torchrun"), "--nnodes", self._nnodes, "--nproc-per-node", "1", "--max-restarts", "99"]
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", self._endpoint, "--rdzv-id", JOB]
            command += ["--rdzv-conf", KEEP_ALIVE, "--local-addr", "127.0.0.1", "--monitor-interval", "0.05"]
            command += [str(SCRIPT)]
        self._begin(f"node-{node}", command, node=str(node))

    def wait_until_warm(self) -> None:
        """Wait for the warm process of every node of dtrain's."""
        deadline = time.monotonic() + DEADLINE_S
        while self.name == "dtrain" and time.monotonic() < deadline:
            if all(self._is_warm(node) for node in self._nodes):
                return
            time.sleep(0.1)

    def _is_warm(self, node: int) -> bool:
        """Whether the node's newest agent said so."""
        log = (self.folder / f"node-{node}.log").read_text()
        return WARM in log.rpartition(f"-- {BIN}")[2]

    def kill_node_of(self, rank: int) -> int:
        """Kill everything on the node of this rank, its agent first; return the node."""
        pid = next(line["pid"] for line in reversed(self.lines()) if line["rank"] == rank)
        node = psutil.Process(pid).environ()[NODE]
        found = [process for process in psutil.process_iter() if _variable(process, NODE) == node]
        for process in sorted(found, key=lambda process: process.pid):  # the agent was started first
            process.kill()
        psutil.wait_procs(found, timeout=5)
        return int(node)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for left in psutil.process_iter():  # what a killed agent left behind
            if _variable(left, "RECOVERY_RECORD") == str(self.path):
                left.kill()
        if self._etcd is not None:
            self._etcd.stop()

    def _submit(self) -> None:
        command = [str(BIN / "dtrain"), "submit", "--etcd", self._endpoint, "--name", JOB, "--nnodes", self._nnodes]
        command += ["--every-steps", str(EVERY_STEPS), "--store", f"file://{self.folder}/store"]
        command += ["--max-restarts", "99", str(SCRIPT)]
        subprocess.run(command, env=self.environment(), check=True, capture_output=True)

    def _begin(self, name: str, command: list[str], *, node: str = "") -> None:
        environment = {**self.environment(), **({NODE: node} if node else {})}
        with (self.folder / f"{name}.log").open("ab") as log:
            log.write(f"-- {' '.join(command)}\n".encode())
            log.flush()
            self._processes.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )


def _variable(process: psutil.Process, name: str) -> str:
    try:
        return str(process.environ().get(name, ""))
    except psutil.Error:
        return ""


@contextmanager
def nodes(name: str, nnodes: str) -> Iterator[Cluster]:
    it = Cluster(Path(tempfile.mkdtemp(prefix="dtrain-recovery-")), name, nnodes)
    try:
        it.start()
        yield it
    finally:
        it.stop()
        shutil.rmtree(it.folder, ignore_errors=True)


def measure(name: str, kills: int, *, alone: bool = False) -> list[float]:
    """Return the seconds from each kill to the first new step: on both ranks, or of a survivor that is left alone."""
    if alone:  # whether an agent that comes back later is let in is not asked here
        return [_kill_and_leave_alone(name) for _ in range(kills)]
    took = []
    with nodes(name, "2") as it:
        it.wait_for_steps(not_of=set(), seconds=SETTLED_S)
        for _ in range(kills):
            it.wait_until_warm()
            old = {line["pid"] for line in it.lines()}
            at = time.time()
            node = it.kill_node_of(1)
            if name == "torchrun":
                it.start_node(node)
            took.append(_first_step(it.wait_for_steps(not_of=old, seconds=SETTLED_S), (0, 1)) - at)
            if name == "dtrain":
                it.start_node(node)
            it.wait_for_steps(not_of=old, seconds=2 * SETTLED_S)
    return took


def _kill_and_leave_alone(name: str) -> float:
    with nodes(name, "1:2") as it:
        old = {line["pid"] for line in it.wait_for_steps(not_of=set(), seconds=SETTLED_S)}
        at = time.time()
        it.kill_node_of(1)
        return _first_step(it.wait_for_steps(not_of=old, seconds=0.1, ranks=(0,)), (0,)) - at


def _first_step(lines: list[Line], ranks: Sequence[int]) -> float:
    """When the last of the ranks had done its first step."""
    return float(
        max(min(line["at"] for line in lines if line["rank"] == r and line["moment"] == "step") for r in ranks)
    )


def main() -> None:
    for name, alone in (("dtrain", False), ("torchrun", True), ("torchrun", False)):
        took = measure(name, int(os.environ.get("KILLS", "2")), alone=alone)
        print(name, "alone" if alone else "both", " ".join(f"{seconds:.2f}" for seconds in took), flush=True)


if __name__ == "__main__":
    main()
