"""A worker's machine: its disk, its shared memory, its trainers, and the agents that live on it one after another."""

import asyncio
import itertools
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.common.names import WorkerId
from dtrain.worker import agent as agent_module
from dtrain.worker import journal as journal_module
from dtrain.worker.config import WorkerConfig
from dtrain.worker.core.inputs import TrainerExited, TrainerStarted
from dtrain.worker.core.states import ExitFact
from dtrain.worker.rank_dirs import CACHE, RankId
from tests.sim.loop import CURRENT
from tests.sim.machines import Machine, Process
from tests.sim.trainers import Trainer

if TYPE_CHECKING:
    from tests.sim.world import World

HEARTBEAT_S = 1.0
LEASE_TTL_S = 5.0
PORTS = (20_001, 20_002)  # that a machine has free, so that ranks of an older generation still know the newest's
PORTS_OF_TWO = (*PORTS, 20_003, 20_004)  # where two jobs may want one at a time
SPAWNED = "spawned"  # in a rank's folder: its trainer was started
FORBIDDEN = "forbidden"  # it never will be


class Disk:
    """What a machine's files are: SQLite databases, and which of their commits have reached the platter."""

    def __init__(self) -> None:
        self._databases: dict[str, sqlite3.Connection] = {}
        self._synced: dict[str, bytes] = {}  # as it was when the first commit was not synced

    def connect(self, path: Path) -> "_Connection":
        name = str(path)
        if name not in self._databases:
            self._databases[name] = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        return _Connection(self._databases[name], lambda: self._not_synced(name))

    def _not_synced(self, name: str) -> None:
        if name not in self._synced:
            self._synced[name] = self._databases[name].serialize()

    def lose_power(self) -> None:
        """What was committed without a sync was never there."""
        for name, image in self._synced.items():
            self._databases[name].close()
            self._databases[name] = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self._databases[name].deserialize(image)
        self._synced.clear()

    def rows(self, path: Path, statement: str, parameters: tuple[object, ...]) -> list[tuple[Any, ...]]:
        """What a database holds now; nothing if there is none."""
        database = self._databases.get(str(path))
        return [] if database is None else database.execute(statement, parameters).fetchall()

    def wipe(self) -> None:
        for database in self._databases.values():
            database.close()
        self._databases.clear()
        self._synced.clear()


class _Connection:
    """A database as one process has it open."""

    def __init__(self, database: sqlite3.Connection, unsynced: Callable[[], None]) -> None:
        self._database = database
        self._told_unsynced = unsynced
        self._synchronous = False

    def execute(self, statement: str, parameters: Any = ()) -> sqlite3.Cursor:
        if statement.startswith("PRAGMA"):
            self._synchronous = self._synchronous or "synchronous = FULL" in statement
        cursor = self._database.execute(statement, parameters)
        if statement == "COMMIT" and not self._synchronous:
            self._told_unsynced()
        return cursor

    def executemany(self, statement: str, rows: Iterable[Any]) -> sqlite3.Cursor:
        return self._database.executemany(statement, rows)

    def close(self) -> None:
        """The file stays."""


class Sqlite:
    """Stands for the module `sqlite3` in the journal."""

    DatabaseError = sqlite3.DatabaseError

    @staticmethod
    def connect(path: Path, **_: Any) -> _Connection:
        process = CURRENT.get()
        assert process is not None
        return process.machine.disk.connect(path)  # type: ignore[attr-defined]


class Keepers:
    """Stands for the agent's keepers: the same promises over modelled processes."""

    def __init__(
        self,
        emit: Callable[[TrainerStarted | TrainerExited], None],
        read_last: Callable[[RankId], None],
        journal_id: str,
        begin: object,
        zygotes: object,
    ) -> None:
        process = CURRENT.get()
        assert process is not None
        self._node: Node = process.machine.node  # type: ignore[attr-defined]
        self._journal_id = journal_id
        self._emit = emit
        self._read_last = read_last
        self._kept: dict[RankId, Path] = {}
        self._told: set[RankId] = set()

    def ensure(self, of: RankId, folder: Path, *, start: bool) -> None:
        if of in self._kept:
            return
        trainer = self._node.trainers.get(of)
        if not folder.is_dir():
            self._finish(of, ExitFact(code=None, at_unix_s=self._node.wall(), error="its folder is gone"))
            return
        self._kept[of] = folder
        if trainer is not None and (folder / SPAWNED).exists():
            return
        if start and not (folder / FORBIDDEN).exists():
            (folder / SPAWNED).touch()
            self._node.trainers[of] = Trainer(self._node, of, folder)
        else:
            (folder / FORBIDDEN).touch()
            error = "it was ended before it was started"
            self._finish(of, ExitFact(code=None, at_unix_s=self._node.wall(), error=error))

    def poll(self) -> None:
        for of in tuple(self._kept):
            trainer = self._node.trainers.get(of)
            if trainer is None:
                self._finish(of, ExitFact(code=None, at_unix_s=self._node.wall(), error="nobody saw the exit"))
            elif trainer.exit is not None:
                self._finish(of, trainer.exit)
            elif trainer.started and of not in self._told:
                self._told.add(of)
                pid = 1000 + (self._node.world.jobs.index(of.job) * 1000 + of.generation) * 16 + of.rank
                self._emit(TrainerStarted(job=of.job, generation=of.generation, rank=of.rank, pid=pid))

    def _finish(self, of: RankId, fact: ExitFact) -> None:
        self._kept.pop(of, None)
        self._read_last(of)
        self._emit(TrainerExited(job=of.job, generation=of.generation, rank=of.rank, exit=fact))

    def end(self, job: str, generation: int, grace_s: float) -> None:
        for of in tuple(self._kept):
            if of.job == job and of.generation == generation and of in self._node.trainers:
                self._node.trainers[of].stop(grace_s)

    def close(self) -> None:
        self._kept.clear()


class Zygotes:
    """Stands for the warm process: there is none."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def tend(self, **_: object) -> None:
        pass

    def close(self) -> None:
        pass


class HeldPort:
    """Stands for the port that an agent holds: another one each time, and soon the same again."""

    def __init__(self) -> None:
        process = CURRENT.get()
        assert process is not None
        self._node: Node = process.machine.node  # type: ignore[attr-defined]
        self.number = self._node.next_port()

    def release(self, number: int) -> None:
        if number == self.number:
            self.number = self._node.next_port()

    def close(self) -> None:
        pass


class Node:
    """One worker's machine."""

    def __init__(self, world: "World", name: str, *, slots: int, folder: Path) -> None:
        self.world = world
        self.machine = Machine(name, rate=world.draw_rate(), boot_offset_s=world.rng.uniform(1e3, 1e6))
        self.machine.node = self  # type: ignore[attr-defined]
        self.machine.disk = Disk()  # type: ignore[attr-defined]
        self.slots = slots
        self.folder = folder
        self.memory = folder / "shm"
        self.memory.mkdir(parents=True)
        self.trainers: dict[RankId, Trainer] = {}
        self.agent: Process | None = None
        self.due_back_s = 0.0  # when an agent that was asked to leave is started again
        self._ports = itertools.cycle(PORTS if len(world.jobs) == 1 else PORTS_OF_TWO)
        self._incarnations = 0

    def wall(self) -> float:
        return self.machine.wall(self.world.loop.now_s)

    def journal_rows(self, statement: str, parameters: tuple[object, ...]) -> list[tuple[Any, ...]]:
        """What the journal on its disk holds."""
        disk: Disk = self.machine.disk  # type: ignore[attr-defined]
        return disk.rows(self.folder / "data" / "journal.sqlite", statement, parameters)

    def next_port(self) -> int:
        """Another than the last; with two jobs none at which a trainer may still be listening."""
        port = next(self._ports)
        while len(self.world.jobs) > 1 and any(t.rendezvous.endswith(f":{port}") for t in self.living):
            port = next(self._ports)
        return port

    @property
    def living(self) -> list[Trainer]:
        return [trainer for trainer in self.trainers.values() if trainer.alive]

    def start_agent(self) -> None:
        """Start an agent, unless one lives."""
        if self.machine.dark or (self.agent is not None and self.agent.alive):
            return
        self._incarnations += 1
        name = f"{self.machine.name}.{self._incarnations}"
        process = self.agent = self.world.process(self.machine, name)
        process.begin(self._live(process))

    async def _live(self, process: Process) -> None:
        config = WorkerConfig(
            etcd=self.world.endpoints,
            worker_id=WorkerId(self.machine.name),
            data_dir=self.folder / "data",
            slots=self.slots,
            listen=f"{self.machine.name}:7000",
            heartbeat_s=HEARTBEAT_S,
            lease_ttl_s=LEASE_TTL_S,
            fence_after_s=self.world.fence_after_s,
            zygote=False,
            shared_memory=self.memory,
        )
        try:
            config.data_dir.mkdir(parents=True, exist_ok=True)
            journal = journal_module.Journal(config.data_dir / "journal.sqlite")
            await agent_module.Agent(config, journal, self.folder / "agent.lock").run()
            self.world.saw("agent left in order")
            self.world.loop.after(max(0.0, self.due_back_s - self.world.loop.now_s), self.start_agent)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.world.agent_ended(self, error)
        process.kill()

    def kill_agent(self) -> None:
        if self.agent is not None:
            self.agent.kill()

    def kill_strays(self, is_stray: Callable[[str], bool]) -> dict[int, int]:
        """What the agent's sweep for marked processes does."""
        journal_id = self.world.journal_of(self)
        killed = {}
        for trainer in self.living:
            of = trainer.of
            if is_stray(f"{journal_id}/{of.job}/{of.generation}/{of.rank}"):
                killed[of.rank] = of.generation
                trainer.end(-9, "it was a stray")
        return killed

    def lose_power(self, *, wipe: bool) -> None:
        """The machine is gone: processes, shared memory, what was not synced; with ``wipe`` the disk as well."""
        self.machine.dark = True
        for process in list(self.machine.processes):
            process.kill()
        for trainer in self.living:
            trainer.end(-9, "its machine lost power")
        self.trainers.clear()
        shutil.rmtree(self.memory, ignore_errors=True)
        self.machine.disk.lose_power()  # type: ignore[attr-defined]
        if wipe:
            self.machine.disk.wipe()  # type: ignore[attr-defined]
            shutil.rmtree(self.folder / "data", ignore_errors=True)

    def tear_cache(self, rng: random.Random) -> bool:
        """Nobody waits for what a cache writes: a loss of power may leave any of it. Return whether it did."""
        torn = False
        for path in sorted((self.folder / "data" / CACHE).rglob("*.*")):
            data = path.read_bytes()
            left = rng.choice((data, data[: len(data) // 2], bytes(len(data)), b""))
            path.write_bytes(left)
            torn = torn or left != data
        return torn

    def close(self) -> None:
        self.machine.disk.wipe()  # type: ignore[attr-defined]
        shutil.rmtree(self.folder, ignore_errors=True)

    def boot(self) -> None:
        self.machine.dark = False
        self.memory.mkdir(parents=True, exist_ok=True)
        self.start_agent()
