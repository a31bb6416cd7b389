"""One node for tests of the agent: its process, its folders, and a coordinator that says what the test wants."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dtrain.proto import agent_pb2 as wire
from tests.support.etcd_server import EtcdServer
from tests.support.facts import wait_for
from tests.support.processes import MARK, end_all, new_mark
from tests.worker.fake_coordinator import FakeCoordinator
from tests.worker.scripts import agent_process, mailbox_trainer

DEADLINE_S = 30.0
JOB = "digits"


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


class Node:
    """An agent's process and what it was told."""

    def __init__(self, folder: Path, etcd: EtcdServer, coordinator: FakeCoordinator, mark: str) -> None:
        self.folder = folder
        self.etcd = etcd
        self.coordinator = coordinator
        self.mark = mark
        self.end_file = folder / "end"
        self.store = f"file://{folder / 'store'}"
        self.settings: dict[str, Any] = {
            "etcd": [etcd.endpoint],
            "data_dir": str(folder / "node"),
            "shared_memory": str(folder / "shm"),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._commands = 0
        (folder / "shm").mkdir()

    def start(self, **settings: Any) -> None:
        self.settings.update(settings)
        seen = len(self.coordinator.snapshots)
        with (self.folder / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, agent_process.__file__, json.dumps(self.settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, MARK: self.mark},
                start_new_session=True,
            )
        wait_for("a snapshot of the new agent", lambda: len(self.coordinator.snapshots) > seen, deadline_s=DEADLINE_S)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def command(self, **fields: Any) -> str:
        """Send a command under a new id; return the id."""
        self._commands += 1
        command = wire.Command(id=fields.pop("id", f"c{self._commands}"), **fields)
        if not command.HasField("noop"):
            command.job = command.job or JOB
            command.generation = command.generation or 1
        self.coordinator.send(command)
        return command.id

    def start_trainers(
        self, *, generation: int = 1, restore: wire.Restore | None = None, id: str = "", **fields: Any
    ) -> str:
        start = wire.StartTrainers(
            **{
                "python": sys.executable,
                "script": mailbox_trainer.__file__,
                "args": [str(self.end_file), "0.01"],
                "cwd": str(self.folder),
                "world_size": 2,
                "nnodes": 1,
                "nproc": 2,
                "master_address": "127.0.0.1",
                "max_restarts": 3,
                "store": self.store,
                "restore": restore,
                **fields,
            }
        )
        named = {"id": id} if id else {}
        return self.command(generation=generation, start_trainers=start, **named)

    # ---- facts -------------------------------------------------------------------------------------------

    def wait(self, what: str, look: Callable[[wire.Snapshot], Any], *, deadline_s: float = DEADLINE_S) -> Any:
        """Wait until the latest snapshot shows it."""

        def latest() -> Any:
            snapshot = self.coordinator.latest
            return look(snapshot) if snapshot is not None else None

        try:
            return wait_for(what, latest, deadline_s=deadline_s)
        except AssertionError as error:
            log = (self.folder / "agent.log").read_text()[-3000:]
            raise AssertionError(f"{error}\nlatest: {self.coordinator.latest}\nagent: {log}") from None

    def wait_done(self, command_id: str, state: int = wire.DONE) -> wire.CommandStatus:
        def look(snapshot: wire.Snapshot) -> wire.CommandStatus | None:
            return next((c for c in snapshot.commands if c.id == command_id and c.state == state), None)

        return self.wait(f"command {command_id} in state {state}", look)  # type: ignore[no-any-return]

    def wait_training(self) -> dict[int, int]:
        """Wait until both ranks train; return rank -> pid."""

        def look(snapshot: wire.Snapshot) -> dict[int, int] | None:
            ranks = [rank for assignment in snapshot.assignments for rank in assignment.ranks]
            training = [rank for rank in ranks if rank.phase == "training" and rank.state == wire.RUNNING]
            done = len(training) == 2 and all(rank.completed_step > 0 for rank in training)
            return {rank.rank: rank.pid for rank in ranks} if done else None

        return self.wait("two ranks train", look)  # type: ignore[no-any-return]

    def steps(self) -> dict[int, int]:
        assert self.coordinator.latest is not None
        return {
            rank.rank: rank.completed_step
            for assignment in self.coordinator.latest.assignments
            for rank in assignment.ranks
        }

    def log(self, rank: int, generation: int = 1) -> str:
        return (self.folder / "node" / "logs" / JOB / f"generation-{generation:04d}" / f"rank-{rank}.log").read_text()


@contextlib.contextmanager
def node(folder: Path, etcd: EtcdServer) -> Iterator[Node]:
    """A node that is not started yet; whatever it starts is gone at the end."""
    mark = new_mark()
    with FakeCoordinator(etcd.endpoint) as coordinator:
        it = Node(folder, etcd, coordinator, mark)
        try:
            yield it
        finally:
            end_all(mark)
            if it.process is not None:
                it.process.wait()
