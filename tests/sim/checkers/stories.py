"""A schedule as the checkers read it: events as plain JSON, objects over time, what trainers did."""

import bisect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import xxhash

from tests.sim.blobs import Deed
from tests.sim.etcd import Change
from tests.sim.trainers import Entry

if TYPE_CHECKING:
    from tests.sim.faults import Storm
    from tests.sim.machines import Machine
    from tests.sim.world import World

_EVENT = re.compile(r"/dtrain/jobs/([^/]+)/events/(\d{12})")
_ATTEMPT = re.compile(r".*/checkpoints/(\d+)/attempt-(\d+)/.*")
_PACK = re.compile(r".*/packs/attempt-(\d+)/.*")
FENCED_ENDS_S = 1.0  # so long after its order, at most, a trainer has ended
LEAVES_S = 15.0  # trainers have 5 s when their agent is asked to leave, and it may have been asleep
ENDS = frozenset({"JobSucceeded", "JobFailed", "JobCancelled", "RunInterrupted"})


@dataclass(frozen=True, slots=True)
class Told:
    """One event of the log."""

    at_s: float
    seq: int
    revision: int
    term: int
    wall_s: float  # unix time of the decision, by its leader's clock
    type: str
    data: dict[str, Any]


@dataclass(slots=True)
class Checkpoint:
    """What the log has said of a committed checkpoint so far."""

    told: Told  # its CheckpointCommitted
    marked: bool = False
    pinned: bool = False
    quarantined: bool = False
    expired: bool = False

    @property
    def number(self) -> int:
        return int(self.told.data["checkpoint"])

    @property
    def attempt(self) -> int:
        return int(self.told.data["attempt"])

    @property
    def keys(self) -> list[str]:
        """Of every object that it needs."""
        shards = self.told.data["shards"]
        found = [shard["key"] for shard in shards] + [shard["index_key"] for shard in shards]
        packs = [pack["key"] for shard in shards for pack in shard.get("packs", ())]
        return [*found, *packs, self.told.data["manifest_key"]]


@dataclass(slots=True)
class Standing:
    """What the log says at one moment."""

    committed: dict[int, Checkpoint] = field(default_factory=dict)
    started: dict[int, Told] = field(default_factory=dict)  # attempts in flight
    aborted: dict[int, Told] = field(default_factory=dict)
    generation: Told | None = None
    to_be_cancelled: bool = False
    ended: bool = False

    @property
    def newest_sound(self) -> Checkpoint | None:
        sound = [c for c in self.committed.values() if not c.quarantined and not c.expired]
        return max(sound, key=lambda c: c.number, default=None)

    def fold(self, told: Told) -> None:
        data = told.data
        match told.type:
            case "CheckpointStarted":
                self.started[data["attempt"]] = told
            case "CheckpointAborted":
                self.started.pop(data["attempt"], None)
                self.aborted[data["attempt"]] = told
            case "CheckpointCommitted":
                self.started.pop(data["attempt"], None)
                self.committed[data["checkpoint"]] = Checkpoint(told)
            case "CheckpointMarked":
                self.committed[data["checkpoint"]].marked = True
            case "CheckpointPinned":
                self.committed[data["checkpoint"]].pinned = data["pinned"]
            case "CheckpointQuarantined":
                self.committed[data["checkpoint"]].quarantined = True
            case "CheckpointExpired":
                self.committed[data["checkpoint"]].expired = True
            case "CheckpointDeleted":
                self.committed.pop(data["checkpoint"], None)
            case "GenerationStarted":
                self.generation = told
            case "GenerationFailed":
                self.generation = None
            case "CancelRequested":
                self.to_be_cancelled = True
            case "JobSubmitted":
                self.to_be_cancelled = self.ended = False
            case kind if kind in ENDS:
                self.ended, self.generation = True, None


class Story:
    """What happened to one job. See the module's text."""

    def __init__(self, world: "World", storm: "Storm", job: str) -> None:
        self.world = world
        self.storm = storm
        self.job = job
        self.ended = world.ends.get(job, "")  # the event that ended it
        own, folder = f"/jobs/{job}/", f"jobs/{job}/"
        self.changes: list[Change] = [c for c in world.etcd.history if "/jobs/" not in c.key or own in c.key]
        self.deeds: list[Deed] = [deed for deed in world.blobs.history if deed.key.startswith(folder)]
        self.diary: list[Entry] = [entry for entry in world.diary.entries if entry.of.job == job]
        self.events: list[Told] = []
        for change in self.changes:
            found = _EVENT.fullmatch(change.key)
            if found and change.value is not None:
                told = json.loads(change.value)
                at = change.at_s, int(found[2]), change.revision
                self.events.append(Told(*at, told["term"], told["time"], told["type"], told["data"]))
        self._objects: dict[str, list[Deed]] = {}
        for deed in self.deeds:
            self._objects.setdefault(deed.key, []).append(deed)
        self._made: dict[int, list[str]] = {}
        for key in self._objects:
            pack = _PACK.fullmatch(key)
            made_in = int(pack[1]) if pack else attempt_in(key)
            if made_in is not None:
                self._made.setdefault(made_in, []).append(key)

    def events_of(self, *types: str) -> list[Told]:
        return [told for told in self.events if told.type in types]

    def standings(self) -> Iterator[tuple[Standing, Told]]:
        """Each event, with what the log said before it."""
        standing = Standing()
        for told in self.events:
            yield standing, told
            standing.fold(told)

    def final(self) -> Standing:
        standing = Standing()
        for told in self.events:
            standing.fold(told)
        return standing

    def elected(self, told: Told) -> Change:
        """The election of the leader that appended this."""
        leaders = [change for change in self.changes if change.key.endswith("/leader") and change.value is not None]
        return [change for change in leaders if change.revision < told.revision][-1]

    def leader(self, told: Told) -> "Machine":
        """The machine of the leader that appended this."""
        value = self.elected(told).value or b""
        return next(host for host in self.world.hosts if f'"{host.name}"'.encode() in value)

    def decided_s(self, told: Told) -> list[float]:
        """When this may have been decided. An append takes its time; and a clock that is set back shows times twice."""
        return [moment_s for moment_s in self.leader(told).when(told.wall_s) if moment_s <= told.at_s]

    def standing_at(self, at_s: float) -> Standing:
        """What the log said at this moment."""
        standing = Standing()
        for told in self.events:
            if told.at_s > at_s:
                break
            standing.fold(told)
        return standing

    def fenced(self, entry: Entry) -> bool:
        """Whether the entry's worker reached no coordinator for so long that it had to end its trainers.

        It may have reached one again by the time at which the trainer has ended.
        """
        spoke = self.world.net.spoke.get(entry.node, [])
        until_s, bound_s = entry.at_s, self.world.fence_after_s * (1 - self.world.shape.drift) - 1.0
        for since_s in (*reversed(spoke[: bisect.bisect_left(spoke, entry.at_s)]), 0.0):
            if until_s - since_s >= bound_s:
                return True
            if since_s < entry.at_s - FENCED_ENDS_S:
                return False
            until_s = since_s
        return False

    def leaving(self, entry: Entry) -> bool:
        """Whether the entry's worker had just been asked to leave."""
        return any(node == entry.node and 0 <= entry.at_s - at_s < LEAVES_S for at_s, node in self.world.asked_to_leave)

    def deeds_of(self, key: str) -> list[Deed]:
        return self._objects.get(key, [])

    def object_at(self, key: str, at_s: float) -> Deed | None:
        """The newest thing that was done to this object by then; None if nothing was."""
        deeds = self.deeds_of(key)
        at = bisect.bisect_right(deeds, at_s, key=lambda deed: deed.at_s)
        return deeds[at - 1] if at else None

    def is_there(self, key: str, at_s: float) -> bool:
        found = self.object_at(key, at_s)
        return found is not None and found.data is not None

    def keys_of(self, attempt: int) -> list[str]:
        """Of every object that the attempt ever put, packs included."""
        return self._made.get(attempt, [])

    @staticmethod
    def marker_of(committed: Told) -> str:
        return f"{committed.data['manifest_key'].rsplit('/', 2)[0]}/COMMITTED"


def digest(data: bytes) -> str:
    return "xxh3-128:" + xxhash.xxh3_128_hexdigest(data)


def attempt_in(key: str) -> int | None:
    found = _ATTEMPT.fullmatch(key)
    return int(found[2]) if found else None
