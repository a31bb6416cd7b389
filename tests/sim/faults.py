"""What befalls a schedule: its own mix of kinds, when each strikes, and how all of it is lifted in the end.

A mix is drawn for each seed ("swarm"): most kinds are off in any one schedule, so that some schedules are long and
quiet but for one thing, and others are storms. Faults strike at random times, and some of them right behind an event
in the log, because the rarest situations are a few milliseconds wide.
"""

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.sim.ambushes import AMBUSHES
from tests.sim.blobs import Deed
from tests.sim.etcd import Change
from tests.sim.machines import Machine
from tests.sim.strikes import FAULTS, Undo
from tests.sim.trainers import Trainer
from tests.sim.world import World

if TYPE_CHECKING:
    from tests.sim.nodes import Node

# What only the control plane suffers: however bad it is, no healthy trainer may be restarted for it.
CONTROL_PLANE = (
    "coordinator dies",
    "coordinator leaves",
    "coordinator pauses",
    "coordinator loses etcd",
    "coordinator loses workers",
    "append overtaken",
    "append in doubt",
    "command overtaken",
    "agent restarts",
    "registration late",
    "control plane starts again",
    "etcd member down",
    "etcd away",
    "etcd compacts",
    "clock jumps",
    "people ask",
)
DATA_PLANE = (
    "agent dies",
    "agent leaves",
    "agent pauses",
    "machine loses power",
    "machine loses its disk",
    "trainer dies",
    "trainer raises",
    "trainer hangs",
    "worker cut off",
    "worker loses etcd",
    "workers lose each other",
    "store away",
    "store full",
    "store cut off",
    "blob rots",
    "newest condemned",
    "salvage disturbed",
    "put overtaken",
    "port again",
    "finished node leaves",
)
STEADY = (
    "lost answers",
    "late writes",
    "messy streams",
    "slow network",
    "bad store",
    "short objects",
    "misses",
    "slips",
)
BEHIND = (
    *("CheckpointStarted", "CheckpointCommitted", "CheckpointAborted", "CheckpointExpired", "CheckpointMarked"),
    *("CheckpointQuarantined", "GenerationStarted", "GenerationFailed", "JobSubmitted", "SalvageStarted"),
    *("manifest put", "marker put", "marker deleted"),
)


@dataclass
class Mix:
    """What may befall this schedule."""

    kinds: tuple[str, ...]
    steady: tuple[str, ...]
    mean_gap_s: float  # between two faults
    lasts_s: tuple[float, float]
    behind: dict[str, float]  # event type -> how often a fault follows right behind it
    safety_s: float  # how long faults strike

    @property
    def spares_workers(self) -> bool:
        """Whether nothing in it touches what trains."""
        return all(kind in CONTROL_PLANE for kind in self.kinds) and "misses" not in self.steady


def draw(rng: random.Random) -> Mix:
    """A mix for one schedule."""
    control_only = rng.random() < 0.2
    possible = CONTROL_PLANE if control_only else CONTROL_PLANE + DATA_PLANE
    chance = rng.choice((0.1, 0.25, 0.5))
    kinds = tuple(kind for kind in possible if rng.random() < chance) or (rng.choice(possible),)
    steady = tuple(kind for kind in STEADY if rng.random() < chance and not (control_only and kind == "misses"))
    return Mix(
        kinds=kinds,
        steady=steady,
        mean_gap_s=rng.choice((1.5, 3.0, 6.0)),
        lasts_s=rng.choice(((0.05, 1.0), (0.5, 4.0), (2.0, 12.0))),
        behind={kind: rng.uniform(0.05, 0.3) for kind in BEHIND if rng.random() < 0.4},
        safety_s=rng.choice((10.0, 20.0, 40.0)),
    )


@dataclass
class Storm:
    """The faults of one schedule, as they strike."""

    world: World
    mix: Mix
    rng: random.Random
    log: list[tuple[float, str]] = field(default_factory=list)
    _undo: dict[int, Undo] = field(default_factory=dict)
    _count: int = 0
    over: bool = False
    healed_s: float = 0.0

    def begin(self) -> None:
        self._steady()
        self.world.etcd.on_change.append(self._behind)
        self.world.blobs.on_deed.append(self._behind_deed)
        self._next()
        self.world.loop.after(self.mix.safety_s, self.heal)

    def heal(self) -> None:
        """Lift everything: from here on the world is kind, and the job must finish."""
        if self.over:
            return
        self.over, self.healed_s = True, self.world.loop.now_s
        self.say("the world is healed")
        for undo in list(self._undo.values()):
            undo()
        self._undo.clear()
        world = self.world
        shut = world.net.weather.shut
        world.net.weather = type(world.net.weather)()
        assert not shut, "every cut is mended by its own undo"
        world.blobs.weather = type(world.blobs.weather)()
        world.etcd.late_writes = 0.0
        world.etcd.late_keys.clear()
        world.etcd.waylay = world.net.hold = world.blobs.waylay = None
        world.net.late_s.clear()
        world.habits.misses = world.habits.stage_fails = world.habits.slips = 0.0
        for host in world.hosts:
            for process in list(host.processes):
                process.go_on()
            world.start_coordinator(host)
        for node in world.nodes:
            for trainer in node.living:
                trainer.hangs = False
            node.start_agent()
        world.healed = True

    def say(self, what: str) -> None:
        self.log.append((self.world.loop.now_s, what))

    def _steady(self) -> None:
        world, rng = self.world, self.rng
        weather, store = world.net.weather, world.blobs.weather
        for kind in self.mix.steady:
            self.say(f"steady: {kind}")
            match kind:
                case "lost answers":
                    weather.lost_answers = rng.choice((0.02, 0.1, 0.3))
                case "late writes":
                    world.etcd.late_writes = rng.choice((0.02, 0.1))
                case "messy streams":
                    weather.dropped, weather.doubled, weather.shuffled = (rng.uniform(0, 0.1) for _ in range(3))
                    weather.late_s = rng.choice((1.0, 8.0))
                case "slow network":
                    weather.slow_part, weather.slow_s = rng.choice((0.01, 0.05)), rng.choice((0.5, 2.0))
                case "bad store":
                    store.failing, store.lost_answers = rng.uniform(0, 0.15), rng.uniform(0, 0.15)
                    store.slow = rng.choice((0.0, 0.05))
                case "short objects":
                    store.short = 0.05
                case "slips":
                    world.habits.slips = rng.uniform(0, 0.1)
                case "misses":
                    world.habits.misses, world.habits.stage_fails = rng.uniform(0, 0.1), rng.uniform(0, 0.05)

    def _next(self) -> None:
        self.world.loop.after(self.rng.expovariate(1 / self.mix.mean_gap_s), self._strike_and_go_on)

    def _strike_and_go_on(self) -> None:
        if not self.over:
            self.strike(self.rng.choice(self.mix.kinds))
            self._next()

    def _behind(self, change: Change) -> None:
        kind = self.world.log[-1][0] if self.world.log and self.world.log[-1][1] is change else ""
        self._maybe_behind(kind, (0.0, 0.01, 0.1, 0.3))

    def _behind_deed(self, deed: Deed) -> None:
        """Right behind the last object before a commit, or the first that a deletion takes."""
        kind = (
            "manifest" if deed.key.endswith("/manifest.json") else "marker" if deed.key.endswith("/COMMITTED") else ""
        )
        self._maybe_behind(f"{kind} {'put' if deed.data is not None else 'deleted'}", (0.0, 0.0, 0.005, 0.02))

    def _maybe_behind(self, kind: str, delays_s: tuple[float, ...]) -> None:
        if not self.over and kind in self.mix.behind and self.rng.random() < self.mix.behind[kind]:
            near = [k for k in self.mix.kinds if k.startswith(("coordinator", "agent", "etcd", "machine", "worker"))]
            struck = self.rng.choice(near or list(self.mix.kinds))
            self.world.loop.after(self.rng.choice(delays_s), self.strike, struck)

    def strike(self, kind: str) -> None:
        """Have one fault happen, and its end be due."""
        if self.over or self.world.ended:
            return
        undo = (FAULTS | AMBUSHES)[kind](self)
        self._count += 1
        number = self._count
        if undo is None:
            return
        self._undo[number] = undo

        def end() -> None:
            waiting = self._undo.pop(number, None)
            if waiting is not None:
                waiting()

        self.world.loop.after(self.rng.uniform(*self.mix.lasts_s), end)

    def undo_at_end(self, undo: Undo) -> None:
        """What has just happened lasts for as long as the storm does."""
        self._count += 1
        self._undo[self._count] = undo

    # -- choosing ------------------------------------------------------------------------------------------

    def host(self) -> Machine:
        """The leader's machine mostly."""
        leader = self.world.leader
        return leader if leader is not None and self.rng.random() < 0.8 else self.rng.choice(self.world.hosts)

    def node(self) -> "Node":
        return self.rng.choice(self.world.nodes)

    def trainer(self) -> Trainer | None:
        living = [trainer for node in self.world.nodes for trainer in node.living]
        return self.rng.choice(living) if living else None

    def cut(self, one: str, others: list[str]) -> Undo:
        """Shut the way between two machines, in one direction or both."""
        both = self.rng.random() < 0.6
        out = self.rng.random() < 0.5
        ways = []
        for other in others:
            ways += [(one, other)] if both or out else []
            ways += [(other, one)] if both or not out else []
        if not both:
            self.world.saw("one-way partition")
        for way in ways:
            self.world.net.shut(*way)

        def mend() -> None:
            for way in ways:
                self.world.net.reopen(*way)

        return mend
