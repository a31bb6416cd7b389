"""Faults that lie in wait: for one append, one command, one moment of a salvage, and strike just then."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from dtrain.proto import agent_pb2 as wire
from tests.sim.blobs import Deed
from tests.sim.etcd import Change, Waylaid
from tests.sim.loop import CURRENT
from tests.sim.machines import Machine
from tests.sim.network import Link
from tests.sim.strikes import Undo, kill, lose_etcd, lose_power, pause, store_away, trainer_ends
from tests.sim.trainers import Entry
from tests.sim.world import PREFIX

if TYPE_CHECKING:
    from tests.sim.faults import Storm
    from tests.sim.nodes import Node

LATE_S = 4.0  # what a slow worker tells
KEPT_S = 8.0  # a command that is kept on its way arrives then: long after it was sent again


class Later:
    """The undoing of what has not happened yet."""

    def __init__(self) -> None:
        self.due = False
        self.then: Undo | None = None

    def __call__(self) -> None:
        self.due = True
        if self.then is not None:
            self.then()


def _append_overtaken(storm: "Storm") -> Undo | None:
    """The leader's next append stays on its way until another leads; its sender dies, sleeps or is cut off by then."""
    world, undo = storm.world, Later()

    def waylay(append: Waylaid) -> None:
        host = world.leader
        if host is None or undo.due:
            append.arrive()
            return
        storm.say(f"an append of {host.name} stays on its way, until another leads")
        term = world.etcd.value(f"{PREFIX}/leader")
        undo.then = storm.rng.choice((kill, pause, lose_etcd))(storm, host)
        arrived = False

        def arrive() -> None:
            nonlocal arrived
            if not arrived:
                arrived = True
                append.arrive()

        def look(change: Change) -> None:
            another = change.key == f"{PREFIX}/leader" and change.value is not None and change is not term
            if another and not arrived:
                world.saw("append overtaken by another leader's election")
                world.loop.after(storm.rng.choice((0.0, 0.002, 0.02, 0.5)), arrive)

        world.etcd.on_change.append(look)
        world.loop.after(15.0, arrive)

    world.etcd.waylay = waylay
    return undo


def _salvage_disturbed(storm: "Storm") -> Undo | None:
    """A trainer dies when all ranks have staged and nothing can be stored; the leader, once it waits for what they did.

    Another must lead before it is settled what becomes of the checkpoint.
    """
    world, undo, lifted = storm.world, Later(), list[Undo | None]()

    def lift() -> None:
        for each in lifted:
            if each is not None:
                each()

    undo.then = lift

    def staged(entry: Entry) -> None:
        if entry.what != "staged" or undo.due:
            return
        same = (entry.of.job, entry.of.generation, entry.detail)
        staging = [e for e in world.diary.entries if e.what == "staged"]
        ranks = {e.of.rank for e in staging if (e.of.job, e.of.generation, e.detail) == same}
        living = [t for node in world.nodes for t in node.living if (t.of.job, t.of.generation) == same[:2]]
        if not living or len(ranks) < living[0].world_size:
            return
        world.diary.readers.remove(staged)
        storm.say(f"all have staged attempt {entry.detail}: the store is away, and a trainer dies")
        lifted.append(store_away(storm))
        world.etcd.on_change.append(decided)
        world.loop.after(storm.rng.uniform(0.0, 0.02), dies)

    def dies() -> None:
        trainer_ends(storm, -9, "")

    def decided(change: Change) -> None:
        kind, appended = world.log[-1] if world.log else ("", None)
        host = world.leader
        if kind == "SalvageStarted" and appended is change and host is not None and not undo.due:
            world.etcd.on_change.remove(decided)
            world.loop.after(storm.rng.choice((0.0, 0.01, 0.1)), strikes, host)

    def strikes(host: Machine) -> None:
        if not undo.due:
            lifted.append(storm.rng.choice((kill, pause, lose_etcd))(storm, host))

    world.diary.readers.append(staged)
    return undo


def _append_in_doubt(storm: "Storm") -> Undo | None:
    """The leader's next append is done, not done or done late, and no answer tells which."""
    world = storm.world

    def waylay(append: Waylaid) -> None:
        late_s = storm.rng.choice((None, 0.0, storm.rng.uniform(0.01, 1.0), storm.rng.uniform(1.0, 8.0)))
        storm.say("an append is lost" if late_s is None else f"an append gets no answer; done after {late_s:.2f} s")
        world.saw("append in doubt and never done" if late_s is None else "append in doubt and done")
        if late_s is not None:
            world.loop.after(late_s, append.arrive_unheard)
        world.loop.after(storm.rng.uniform(0.001, 0.3), append.fail)

    world.etcd.waylay = waylay
    return None


def _command_overtaken(storm: "Storm") -> Undo | None:
    """A command stays on its way until the worker has one of a newer generation, or for some seconds."""
    world, net = storm.world, storm.world.net
    kept: list[tuple[Link, wire.CoordinatorMessage]] = []

    def hold(link: Link, message: wire.CoordinatorMessage) -> bool:
        command = message.command
        if not kept and command.WhichOneof("command") in ("start_trainers", "stop_trainers"):
            storm.say(f"{command.id} stays on its way to {link.client.machine.name}")
            kept.append((link, message))
            world.loop.after(KEPT_S, link.deliver, message)
            return True
        if kept and link is kept[0][0] and command.generation > kept[0][1].command.generation:
            world.saw("command arrived behind one of a newer generation")
            world.loop.after(storm.rng.uniform(0.005, 0.5), link.deliver, kept[0][1])
            net.hold = None
        return False

    net.hold = hold
    return None


def _put_overtaken(storm: "Storm") -> Undo | None:
    """A machine loses power with a put on its way. That arrives in the midst of the deletion of its neighbours."""
    world, undo = storm.world, Later()
    kept: list[tuple[str, bytes, str]] = []

    def neighbours(key: str) -> list[str]:
        folder = key.rpartition("/")[0] + "/"
        return [other for other in world.blobs.objects if other.startswith(folder) and other != key]

    def waylay(key: str, data: bytes) -> bool:
        sender = CURRENT.get()
        node = next((each for each in world.nodes if sender is not None and each.machine is sender.machine), None)
        if node is None or undo.due or kept or not neighbours(key):
            return False
        storm.say(f"{key} stays on its way")
        kept.append((key, data, repr(sender)))
        world.blobs.waylay = None
        world.blobs.on_deed.append(look)
        world.loop.after(0.0, dark, node)
        return True

    def dark(node: "Node") -> None:
        if not node.machine.dark:
            undo.then = lose_power(storm, node, wipe=False)
        if undo.due and undo.then is not None:
            undo.then()

    def look(deed: Deed) -> None:
        key, data, sender = kept[0]
        beside = deed.key.rpartition("/")[0] == key.rpartition("/")[0]
        if beside and deed.data is None and neighbours(key):
            world.blobs.on_deed.remove(look)
            world.saw("put arrived in the midst of a deletion")
            world.blobs.arrive(key, data, sender)

    world.blobs.waylay = waylay
    return undo


def _port_again(storm: "Storm") -> Undo | None:
    """Rank 0's node is slow to say that its port is taken, and another rank dies: the next generation gets it again."""
    world, undo = storm.world, Later()
    slow: list[str] = []

    def started(change: Change) -> None:
        kind, appended = world.log[-1] if world.log else ("", None)
        if kind != "GenerationStarted" or appended is not change or undo.due:
            return
        members = json.loads(change.value or b"")["data"]["members"]
        if len(members) > 1:
            world.etcd.on_change.remove(started)
            slow.append(members[0]["worker"])
            storm.say(f"what {slow[0]} tells comes {LATE_S} s late")
            world.net.late_s[slow[0]] = LATE_S
            undo.then = lift
            world.loop.after(2 * LATE_S, lift)
            world.diary.readers.append(spawned)

    def lift() -> None:
        world.net.late_s.pop(slow[0], None)

    def spawned(entry: Entry) -> None:
        if entry.what == "spawned" and entry.node != slow[0]:
            world.diary.readers.remove(spawned)
            world.loop.after(storm.rng.uniform(0.0, 0.1), dies, entry)

    def dies(entry: Entry) -> None:
        for trainer in [t for node in world.nodes for t in node.living if t.of == entry.of]:
            storm.say(f"{trainer.of} ends as soon as it began")
            world.hurt(entry.node, trainer.of.job)
            trainer.end(-9, "")

    world.etcd.on_change.append(started)
    return undo


def _finished_leaves(storm: "Storm") -> Undo | None:
    """A node whose ranks have all ended well goes while rank 0 still lives, and the leader soon after it."""
    world = storm.world
    world.habits.lives_on_s = storm.rng.uniform(4.0, 12.0)

    def ended(entry: Entry) -> None:
        node = next(each for each in world.nodes if each.machine.name == entry.node)
        same = (entry.of.job, entry.of.generation)
        here = [t for t in node.living if (t.of.job, t.of.generation) == same]
        if entry.what != "ended" or entry.detail != "0" or entry.of.rank == 0 or here or storm.over:
            return
        world.diary.readers.remove(ended)
        world.loop.after(storm.rng.uniform(0.05, 1.5), goes, node)

    def goes(node: "Node") -> None:
        if not node.machine.dark and not storm.over:
            storm.say(f"the ranks on {node.machine.name} have ended")
            storm.undo_at_end(lose_power(storm, node, wipe=storm.rng.random() < 0.3))
            world.loop.after(storm.rng.uniform(0.0, 2.0), leader_goes)

    def leader_goes() -> None:
        host = world.leader
        if host is not None and not storm.over:
            world.saw("leader killed when ranks had ended and their node was gone")
            world.loop.after(storm.rng.uniform(0.1, 2.0), kill(storm, host))

    world.diary.readers.append(ended)
    return None


AMBUSHES: dict[str, Callable[["Storm"], Undo | None]] = {
    "append overtaken": _append_overtaken,
    "append in doubt": _append_in_doubt,
    "command overtaken": _command_overtaken,
    "salvage disturbed": _salvage_disturbed,
    "put overtaken": _put_overtaken,
    "port again": _port_again,
    "finished node leaves": _finished_leaves,
}
