"""Gangs of trainers, and what they meet in.

A gang is what a process group is: all ranks that met at one rendezvous, which is what it is in `process_group.py`: a
file, or a store that rank 0 hosts at a port, with a prefix for each generation. A step is done when all of them live,
none hangs and the network lets them talk.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.trainers import Trainer
    from tests.sim.world import World

STALLED_S = 4.0  # a collective that gets nowhere raises after this, in the words of gloo:
TIMED_OUT = "RuntimeError: Timed out waiting 4000ms for recv operation to complete"
# A rank that comes when a peer has gone again:
TOO_LATE = "RuntimeError: Gloo connectFullMesh failed with Connect timeout [none]"
# What waits for peers in a store whose host ends, in the words of torch:
STORE_GONE = "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed."


@dataclass
class Store:
    """What ranks meet in. One at a port goes with its host; a file keeps what was left in it."""

    host: "Trainer | None"  # the rank 0 that listens; None: a file
    gangs: dict[str, "Gang"] = field(default_factory=dict)  # by prefix

    def host_ended(self) -> None:
        """Whoever waits in it for peers has lost its connection, those of other generations too."""
        for gang in self.gangs.values():
            gang.store_gone()


class Gang:
    """The ranks that met at one rendezvous, under one prefix."""

    def __init__(self, world: "World", world_size: int) -> None:
        self._world = world
        self._world_size = world_size
        self.ranks: dict[int, Trainer] = {}
        self._ready: set[int] = set()
        self._broken = False
        self._stalled_s = 0.0

    def join(self, trainer: "Trainer") -> None:
        """A rank came. One that finds strangers or a broken group there fails, as with any process group."""
        world = self._world
        trainer.gang = self
        own = (trainer.of.job, trainer.of.generation)
        if any((other.of.job, other.of.generation) != own for other in self.ranks.values()):
            world.faults_seen.append(f"{trainer.of} met ranks of another generation or job at its rendezvous")
        if self._broken or trainer.of.rank in self.ranks:
            trainer.end(1, TOO_LATE)
            return
        self.ranks[trainer.of.rank] = trainer
        if len(self.ranks) == self._world_size:
            for rank in self.ranks.values():
                rank.joined()

    def is_ready(self, trainer: "Trainer") -> None:
        self._ready.add(trainer.of.rank)
        if len(self._ready) == self._world_size and not self._broken:
            told = {(rank.step, rank.state) for rank in self.ranks.values()}
            if len(told) > 1:
                self._world.faults_seen.append(f"ranks of {trainer.of} begin from different states: {sorted(told)}")
            for rank in self.ranks.values():
                rank.begin()
            if trainer.step < self._world.habits.until:
                self._schedule()

    def lost(self, trainer: "Trainer", *, failed: bool) -> None:
        """A rank is gone. The others raise in their next collective, or hang in it for a while."""
        world = self._world
        if not failed or self._broken:
            return
        self._broken = True
        for other in list(self.ranks.values()):
            if other is not trainer and other.alive:
                spoiled_s = world.rng.uniform(0, world.habits.spoils_s) if world.habits.spoils_s else 0.0
                world.loop.after(spoiled_s + world.rng.uniform(0.005, 0.2), other.end, 1, "connection closed by peer")

    def store_gone(self) -> None:
        """The host of its store is gone. A group that is up needs none; who still waits for peers raises."""
        world = self._world
        if self._broken or len(self.ranks) == self._world_size:
            return
        self._broken = True
        for rank in list(self.ranks.values()):
            world.loop.after(world.rng.uniform(0.005, 0.2), rank.end, 1, STORE_GONE)

    def _schedule(self) -> None:
        took_s = self._world.habits.step_s * self._world.rng.uniform(0.8, 1.2)
        self._world.loop.after(took_s, self._step, took_s)

    def _step(self, took_s: float) -> None:
        world = self._world
        ranks = list(self.ranks.values())
        if self._broken or any(not rank.alive for rank in ranks):
            return
        if any(rank.hangs for rank in ranks) or not self._connected(ranks):
            self._stalled_s += took_s
            if not any(rank.hangs for rank in ranks) and self._stalled_s > STALLED_S:
                ranks[world.rng.randrange(len(ranks))].end(1, TIMED_OUT)
                return
            self._schedule()
            return
        self._stalled_s = 0.0
        step = ranks[0].step + 1
        for rank in ranks:
            rank._later(world.rng.uniform(0, 0.2) * took_s, rank.complete, step, took_s)
        if step < world.habits.until:
            self._schedule()

    def _connected(self, ranks: "list[Trainer]") -> bool:
        net = self._world.net
        if not net.weather.shut:
            return True
        machines = [rank.node.machine for rank in ranks]
        return all(net.open(a, b) for a in machines for b in machines if a is not b)
