"""The single faults: what each does to the world, and how it is undone. Those that lie in wait are in ambushes.py."""

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from dtrain.worker.config import LEASE_TTL_S
from tests.sim import people
from tests.sim.machines import Machine
from tests.sim.world import PREFIX, RESTART_S

if TYPE_CHECKING:
    from tests.sim.faults import Storm
    from tests.sim.machines import Process
    from tests.sim.nodes import Node
    from tests.sim.world import World

Undo = Callable[[], None]

# Whoever was asked to leave is gone within this, whatever else is the matter.
AGENT_LEAVES_S = 60.0  # its trainers have some seconds
COORDINATOR_LEAVES_S = 20.0  # it only has a lease to hand back


def kill(storm: "Storm", host: Machine) -> Undo:
    storm.say(f"{host.name} is killed")
    storm.world.saw("leader killed" if host is storm.world.leader else "follower killed")
    for process in list(host.processes):
        process.kill()
    return lambda: storm.world.start_coordinator(host)


def pause(storm: "Storm", host: Machine) -> Undo:
    storm.say(f"{host.name} pauses")
    storm.world.saw("coordinator paused")
    paused, led = list(host.processes), storm.world.leader is host
    for process in paused:
        process.pause()

    def go_on() -> None:
        storm.say(f"{host.name} goes on")
        if led and storm.world.leader is not host:
            storm.world.saw("leader slept beyond its lease and woke up deposed")
        for process in paused:
            process.go_on()

    return go_on


def lose_etcd(storm: "Storm", host: Machine) -> Undo:
    storm.say(f"{host.name} loses etcd")
    if host is storm.world.leader:
        storm.world.saw("leader cut off from etcd only")
    return storm.cut(host.name, [member.machine.name for member in storm.world.members])


def _coordinator_loses_workers(storm: "Storm") -> Undo | None:
    host = storm.host()
    storm.say(f"{host.name} loses the workers")
    if host is storm.world.leader:
        storm.world.saw("leader cut off from workers only")
    return storm.cut(host.name, [node.machine.name for node in storm.world.nodes])


def _agent_restarts(storm: "Storm") -> Undo | None:
    """Killed and started again at once, as a service manager would: nothing may come of it."""
    node = storm.node()
    storm.say(f"the agent of {node.machine.name} is killed and starts again")
    storm.world.saw("agent restarted at once")
    if storm.world.log and storm.world.log[-1][0] == "CheckpointStarted":
        storm.world.saw("agent restarted with an attempt in flight")
    node.kill_agent()
    node.start_agent()
    return None


def _start_again(node: "Node") -> None:
    if node.agent is not None and node.agent.alive and not node.agent.paused:
        node.kill_agent()
        node.start_agent()


def _registration_late(storm: "Storm") -> Undo | None:
    """An agent restarts, its new registration takes long, and mostly the leader loses the workers meanwhile.

    Longer than a lease lives; or the agent restarts once more, and what comes late is the put of an earlier life.
    """
    world, node, host, rng = storm.world, storm.node(), storm.world.leader, storm.rng
    storm.say(f"the agent of {node.machine.name} is killed and starts again; its registration will be late")
    again = rng.random() < 0.4
    world.etcd.late_keys[f"{PREFIX}/workers/{node.machine.name}"] = rng.uniform(*(1.0, 5.0) if again else (6.0, 12.0))
    node.kill_agent()
    node.start_agent()
    if again:
        world.loop.after(rng.uniform(0.3, 3.0), _start_again, node)
    if host is None or rng.random() < 0.2:
        return None
    world.saw("registration late after a restart, and the leader cut off from the workers")
    return storm.cut(host.name, [each.machine.name for each in world.nodes])


def _control_plane_starts_again(storm: "Storm") -> Undo | None:
    """All coordinators and agents die, and start together when no lease of theirs is left: no trainer may notice."""
    world = storm.world
    hosts = [host for host in world.hosts if not host.dark]
    due_s = world.loop.now_s + storm.rng.uniform(LEASE_TTL_S + 1.0, LEASE_TTL_S + 4.0)
    storm.say("every coordinator and every agent is killed; they start again when their leases are over")
    for host in hosts:
        kill(storm, host)
        host.dark = True
    for node in world.nodes:
        node.kill_agent()

    def back() -> None:
        if world.loop.now_s < due_s and not storm.over:
            return
        for host in hosts:
            host.dark = False
            world.start_coordinator(host)
        for node in world.nodes if hosts else ():
            node.start_agent()
        if hosts and not storm.over:
            world.saw("control plane started again after its leases")
        hosts.clear()

    world.loop.after(due_s - world.loop.now_s, back)
    return back


def _agent_dies(storm: "Storm") -> Undo | None:
    node = storm.node()
    storm.say(f"the agent of {node.machine.name} is killed")
    storm.world.hurt(node.machine.name)
    node.kill_agent()
    return node.start_agent


def _coordinator_leaves(storm: "Storm") -> Undo | None:
    host, world = storm.host(), storm.world

    def gone() -> None:
        if world.healed:  # it slept until then, and who was to start it again found it there
            world.loop.after(storm.rng.uniform(*RESTART_S), world.start_coordinator, host)

    storm.say(f"{host.name} is asked to leave")
    for process in list(host.processes):
        process.at_end.append(gone)
        process.signal(signal.SIGTERM)
        _must_be_gone(world, process, COORDINATOR_LEAVES_S)
    return lambda: world.start_coordinator(host)


def _must_be_gone(world: "World", process: "Process", within_s: float) -> None:
    def look() -> None:
        if process.alive and not process.paused:
            world.faults_seen.append(f"{process.name} was asked to leave {within_s:.0f} s ago and is there")

    world.loop.after(within_s, look)


def _agent_leaves(storm: "Storm") -> Undo | None:
    """As at an upgrade, or when a node is drained: it ends its trainers, says so, and is back after a while."""
    node, world = storm.node(), storm.world
    agent = node.agent
    if agent is None or not agent.alive or agent.paused:
        return None
    storm.say(f"the agent of {node.machine.name} is asked to leave")
    world.hurt(node.machine.name)
    world.asked_to_leave.append((world.loop.now_s, node.machine.name))
    node.due_back_s = world.loop.now_s + storm.rng.uniform(0.2, 12.0)
    agent.signal(signal.SIGTERM)
    _must_be_gone(world, agent, AGENT_LEAVES_S)
    return node.start_agent


def _agent_pauses(storm: "Storm") -> Undo | None:
    node = storm.node()
    agent = node.agent
    if agent is None or not agent.alive:
        return None
    storm.say(f"the agent of {node.machine.name} pauses")
    storm.world.hurt(node.machine.name)
    agent.pause()
    return agent.go_on


def _power(storm: "Storm", *, wipe: bool) -> Undo | None:
    node = storm.node()
    return None if node.machine.dark else lose_power(storm, node, wipe=wipe)


def lose_power(storm: "Storm", node: "Node", *, wipe: bool) -> Undo:
    storm.say(f"{node.machine.name} loses power{' and its disk' if wipe else ''}")
    storm.world.saw("machine lost its disk" if wipe else "machine lost power")
    storm.world.hurt(node.machine.name)
    node.lose_power(wipe=wipe)
    if node.tear_cache(storm.rng):
        storm.world.saw("cache torn")
    return node.boot


def trainer_ends(storm: "Storm", code: int, error: str) -> Undo | None:
    trainer = storm.trainer()
    if trainer is not None:
        storm.say(f"{trainer.of} ends with {code}")
        storm.world.hurt(trainer.node.machine.name, trainer.of.job)
        trainer.end(code, error)
    return None


def _trainer_hangs(storm: "Storm") -> Undo | None:
    trainer = storm.trainer()
    if trainer is None:
        return None
    storm.say(f"{trainer.of} hangs")
    storm.world.saw("trainer hung")
    storm.world.hurt(trainer.node.machine.name, trainer.of.job)
    trainer.hangs = True
    if storm.world.shape.hang_timeout_s and storm.rng.random() < 0.5:
        return None  # for good, so that it is found

    def go_on() -> None:
        trainer.hangs = False

    return go_on


def _worker_cut_off(storm: "Storm") -> Undo | None:
    node, world = storm.node(), storm.world
    storm.say(f"{node.machine.name} is cut off")
    world.saw("worker cut off from the control plane")
    world.hurt(node.machine.name)
    others = [host.name for host in world.hosts] + [member.machine.name for member in world.members]
    return storm.cut(node.machine.name, others)


def _worker_loses_etcd(storm: "Storm") -> Undo | None:
    node, world = storm.node(), storm.world
    storm.say(f"{node.machine.name} loses etcd")
    world.hurt(node.machine.name)
    return storm.cut(node.machine.name, [member.machine.name for member in world.members])


def _workers_lose_each_other(storm: "Storm") -> Undo | None:
    one, other = storm.rng.sample(storm.world.nodes, 2)
    storm.say(f"{one.machine.name} and {other.machine.name} lose each other")
    storm.world.hurt(one.machine.name)
    storm.world.hurt(other.machine.name)
    return storm.cut(one.machine.name, [other.machine.name])


def _etcd_member_down(storm: "Storm") -> Undo | None:
    member = storm.rng.choice(storm.world.members)
    storm.say(f"{member.machine.name} goes down")
    storm.world.saw("etcd member down")
    member.go(up=False)
    return lambda: member.go(up=True)


def _etcd_away(storm: "Storm") -> Undo | None:
    storm.say("etcd goes down")
    storm.world.saw("etcd away")
    for member in storm.world.members:
        member.go(up=False)

    def back() -> None:
        storm.say("etcd is back")
        for member in storm.world.members:
            member.go(up=True)

    return back


def _etcd_compacts(storm: "Storm") -> Undo | None:
    storm.say("etcd compacts")
    storm.world.etcd.compact()
    return None


def store_away(storm: "Storm") -> Undo | None:
    weather = storm.world.blobs.weather
    storm.say("the store is away")
    storm.world.saw("store away")
    before, weather.failing = weather.failing, 1.0

    def back() -> None:
        weather.failing = before if before < 1.0 else 0.0

    return back


def _store_full(storm: "Storm") -> Undo | None:
    weather = storm.world.blobs.weather
    storm.say("the store is full")
    weather.full = True

    def room() -> None:
        weather.full = False

    return room


def _store_cut_off(storm: "Storm") -> Undo | None:
    weather = storm.world.blobs.weather
    name = storm.rng.choice([*(node.machine.name for node in storm.world.nodes), *(h.name for h in storm.world.hosts)])
    storm.say(f"{name} does not reach the store")
    storm.world.saw("one machine cut off from the store")
    weather.cut_off.add(name)
    return lambda: weather.cut_off.discard(name)


def _blob_rots(storm: "Storm") -> Undo | None:
    """Mostly a shard of the newest checkpoint, and then something that makes somebody read it."""
    world = storm.world
    shards = [key for key in world.blobs.objects if key.endswith(".safetensors")]
    committed = [change for kind, change in world.log if kind == "CheckpointCommitted"]
    if not shards or not committed or storm.rng.random() < 0.3:
        return None
    newest = [key for key in shards if key.encode() in (committed[-1].value or b"")]
    key = storm.rng.choice(newest or shards)
    storm.say(f"{key} rots")
    world.saw("blob rotted")
    world.hurt("store")
    world.blobs.rot(key)
    rank = int(key.rpartition("rank-")[2][:5])
    keeping = [node for node in world.nodes if any(trainer.of.rank == rank for trainer in node.living)]
    if not keeping or storm.rng.random() < 0.4:
        return None
    return lose_power(storm, keeping[0], wipe=False)  # with the memory from which the rank would start


def _clock_jumps(storm: "Storm") -> Undo | None:
    machine = storm.rng.choice([*storm.world.hosts, *(node.machine for node in storm.world.nodes)])
    jump_s = storm.rng.choice((-3600.0, -5.0, 5.0, 86400.0))
    storm.say(f"the clock of {machine.name} jumps by {jump_s:g} s")
    storm.world.saw("clock jumped")
    machine.jump(storm.world.loop.now_s, jump_s)
    return None


FAULTS: dict[str, Callable[["Storm"], Undo | None]] = {
    "coordinator dies": lambda storm: kill(storm, storm.host()),
    "coordinator leaves": _coordinator_leaves,
    "coordinator pauses": lambda storm: pause(storm, storm.host()),
    "coordinator loses etcd": lambda storm: lose_etcd(storm, storm.host()),
    "coordinator loses workers": _coordinator_loses_workers,
    "agent restarts": _agent_restarts,
    "registration late": _registration_late,
    "control plane starts again": _control_plane_starts_again,
    "agent dies": _agent_dies,
    "agent leaves": _agent_leaves,
    "agent pauses": _agent_pauses,
    "machine loses power": lambda storm: _power(storm, wipe=False),
    "machine loses its disk": lambda storm: _power(storm, wipe=True),
    "trainer dies": lambda storm: trainer_ends(storm, -9, ""),
    "trainer raises": lambda storm: trainer_ends(storm, 1, f"ValueError: bad batch {storm.rng.random()}"),
    "trainer hangs": _trainer_hangs,
    "worker cut off": _worker_cut_off,
    "worker loses etcd": _worker_loses_etcd,
    "workers lose each other": _workers_lose_each_other,
    "etcd member down": _etcd_member_down,
    "etcd away": _etcd_away,
    "etcd compacts": _etcd_compacts,
    "store away": store_away,
    "store full": _store_full,
    "store cut off": _store_cut_off,
    "blob rots": _blob_rots,
    "clock jumps": _clock_jumps,
    "people ask": people.ask,
    "newest condemned": people.condemn_newest,
}
