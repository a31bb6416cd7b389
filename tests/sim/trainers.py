"""Trainers: processes that step together, stage what their mailbox asks for, fail, hang, and tell what they did.

How they meet and step is in `gangs.py`. The state of a rank is one number that names all steps it came from, so that
the whole ancestry of a finished run can be followed afterwards. What trainers do is written down in `Diary`, which
the checkers read and the system never sees.
"""

import json
import mmap
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash

from dtrain.common.mailbox import MAILBOX_BYTES, Mailbox, RestoreState, TrainerPhase, unpack
from dtrain.storage.ranges import NeededRange
from dtrain.storage.restore_files import MANIFEST_FILE, NEEDS_FILE, RESTORE_FOLDER, SHARD_FILE, encode_needs
from dtrain.storage.shards import parse_header
from dtrain.worker.core.states import ExitFact
from dtrain.worker.keeper import TOLD
from dtrain.worker.rank_dirs import RankId
from tests.sim.gangs import Gang, Store
from tests.sim.loop import SimLoop
from tests.support.checkpoints import shard_of

if TYPE_CHECKING:
    from tests.sim.nodes import Node

PAYLOAD_BYTES = 96  # of every rank; also what a rank asks for at a restore
FROZEN_BYTES = 128
GRADUAL_STEPS = 40
NO_STATE = "genesis"
WAIT_S = 0.05  # between two looks at a file or a word
HOLD_S = 7200.0  # as in production: how long a trainer waits for its last state to be asked for


@dataclass(frozen=True, slots=True)
class Entry:
    """Something a trainer did, or that was done to it."""

    at_s: float
    node: str
    of: RankId
    what: str  # spawned, restored, began, trained, staged, ended
    step: int = 0
    state: str = ""
    detail: str = ""


@dataclass
class Diary:
    """The trainers' own record."""

    entries: list[Entry] = field(default_factory=list)
    parents: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # state -> (state before, step, generation)
    readers: list[Callable[[Entry], None]] = field(default_factory=list)  # who lies in wait for an entry

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        for reader in list(self.readers):
            reader(entry)


@dataclass
class Habits:
    """What a run's trainers are like; drawn from the seed."""

    until: int
    step_s: float
    start_s: tuple[float, float] = (0.05, 0.6)
    misses: float = 0.0  # part of requests that are answered with "missed"
    stage_fails: float = 0.0
    slips: float = 0.0  # part of stagings in which a rank says that it has another rank's part
    stage_s: tuple[float, float] = (0.0, 0.05)
    lives_on_s: float = 0.0  # how long rank 0 has something to do yet when all steps are done
    spoils_s: float = 0.0  # how long a rank lives on in a collective after a peer died; 0: it raises at once


def unchanging(rank: int, step: int) -> dict[str, bytes]:
    """Tensors that stay as they are: one for ever, one for a while. Checkpoints name them in packs."""
    return {
        f"frozen.{rank}": bytes([rank + 1]) * FROZEN_BYTES,
        f"gradual.{rank}": bytes([step // GRADUAL_STEPS % 256]) * FROZEN_BYTES,
    }


class Trainer:
    """One rank's process and its keeper."""

    def __init__(self, node: "Node", of: RankId, folder: Path) -> None:
        self.node = node
        self.of = of
        self.folder = folder
        self.alive = True
        self.started = False  # the keeper has forked it
        self.hangs = False
        self.exit: ExitFact | None = None
        self.gang: Gang | None = None
        self.step = 0
        self.state = NO_STATE
        self._answered = 0
        self._tried = -1
        self._held_s = 0.0
        plan = json.loads((folder / "keeper.json").read_bytes())
        env: dict[str, str] = plan["env"]
        self.world_size = int(env["WORLD_SIZE"])
        self.rendezvous = env["DTRAIN_RENDEZVOUS"]
        self.meets_in_file = self.rendezvous.startswith("file:")
        self.prefix = "" if self.meets_in_file else f"dtrain/{env['DTRAIN_JOB']}/{env['DTRAIN_GENERATION']}"
        self.saves_last = "DTRAIN_SAVE_LAST" in env
        with (folder / "mailbox").open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), MAILBOX_BYTES)
        self.box = Mailbox(self._page)
        self.loop: SimLoop = node.world.loop
        self.rng: random.Random = node.world.rng
        self.note("spawned")
        self._later(self.rng.uniform(0.005, 0.1), self._fork)

    def note(self, what: str, detail: str = "") -> None:
        world = self.node.world
        entry = Entry(world.loop.now_s, self.node.machine.name, self.of, what, self.step, self.state, detail)
        world.diary.add(entry)

    def _later(self, delay_s: float, call: Callable[..., None], *args: object) -> None:
        def unless_dead() -> None:
            if self.alive:
                call(*args)

        self.loop.after(delay_s, unless_dead)

    # -- coming up -------------------------------------------------------------------------------------

    def _fork(self) -> None:
        self.started = True
        self._later(self.rng.uniform(*self.node.world.habits.start_s), self._join)

    def _join(self) -> None:
        """Meet the others in a store: a file, which is always there, or what rank 0 hosts, if it can be reached."""
        stores = self.node.world.stores
        if self.meets_in_file:
            stores.setdefault(self.rendezvous, Store(None))
        elif self.of.rank == 0:
            listening = stores.get(self.rendezvous)
            if listening is not None and listening.host not in (None, self) and listening.host.alive:
                self.end(1, "address already in use")
                return
            stores[self.rendezvous] = Store(self)
        store = stores.get(self.rendezvous)
        if store is not None and self._reaches(store.host):
            store.gangs.setdefault(self.prefix, Gang(self.node.world, self.world_size)).join(self)
        else:
            self._later(WAIT_S, self._join)

    def _reaches(self, host: "Trainer | None") -> bool:
        if host is None or host is self:
            return True
        return host.alive and self.node.world.net.open(self.node.machine, host.node.machine)

    def joined(self) -> None:
        """The process group is up."""
        self.box.phase = TrainerPhase.JOINED
        if self.box.restore is RestoreState.NOTHING:
            self._ready()
            return
        self.box.phase = TrainerPhase.RESTORING
        self._read_manifest()

    def _read_manifest(self) -> None:
        restore = self.folder.parent / RESTORE_FOLDER
        if not (restore / MANIFEST_FILE).exists():
            self._later(WAIT_S, self._read_manifest)
            return
        saved = json.loads((restore / MANIFEST_FILE).read_bytes())["world_size"]
        shard = self.of.rank % saved
        parts = (("payload", PAYLOAD_BYTES), ("frozen", FROZEN_BYTES), ("gradual", FROZEN_BYTES))
        needed = [NeededRange(shard=shard, tensor=f"{part}.{shard}", begin=0, end=size) for part, size in parts]
        (self.folder / ".new").write_bytes(encode_needs(needed))
        (self.folder / ".new").rename(self.folder / NEEDS_FILE)
        self._wait_for_bytes(restore / SHARD_FILE.format(shard), shard)

    def _wait_for_bytes(self, path: Path, shard: int) -> None:
        if self.box.restore is not RestoreState.READY:
            self._later(WAIT_S, self._wait_for_bytes, path, shard)
            return
        data = path.read_bytes()
        header = parse_header(data)
        spans = {name: (header.data_start + span.begin, header.data_start + span.end)
                 for name, span in header.tensors.items()}  # fmt: skip
        try:
            told = msgspec.json.decode(data[slice(*spans[f"payload.{shard}"])].rstrip())
            for part, wanted in unchanging(shard, told["step"]).items():
                if data[slice(*spans[part])] != wanted:
                    raise ValueError(part)
        except (msgspec.DecodeError, ValueError):
            self.note("restored", "garbage")
            self.end(1, "its state cannot be read")
            return
        self.step, self.state = told["step"], told["state"]
        self.note("restored", told["job"])
        self._ready()

    def _ready(self) -> None:
        assert self.gang is not None
        self.gang.is_ready(self)

    def begin(self) -> None:
        """All ranks are ready: the first step."""
        self.note("began")
        self.box.until_step = self.node.world.habits.until
        self.box.tracking = True
        self.box.completed_step = self.step
        self.box.phase = TrainerPhase.TRAINING
        if self.step >= self.node.world.habits.until:  # everything was done and saved before
            self._later(self.rng.uniform(0.1, 0.3), self._finish)

    # -- training --------------------------------------------------------------------------------------

    def complete(self, step: int, took_s: float) -> None:
        """The end of a step, as this rank comes to it."""
        world = self.node.world
        before, self.step = self.state, step
        self.state = xxhash.xxh3_64_hexdigest(f"{before}/{step}/{self.of.job}/{self.of.generation}".encode())
        world.diary.parents[self.state] = (before, step, self.of.generation)
        self.note("trained")
        self.box.completed_step = step
        self.box.step_ns = int(took_s * 1e9)
        self._answer()
        if step >= world.habits.until:
            self._hold()

    def _answer(self) -> None:
        word = self.box.request
        attempt, wanted = unpack(word)
        if not word or word == self._answered or wanted > self.step:
            return
        self._answered = word
        habits = self.node.world.habits
        unlucky = self.step < habits.until and self.rng.random() < habits.misses
        if wanted < self.step or unlucky:
            self.box.missed = word
            return
        self._tried = self.step
        if self.rng.random() < habits.stage_fails:
            self.box.error = "its state cannot be pickled"
            self.box.stage_failed = word
            return
        self.box.phase = TrainerPhase.CHECKPOINTING
        payload = json.dumps({"job": self.of.job, "step": self.step, "state": self.state}).encode()
        data = shard_of(
            payload.ljust(PAYLOAD_BYTES),
            rank=self.of.rank,
            world_size=self.world_size,
            step=self.step,
            beside=unchanging(self.of.rank, self.step),
            place=self._place(),
        )
        slot = self.box.stage_slot or 0
        self.box.begin_staging(slot)
        with (self.folder / f"slot{slot}").open("wb") as file:
            file.write(bytes(len(data) // 2))  # half-written, until the copy is whole
        self.note("staging", str(attempt))
        self._later(self.rng.uniform(*habits.stage_s), self._staged, word, slot, data)

    def _place(self) -> int:
        """Which part of the tensor that all share this rank says it has."""
        world, rank = self.node.world, self.of.rank
        may_slip = world.habits.slips and self.world_size > 1 and self.step < world.habits.until
        if may_slip and self.rng.random() < world.habits.slips:
            world.saw("rank staged another's part")
            return (rank + 1) % self.world_size
        return rank

    def _staged(self, word: int, slot: int, data: bytes) -> None:
        (self.folder / f"slot{slot}").write_bytes(data)
        self.box.publish_staged(word, slot=slot, size_bytes=len(data))
        if self.box.phase is TrainerPhase.CHECKPOINTING:
            self.box.phase = TrainerPhase.TRAINING
        self.note("staged", str(unpack(word)[0]))

    def _hold(self) -> None:
        if self.saves_last and self._tried != self.step:
            if not self.hangs:
                self.box.phase = TrainerPhase.HOLDING
                self._answer()
            self._held_s += WAIT_S
            if self._held_s < HOLD_S:
                self._later(WAIT_S, self._hold)
                return
            self.node.world.saw("last state was not asked for in time")
        self._later(self.rng.uniform(0.1, 0.3), self._finish)

    def _finish(self) -> None:
        if self.box.request != self._answered:
            self.box.missed = self.box.request
        self.box.phase = TrainerPhase.FINISHED
        lives_on_s = self.node.world.habits.lives_on_s if self.of.rank == 0 else 0.0
        self._later(0.02 + lives_on_s, self.end, 0, "")

    # -- ending ----------------------------------------------------------------------------------------

    def end(self, code: int | None, error: str, ended_for: str = "") -> None:
        """The process is over; its keeper writes down how."""
        if not self.alive:
            return
        self.alive = False
        world = self.node.world
        at_unix_s = self.node.machine.wall(world.loop.now_s)
        self.exit = ExitFact(code=code, at_unix_s=at_unix_s, error=error, ended_for=ended_for)
        self.note("ended", f"{code} {error}".strip())
        self.box.close()
        self._page.close()
        if self.gang is not None:
            self.gang.lost(self, failed=code != 0)
        store = world.stores.get(self.rendezvous)
        if store is not None and store.host is self:
            store.host_ended()

    def stop(self, grace_s: float) -> None:
        """Its keeper was told to end it."""
        self._later(self.rng.uniform(0.001, 0.02) if grace_s <= 0 else self.rng.uniform(0.01, grace_s), self._stopped)

    def _stopped(self) -> None:
        self.end(-9, "told to end", ended_for=TOLD)
