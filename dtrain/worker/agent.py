"""The agent of one node: one loop that takes facts in, steps the machine, writes the journal, and then acts.

kill -9 is harmless at every moment, because of the order in which things happen. Between ...

- a command's receipt and the journal: the command never happened; the coordinator still wants it and repeats it;
- the journal and the folders: ``recover`` asks for the folders again, and making them twice changes nothing;
- the intent to spawn and the keeper's lock: ``recover`` asks for the spawn again; if the dead agent's keeper was
  on its way, two come for one lock, one goes, and the folder is marked as used before any trainer is forked;
- the keeper's start and the report: the keeper's own file says who it is; the restarted agent reads it;
- a trainer's exit and the journal: exited.json stays until the journal holds the exit and the folder is cleaned;
- staging and upload: the mailbox still holds the staged word, the slot still holds the bytes: it is sent then;
- upload and journal: the same bytes are put under the same key once more, and then the ack is written;
- journal and snapshot: the next snapshot is the whole state, the ack included;
- SIGTERM to trainers and their exits: the stop is in the journal, and is repeated with its whole grace.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from dtrain.common.errors import DisplacedError, UserError
from dtrain.common.version import VERSION
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.registrations import RegistrationTaken, keep_registered
from dtrain.proto import agent_pb2 as wire
from dtrain.proto.agent_pb2_grpc import add_LogsServicer_to_server
from dtrain.worker.arenas import Arenas
from dtrain.worker.bandwidth import BandwidthCap
from dtrain.worker.caches import Caches
from dtrain.worker.config import WorkerConfig
from dtrain.worker.core.actions import Action, JournalEntry
from dtrain.worker.core.inputs import CommandReceived, Input, StopRequested, Tick, TrainerExited
from dtrain.worker.core.machine import recover, step
from dtrain.worker.core.snapshots import project
from dtrain.worker.core.states import ExitFact, GenerationStage, NodeState
from dtrain.worker.journal import Journal
from dtrain.worker.keepers import Keepers, kill_strays
from dtrain.worker.mailboxes import POLL_S, Mailboxes
from dtrain.worker.performing import Shells, perform
from dtrain.worker.ports import HeldPort
from dtrain.worker.rank_dirs import RankDirs, RankId
from dtrain.worker.registration import is_of, registration
from dtrain.worker.restores import Restores
from dtrain.worker.rpc.client import CoordinatorClient
from dtrain.worker.rpc.convert import Identity, to_snapshot
from dtrain.worker.rpc.leaders import Leaders
from dtrain.worker.rpc.logs import LogFiles, log_path
from dtrain.worker.stacks import Stacks
from dtrain.worker.tasks import Tasks
from dtrain.worker.transfers import Transfers, sums
from dtrain.worker.uploads import Uploads
from dtrain.worker.zygotes import Zygotes, needs_here

logger = logging.getLogger(__name__)

STOP_GRACE_S = 5.0  # between SIGTERM and SIGKILL when the agent itself is asked to leave
PROGRESS_S = 0.1  # how old a rank's step may be in any snapshot: the coordinator plans ahead by it
TICK_S = 1.0  # how often the fence is looked at; it is counted in minutes
LOCK_TRIES_S = 1.0  # a keeper's look at the lock takes microseconds; whoever holds it longer is an agent
LOCK_PAUSE_S = 0.02
PID_BYTES = 32  # in the lock file, always written over in place
EMPTY_LOGS_GRACE_S = 0.5  # readers of logs get this long for the last lines when the agent leaves


async def serve(config: WorkerConfig) -> int:
    """Run one agent until it is asked to leave (SIGTERM, SIGINT); return its exit code.

    Raises UserError if the data folder cannot be used or another process uses it.
    """
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data folder {config.data_dir} cannot be made ({error.strerror}): name another --data-dir."
        ) from error
    lock_path = config.data_dir.resolve() / "agent.lock"
    async with _agent_lock(lock_path):
        journal = Journal(config.data_dir / "journal.sqlite")
        try:
            await Agent(config, journal, lock_path).run()
        finally:
            journal.close()
    return 0


@contextlib.asynccontextmanager
async def _agent_lock(path: Path) -> AsyncIterator[None]:
    """Hold the data folder. Keepers look at this lock to see whether their agent lives."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + LOCK_TRIES_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    owner = os.pread(lock, PID_BYTES, 0).decode(errors="replace").strip() or "unknown"
                    raise UserError(
                        f"data folder {path.parent} is in use by another process (pid {owner}): "
                        "stop that one, or name another --data-dir."
                    ) from error
            await asyncio.sleep(LOCK_PAUSE_S)
        with contextlib.suppress(OSError):  # a full disk: only a person who starts a second agent would read it
            os.pwrite(lock, f"{os.getpid()}\n".encode().ljust(PID_BYTES), 0)
        yield
    finally:
        os.close(lock)


class Agent:
    """The loop and the shells around it."""

    def __init__(self, config: WorkerConfig, journal: Journal, lock_path: Path) -> None:
        self._config = config
        self._journal = journal
        self._inputs: asyncio.Queue[Input] = asyncio.Queue()  # bounded by what ranks and transfers can cause
        self._state: NodeState = journal.load(
            worker=config.worker_id, slots=config.slots, fence_after_s=config.fence_after_s
        )
        self._etcd = EtcdClient(config.etcd)
        self._leaders = Leaders(self._etcd, config.prefix)
        self._client = CoordinatorClient(
            self._leaders,
            self._emit,
            self._snapshot,
            lambda: self._state.term,
            heartbeat_s=config.heartbeat_s,
        )
        self._identity: Identity | None = None
        self._taken: UserError | None = None  # set once another process has this worker's name
        self._number = 0
        self._tasks = Tasks()
        dirs = RankDirs(config.shared_memory, config.data_dir.resolve(), journal.id)
        caches = Caches(dirs)
        arenas = Arenas(dirs, self._open_slots, self._tell_rank, self._tasks.begin, make_room=caches.make_room)
        mailboxes = Mailboxes(self._emit, progress_every_s=PROGRESS_S, on_need=arenas.provide)
        self._zygotes = Zygotes(
            config.data_dir.resolve() / "zygote.log", enabled=config.zygote, after_s=config.zygote_after_s
        )
        self._shells = Shells(
            journal_id=journal.id,
            logs=config.data_dir.resolve() / "logs",
            agent_lock=lock_path,
            orphan_after_s=config.orphan_after_s,
            dirs=dirs,
            keepers=Keepers(self._emit, mailboxes.read_last, journal.id, self._tasks.begin, self._zygotes),
            mailboxes=mailboxes,
            arenas=arenas,
            caches=caches,
            uploads=Uploads(
                self._emit,
                mailboxes.slot_holds,
                arenas.keep,
                arenas.mapped,
                self._tasks.begin,
                BandwidthCap(config.upload_mib_per_s),
            ),
            restores=Restores(self._emit, dirs, self._tasks.begin, caches, self._tell_rank),
            stacks=Stacks(self._emit, self._tell_rank, self._tasks.begin),
            port=HeldPort(),
            emit=self._emit,
            send_snapshot=self._client.send_soon,
        )

    def _emit(self, fact: Input) -> None:
        self._inputs.put_nowait(fact)

    def _open_slots(self, of: RankId, first: int, size_bytes: int) -> None:
        self._shells.mailboxes.open_slots(of, first, size_bytes)

    def _tell_rank(self, of: RankId, text: str) -> None:
        """Say it where the rank's own words are read."""
        with contextlib.suppress(OSError), log_path(self._shells.logs, of.job, of.generation, of.rank).open("a") as log:
            log.write(f"dtrain: {text}\n")

    async def run(self) -> None:
        """Run until asked to leave and everything is over."""
        server, address = await self._serve_logs()
        self._identity = Identity(
            worker=self._config.worker_id,
            journal=self._journal.id,
            incarnation=secrets.token_hex(8),
            version=VERSION,
            host=socket.gethostname(),
            address=address,
        )
        self._handle_signals()
        try:
            self._sweep()
            async with asyncio.TaskGroup() as group:
                self._tasks.group = group
                await self._take(*recover(self._state, _now()))
                background = [group.create_task(work) for work in self._background()]
                await self._turns()
                await self._client.flush()
                self._shells.uploads.close()
                self._shells.restores.close()
                self._shells.arenas.remove_all()
                for task in background:
                    task.cancel()
            if self._taken is not None:
                raise self._taken
        finally:
            self._close()
            await server.stop(EMPTY_LOGS_GRACE_S)
            await self._etcd.close()

    def _background(self) -> Sequence[Coroutine[Any, Any, None]]:
        config = self._config
        key = f"{config.prefix.rstrip('/')}/workers/{config.worker_id}"
        return (
            self._poll(),
            self._tick(),
            self._leaders.follow(),
            self._client.run(),
            self._stay_registered(key),
        )

    async def _stay_registered(self, key: str) -> None:
        try:
            ttl_s = self._config.lease_ttl_s
            await keep_registered(self._etcd, key, self._registration, ttl_s, is_own=partial(is_of, self._journal.id))
        except RegistrationTaken as error:
            self._taken = DisplacedError(
                f"another worker registered as {self._config.worker_id} since, so this one left: "
                "give each node its own --worker-id."
            )
            self._taken.__cause__ = error
            self._emit(StopRequested(grace_s=STOP_GRACE_S))

    # ---- the loop ----------------------------------------------------------------------------------------

    async def _turns(self) -> None:
        while not (self._state.stopping and self._is_over()):
            fact = await self._inputs.get()
            _note(fact)
            await self._take(*step(self._state, fact, _now()))

    async def _take(self, state: NodeState, actions: Sequence[Action]) -> None:
        """Persist, then tell and act: no snapshot shows and no act begins what the disk does not hold.

        A heartbeat may come while the disk is written: it still tells the state before.
        """
        entries = [action for action in actions if isinstance(action, JournalEntry)]
        if entries:
            await asyncio.to_thread(self._journal.write, entries)
        self._state = state
        for action in actions:
            if not isinstance(action, JournalEntry):
                perform(self._shells, action)

    def _is_over(self) -> bool:
        return all(
            assignment.stage is GenerationStage.OVER and not assignment.retiring
            for assignment in self._state.assignments.values()
        )

    async def _poll(self) -> None:
        while True:
            self._shells.mailboxes.poll(_now())
            self._shells.keepers.poll()
            await asyncio.sleep(POLL_S)

    async def _tick(self) -> None:
        while True:
            self._emit(Tick())
            for job in self._shells.arenas.expire(_now()):
                self._shells.caches.remove(job)
            state = self._state
            self._zygotes.tend(quiet=not state.is_starting, wanted=needs_here(state), spares=state.slots)
            await asyncio.sleep(TICK_S)

    # ---- beginning and end -------------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        asked = False

        def leave() -> None:
            nonlocal asked
            self._emit(StopRequested(grace_s=0.0 if asked else STOP_GRACE_S))  # asked twice: no more waiting
            asked = True

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, leave)

    def _sweep(self) -> None:
        """Remove what belongs to no generation that may still live: folders, and processes by their mark."""
        known = {(assignment.job, assignment.generation) for assignment in self._state.assignments.values()}
        alive = {
            (assignment.job, assignment.generation)
            for assignment in self._state.assignments.values()
            if assignment.stage is not GenerationStage.OVER
        }
        for assignment in self._state.assignments.values():
            retiring = {(assignment.job, rank.generation) for rank in assignment.retiring}
            known, alive = known | retiring, alive | retiring
        self._shells.dirs.sweep(known)
        self._take_arenas_back()
        for abandoned in self._shells.dirs.sweep_abandoned():
            logger.warning("removed %s: the data folder of the worker that made it is gone", abandoned)
        marks = {f"{self._journal.id}/{job}/{generation}" for job, generation in alive}

        def is_stray(mark: str) -> bool:
            return mark.startswith(f"{self._journal.id}/") and mark.rpartition("/")[0] not in marks

        if killed := kill_strays(is_stray):
            logger.warning("ended %d processes that belonged to generations that are over", len(killed))

    def _take_arenas_back(self) -> None:
        arenas = self._shells.arenas
        for assignment in self._state.assignments.values():
            job, generation = assignment.job, assignment.generation
            arenas.take_back(tuple(RankId(job=job, generation=generation, rank=run.rank) for run in assignment.ranks))
            if assignment.stage is GenerationStage.OVER:
                arenas.rest(job, generation, _now())

    def _close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
        shells = self._shells
        shells.uploads.close()  # again, for an agent that leaves by an error
        shells.restores.close()
        shells.arenas.close()
        shells.caches.close()
        shells.keepers.close()
        self._zygotes.close()
        shells.mailboxes.close()
        shells.port.close()
        shells.dirs.remove_root()

    # ---- what is told ------------------------------------------------------------------------------------

    def _snapshot(self) -> wire.Snapshot:
        assert self._identity is not None
        self._number += 1
        return to_snapshot(
            project(self._state),
            self._identity,
            number=self._number,
            rendezvous_port=self._shells.port.number,
            transfers=Transfers(
                uploads=self._shells.uploads.progress(),
                restores=sums(chain(self._shells.restores.progress().items(), self._shells.mailboxes.reading())),
            ),
        )

    def _registration(self) -> bytes:
        assert self._identity is not None
        return registration(self._identity, self._config.slots, fence_after_s=self._config.fence_after_s)

    async def _serve_logs(self) -> tuple[grpc.aio.Server, str]:
        """Serve the Logs service; return the server and the address under which others reach it."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        add_LogsServicer_to_server(LogFiles(self._shells.logs), server)
        try:
            port = server.add_insecure_port(self._config.listen)
        except RuntimeError as error:
            raise UserError(
                f"cannot listen on {self._config.listen}: name a free port, or port 0 for any, with --listen."
            ) from error
        await server.start()
        host, colon, given = (self._config.advertise or self._config.listen).rpartition(":")
        if not colon:
            host, given = given, ""
        if self._config.advertise and given:
            return server, self._config.advertise
        return server, f"{host}:{port}"


def _note(fact: Input) -> None:
    """Log what explains a recovery to a person: when an exit was seen, and when which command came."""
    match fact:
        case TrainerExited(job=job, generation=generation, rank=rank, exit=ExitFact(code=code)):
            logger.info("%s generation %d rank %d ended: %s", job, generation, rank, "unseen" if code is None else code)
        case CommandReceived(id=command_id, term=term):
            logger.info("told in term %d: %s", term, command_id)
        case _:
            return


def _now() -> float:
    return time.monotonic()
