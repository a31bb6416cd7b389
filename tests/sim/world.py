"""One world: machines, etcd, a store, a network, coordinators, workers, a client, and the clock they share."""

import asyncio
import contextlib
import gc
import random
import re
import shutil
import sys
from asyncio import events
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import grpc.aio

from dtrain.coordinator.service import CoordinatorConfig, serve
from dtrain.proto import agent_pb2 as wire
from dtrain.proto.agent_pb2_grpc import JobsStub
from tests.sim.blobs import Blobs
from tests.sim.etcd import Change, Etcd, Member
from tests.sim.gangs import Store
from tests.sim.loop import SimLoop
from tests.sim.machines import Machine, Process
from tests.sim.network import Network
from tests.sim.nodes import Node
from tests.sim.trainers import Diary, Habits
from tests.sim.witnesses import Witness

JOB = "job"
OTHER_JOB = "another"  # in some schedules: it wants the same slots, and comes first by name
PREFIX = "/dtrain"
COORDINATOR_PORT = 9000
RESTART_S = (0.2, 2.0)  # a supervisor brings a coordinator back within this
_TYPE = re.compile(rb'"type":"(\w+)"')
ENDS = frozenset({"JobSucceeded", "JobFailed", "JobCancelled", "RunInterrupted"})


def job_of(key: str) -> str:
    """The job of an event, by the event's key."""
    return key.rpartition("/events/")[0].rpartition("/")[2]


@dataclass
class Shape:
    """What a schedule's cluster and job are like; drawn from its seed."""

    workers: int
    slots: int
    coordinators: int
    nnodes_min: int
    nnodes_max: int
    nproc: int  # ranks of the job on each node
    every_steps: int
    checkpoints: int  # about so many
    step_s: float
    keep_last: int
    fence_after_s: float
    drift: float
    hang_timeout_s: float | None  # None: the product's own, far longer than a schedule
    other_after_s: float | None  # when another job is submitted; None: there is none


@dataclass
class Ending:
    """How a process of the product ended by itself."""

    at_s: float
    who: str
    error: BaseException


class World:
    """Everything of one schedule."""

    def __init__(self, seed: int, shape: Shape, folder: Path) -> None:
        self.seed = seed
        self.shape = shape
        self.folder = folder
        self.rng = random.Random(f"world {seed}")
        self.tokens = random.Random(f"tokens {seed}")
        self.seen: dict[str, int] = {}
        self.faults_seen: list[str] = []  # what a model itself found to be wrong
        self.endings: list[Ending] = []
        self.hurts: list[tuple[float, str, str]] = []  # when, which machine, which job (all: ""): to the data plane
        self.loop = SimLoop()
        self.loop.thread_delay_s = lambda: self.rng.uniform(0.0, 0.003)
        self.net = Network(self.loop, self.rng, self.saw)
        self.witness = Witness()
        self.net.hears, self.net.arrives = self.witness.hears, self.witness.arrives
        self.etcd = Etcd(self.loop, self.net, self.rng, self.saw)
        self.endpoints = tuple(f"etcd{number}:2379" for number in (1, 2, 3))
        self.members = [Member(self.etcd, Machine(name.partition(":")[0]), name) for name in self.endpoints]
        self.blobs = Blobs(self.loop, self.rng, self.saw)
        self.diary = Diary()
        self.stores: dict[str, Store] = {}  # by the address at which ranks meet
        self.habits = Habits(until=shape.every_steps * shape.checkpoints, step_s=shape.step_s)
        self.fence_after_s = shape.fence_after_s
        self.ends: dict[str, str] = {}  # job -> the event that ended it
        self.cancelled: set[str] = set()  # jobs of which a person asked that
        self.asked_to_leave: list[tuple[float, str]] = []  # when, and which worker
        self.log: list[tuple[str, Change]] = []  # type and change of each event, as it was appended
        self.etcd.on_change.append(self._note_event)
        self._pids = 100
        self.nodes = [
            Node(self, f"w{number}", slots=shape.slots, folder=folder / f"w{number}")
            for number in range(1, shape.workers + 1)
        ]
        self.hosts = [Machine(f"c{n}", rate=self.draw_rate()) for n in range(1, shape.coordinators + 1)]
        self.net.machines |= {f"{host.name}:{COORDINATOR_PORT}": host for host in self.hosts}
        self.client = self.process(Machine("client"), "client")
        self.healed = False

    # -- small things ------------------------------------------------------------------------------------

    def saw(self, situation: str) -> None:
        self.seen[situation] = self.seen.get(situation, 0) + 1

    def draw_rate(self) -> float:
        return 1.0 + self.rng.uniform(-self.shape.drift, self.shape.drift)

    def process(self, machine: Machine, name: str) -> Process:
        self._pids += 1
        return Process(self.loop, machine, name, self._pids)

    def journal_of(self, node: Node) -> str:
        database = node.machine.disk.connect(node.folder / "data" / "journal.sqlite")  # type: ignore[attr-defined]
        row = database.execute("SELECT value FROM meta WHERE name = 'journal'").fetchone()
        return str(row[0])

    def machine(self, name: str) -> Machine:
        return next(m for m in (*(node.machine for node in self.nodes), *self.hosts) if m.name == name)

    @property
    def jobs(self) -> tuple[str, ...]:
        return (JOB,) if self.shape.other_after_s is None else (JOB, OTHER_JOB)

    @property
    def ended(self) -> bool:
        """Whether every job has."""
        return len(self.ends) == len(self.jobs)

    @property
    def leader(self) -> Machine | None:
        """The machine that etcd says leads."""
        found = self.etcd.value(f"{PREFIX}/leader")
        if found is None or found.value is None:
            return None
        return next((host for host in self.hosts if f'"{host.name}"'.encode() in found.value), None)

    def hurt(self, machine: str, job: str = "") -> None:
        """Note that something was done to what trains there, of this job or of all."""
        self.hurts.append((self.loop.now_s, machine, job))

    def _note_event(self, change: Change) -> None:
        if change.value is not None and "/events/" in change.key:
            found = _TYPE.search(change.value)
            kind = found[1].decode() if found else "?"
            self.log.append((kind, change))
            if kind in ENDS:
                self.ends[job_of(change.key)] = kind

    # -- processes ----------------------------------------------------------------------------------------

    def start_coordinator(self, host: Machine) -> None:
        """Start a coordinator on the host, unless one lives there."""
        if host.dark or host.living:
            return
        process = self.process(host, f"{host.name}.{self._pids}")
        process.begin(self._coordinate(process, host))

    async def _coordinate(self, process: Process, host: Machine) -> None:
        config = CoordinatorConfig(
            etcd=self.endpoints, listen=f"{host.name}:{COORDINATOR_PORT}", prefix=PREFIX, identity=host.name
        )
        try:
            await serve(config)
            self.saw("coordinator left in order")
            process.kill()
        except Exception as error:
            self.endings.append(Ending(self.loop.now_s, process.name, error))
            process.kill()
            self.loop.after(self.rng.uniform(*RESTART_S), self.start_coordinator, host)

    def agent_ended(self, node: Node, error: BaseException) -> None:
        """An agent left by itself, which it must not; its service manager starts it again."""
        self.endings.append(Ending(self.loop.now_s, node.machine.name, error))
        self.loop.after(self.rng.uniform(*RESTART_S), node.start_agent)

    def begin(self, jobs: list[tuple[float, wire.Spec]]) -> None:
        """Start everything. ``jobs``: when each is submitted."""
        for host in self.hosts:
            self.loop.after(self.rng.uniform(0, 0.5), self.start_coordinator, host)
        for node in self.nodes:
            self.loop.after(self.rng.uniform(0, 1.0), node.start_agent)
        for after_s, job in jobs:
            request = wire.SubmitRequest(spec=job, request=f"the first of {job.name}")
            self.loop.after(after_s, partial(self.ask, "Submit", request, until_done=True))

    def ask(self, method: str, request: object, *, until_done: bool = False) -> None:
        """Have a person ask this of whoever leads; again and again if it must be done."""
        self.loop.create_task(self._ask(method, request, until_done), context=self.client.context.copy())

    async def _ask(self, method: str, request: object, until_done: bool) -> None:
        asked = 0
        while asked < 3 or until_done:
            host = self.hosts[asked % len(self.hosts)]
            asked += 1
            channel = grpc.aio.insecure_channel(f"{host.name}:{COORDINATOR_PORT}")
            try:
                await getattr(JobsStub(channel), method)(request, timeout=5.0)
                if not until_done or self.rng.random() < 0.7:  # some people press Enter twice
                    return
                self.saw("request repeated though it was answered")
                until_done = False
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT and not until_done:
                    return
            await asyncio.sleep(0.3)

    def close(self) -> None:
        """End the world: what its processes had under way is thrown away, not wound up."""
        self.loop.end()
        for node in self.nodes:
            node.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def swept() -> Iterator[None]:
    """Have a world in here, and collect afterwards what it left, before it could be closed in the middle of the next.

    Coroutines that would like to wind up find a loop that has ended. Else asyncio would make a real one for what they
    begin, and keep their whole world in it: each schedule would be slower than the one before.
    """
    heard, sys.unraisablehook = sys.unraisablehook, lambda _: None
    nowhere = SimLoop()
    nowhere.end()
    events._set_running_loop(nowhere)
    try:
        yield
    finally:
        gc.collect()
        events._set_running_loop(None)
        sys.unraisablehook = heard
