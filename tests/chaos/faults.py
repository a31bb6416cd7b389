"""The faults: each strikes something drawn at random, and returns how it is mended."""

import contextlib
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.etcd_members import is_alive, send
from tests.chaos.world import STORAGE, World
from tests.support.cluster import Service
from tests.support.processes import shared_folders
from tests.support.tcp_proxy import TcpProxy

Mend = Callable[[], None]
Strike = Callable[[World, random.Random], Mend]
Links = Callable[[World, random.Random], list[TcpProxy]]

SLOW_LINK_S = 0.3
SLOW_STORAGE_S = 1.0


class NothingToStrike(Exception):
    """There is nothing of this kind right now; another fault is drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    kind: str
    strike: Strike
    weight: float
    shortest_s: float = 0.5  # how long until it is mended
    longest_s: float = 4.0


def _nothing() -> None:
    """A service that ended is started by its supervisor."""


def _alive(it: World, role: str, rng: random.Random) -> Service:
    services = [it.services[name] for name in it.names(role) if is_alive(it.services[name])]
    if not services:
        raise NothingToStrike
    return rng.choice(services)


def _pid(it: World, role: str, rng: random.Random) -> int:
    pids = sorted(it.processes(role))
    if not pids:
        raise NothingToStrike
    return rng.choice(pids)


def _kill_service(role: str) -> Strike:
    def strike(it: World, rng: random.Random) -> Mend:
        _alive(it, role, rng).kill()
        return _nothing

    return strike


def _stop_service(role: str) -> Strike:
    def strike(it: World, rng: random.Random) -> Mend:
        service = _alive(it, role, rng)
        process = service.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        return lambda: process.send_signal(signal.SIGCONT)

    return strike


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_process(role: str) -> Strike:
    def strike(it: World, rng: random.Random) -> Mend:
        _signal(_pid(it, role, rng), signal.SIGKILL)
        return _nothing

    return strike


def _stop_process(role: str) -> Strike:
    def strike(it: World, rng: random.Random) -> Mend:
        pid = _pid(it, role, rng)
        _signal(pid, signal.SIGSTOP)
        stat = Path(f"/proc/{pid}/stat")
        began = _start_of(stat)

        def mend() -> None:
            if _start_of(stat) == began:  # the number is still its own
                _signal(pid, signal.SIGCONT)

        return mend

    return strike


def _start_of(stat: Path) -> str:
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def _lose_node(it: World, rng: random.Random) -> Mend:
    """The agent, all that runs on its node, and its memory are gone at once; the node comes back later."""
    name = rng.choice(it.names("w"))
    journal = it.journal_of(name)
    it.down.add(name)
    if is_alive(it.services[name]):
        it.services[name].kill()
    for pid in it.processes("keeper"):
        if journal and journal[:8] in _command(pid):  # it names its folder, and the folder the journal
            _signal(pid, signal.SIGKILL)
    for pid, rank in it.processes("trainer").items():
        if journal and rank.startswith(journal):
            _signal(pid, signal.SIGKILL)
    for folder in shared_folders(it.folder, name):
        shutil.rmtree(folder, ignore_errors=True)  # what dies just now may still write: an agent sweeps that later
    return lambda: it.down.discard(name)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _kill_member(it: World, rng: random.Random) -> Mend:
    _living_member(it, rng).kill()
    return it.etcd.start


def _stop_member(it: World, rng: random.Random) -> Mend:
    member = _living_member(it, rng)
    send(member, signal.SIGSTOP)
    return lambda: send(member, signal.SIGCONT)


def _living_member(it: World, rng: random.Random) -> Service:
    members = [member for member in it.etcd.members if is_alive(member)]
    if not members:
        raise NothingToStrike
    return rng.choice(members)


def _lose_member(it: World, rng: random.Random) -> Mend:
    """Its process and its data are gone for good; a new member takes its place later."""
    if not it.etcd.is_whole:
        raise NothingToStrike
    it.etcd.lose(rng.randrange(len(it.etcd.members)))
    return it.etcd.replace


def _etcd_outage(it: World, rng: random.Random) -> Mend:
    for member in it.etcd.members:
        if is_alive(member):
            member.kill()
    return it.etcd.start


def _trouble(links: Links, how: str) -> Strike:
    """Have the links that ``links`` draws do ``how``."""

    def strike(it: World, rng: random.Random) -> Mend:
        troubled = links(it, rng)
        for link in troubled:
            TROUBLES[how](link)

        def mend() -> None:
            for link in troubled:
                link.forward()
                if how == "corrupt":
                    link.reset_connections()  # a stream that was corrupted must not go on

        return mend

    return strike


def _to_etcd(it: World, rng: random.Random) -> list[TcpProxy]:
    """Between one service and all members."""
    return it.etcd_links[rng.choice(list(it.etcd_links))]


def _to_one_member(it: World, rng: random.Random) -> list[TcpProxy]:
    return [rng.choice(_to_etcd(it, rng))]


def _to_coordinator(it: World, rng: random.Random) -> list[TcpProxy]:
    return [it.doors[rng.choice(list(it.doors))]]


def _to_storage(it: World, rng: random.Random) -> list[TcpProxy]:
    return [it.storage_link]


TROUBLES: dict[str, Callable[[TcpProxy], None]] = {
    "cut": TcpProxy.cut,
    "freeze": TcpProxy.freeze,
    "slow": lambda link: link.slow_down(SLOW_LINK_S),
    "half open": TcpProxy.half_open,
    "lose answers": TcpProxy.swallow_answers,
    "corrupt": TcpProxy.corrupt,
    "reset": TcpProxy.reset_connections,
}
LINKS: dict[str, Links] = {
    "link to etcd": _to_etcd,
    "link to one member": _to_one_member,
    "link to a coordinator": _to_coordinator,
    "link to storage": _to_storage,
}


def _storage_refuses(it: World, rng: random.Random) -> Mend:
    it.storage_proxy.refusing = True

    def mend() -> None:
        it.storage_proxy.refusing = False

    return mend


def _storage_dawdles(it: World, rng: random.Random) -> Mend:
    it.storage_proxy.delay_s = SLOW_STORAGE_S

    def mend() -> None:
        it.storage_proxy.delay_s = 0.0

    return mend


def _storage_flips_bits(it: World, rng: random.Random) -> Mend:
    it.storage_proxy.flip_bits(True)
    return lambda: it.storage_proxy.flip_bits(False)


def _storage_stops(it: World, rng: random.Random) -> Mend:
    pid = it.storage.pid
    if not it.storage.is_alive:
        raise NothingToStrike
    _signal(pid, signal.SIGSTOP)

    def mend() -> None:
        if it.storage.is_alive and it.storage.pid == pid:
            _signal(pid, signal.SIGCONT)

    return mend


def _kill_storage(it: World, rng: random.Random) -> Mend:
    if not it.storage.is_alive:
        raise NothingToStrike
    it.down.add(STORAGE)
    it.storage.kill()
    return lambda: it.down.discard(STORAGE)


# A rank's death costs a generation, and a generation that never gets to a checkpoint teaches nothing: what only
# troubles the control plane is drawn more often.
FAULTS = (
    Fault(kind="kill coordinator", strike=_kill_service("c"), weight=4),
    Fault(kind="stop coordinator", strike=_stop_service("c"), weight=3, longest_s=8.0),
    Fault(kind="kill worker", strike=_kill_service("w"), weight=4),
    Fault(kind="stop worker", strike=_stop_service("w"), weight=2, longest_s=6.0),
    Fault(kind="kill trainer", strike=_kill_process("trainer"), weight=2),
    Fault(kind="stop trainer", strike=_stop_process("trainer"), weight=2, longest_s=3.0),
    Fault(kind="kill keeper", strike=_kill_process("keeper"), weight=1),
    Fault(kind="stop keeper", strike=_stop_process("keeper"), weight=1),
    Fault(kind="kill warm process", strike=_kill_process("zygote"), weight=1),
    Fault(kind="stop warm process", strike=_stop_process("zygote"), weight=0.5),
    Fault(kind="lose node", strike=_lose_node, weight=1, shortest_s=1.0, longest_s=6.0),
    Fault(kind="kill etcd member", strike=_kill_member, weight=3),
    Fault(kind="stop etcd member", strike=_stop_member, weight=2),
    Fault(kind="lose etcd member", strike=_lose_member, weight=2, shortest_s=1.0),
    Fault(kind="etcd outage", strike=_etcd_outage, weight=2),
    Fault(kind="storage 503", strike=_storage_refuses, weight=2),
    Fault(kind="storage slow", strike=_storage_dawdles, weight=2),
    Fault(kind="storage flips bits", strike=_storage_flips_bits, weight=2, longest_s=8.0),
    Fault(kind="kill storage", strike=_kill_storage, weight=1),
    Fault(kind="stop storage", strike=_storage_stops, weight=1),
    *(
        Fault(kind=f"{name}: {how}", strike=_trouble(links, how), weight=0.4, longest_s=7.0)
        for name, links in LINKS.items()
        for how in TROUBLES
    ),
)
