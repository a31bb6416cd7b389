"""An etcd of three members, each a process that can be killed, frozen, started again, or lost for good.

A member that is lost never comes back: its process and its data are gone. As an operator would, somebody takes it out
of the membership and adds a new one with an empty folder in its place, while the others go on. One member is lost at a
time: with two of three gone there would be no quorum, and nothing left that etcd promises.
"""

import json
import os
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster import Service
from tests.support.etcd_server import etcd_binary, etcdctl_binary
from tests.support.facts import wait_for
from tests.support.ports import free_ports

MEMBERS = 3
READY_S = 60.0
ASK_S = 10.0  # for one request about the membership; without a quorum it is asked again
RETRY_S = 0.3
REPLACED_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A member as the cluster knows it."""

    id: str  # hexadecimal
    name: str  # empty until it was started once
    peer: str


class EtcdMembers:
    """The members, with data in ``folder``. Ports are the same for ever."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        ports = free_ports(2 * MEMBERS)
        self.endpoints = [f"127.0.0.1:{port}" for port in ports[:MEMBERS]]
        self._peers = [f"http://127.0.0.1:{port}" for port in ports[MEMBERS:]]
        self._folder = folder
        self._env = {name: value for name, value in env.items() if not name.startswith("ETCD_")}
        self._lives = [0] * MEMBERS  # how often each was replaced
        first = ",".join(f"{self._name(number)}={peer}" for number, peer in enumerate(self._peers))
        self.members = [
            Service(self._argv(number, first, "new"), self._env, folder / f"member{number}.log")
            for number in range(MEMBERS)
        ]
        self.replaced = 0
        self._lost: int | None = None
        self._replacing: threading.Thread | None = None
        self._over = threading.Event()

    def _name(self, number: int) -> str:
        return f"member{number}-{self._lives[number]}"

    def _argv(self, number: int, whole: str, state: str) -> list[str]:
        client, peer = f"http://{self.endpoints[number]}", self._peers[number]
        argv = [str(etcd_binary()), f"--name={self._name(number)}", f"--data-dir={self._folder / self._name(number)}"]
        argv += [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
        argv += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
        argv += [f"--initial-cluster={whole}", f"--initial-cluster-state={state}"]
        return [*argv, "--logger=zap", "--log-outputs=stderr"]

    def start(self) -> None:
        """Start those that do not run, but for one that is lost: it can only be replaced."""
        for number, member in enumerate(self.members):
            if number != self._lost and not is_alive(member):
                member.start()

    def wait_ready(self) -> None:
        """Wait until every member says it is healthy, which needs a leader."""
        wait_for("a healthy etcd", lambda: all(map(_is_healthy, self.endpoints)), deadline_s=READY_S)

    # -- losing a member for good ------------------------------------------------------------------------

    @property
    def is_whole(self) -> bool:
        """Whether no member is lost, and all are up and in step: only then may one be lost."""
        return self._lost is None and all(map(is_alive, self.members)) and all(map(_is_healthy, self.endpoints))

    def lose(self, number: int) -> None:
        """Process and data are gone. Until ``replace`` there are two."""
        assert self._lost is None, "one at a time"
        self._lost = number
        self.members[number].kill()
        shutil.rmtree(self._folder / self._name(number))

    def replace(self) -> None:
        """Begin to put a new member in the lost one's place; it takes until the others have a quorum."""
        assert self._lost is not None and self._replacing is None
        self._replacing = threading.Thread(target=self._replace, args=(self._lost,), name="new member", daemon=True)
        self._replacing.start()

    def wait_replaced(self) -> None:
        if self._replacing is not None:
            self._replacing.join(REPLACED_S)
        assert self._lost is None, f"member {self._lost} was not replaced within {REPLACED_S:g} s"

    def close(self) -> None:
        """Replace nothing any more."""
        self._over.set()
        if self._replacing is not None:
            self._replacing.join(2 * ASK_S)

    def _replace(self, number: int) -> None:
        """Look, and do what is next; whatever is asked may get no answer, and may be done all the same."""
        gone = self._name(number)
        self._lives[number] += 1
        while not self._over.wait(RETRY_S):
            known = self._known(number)
            mine = next((member for member in known if member.peer == self._peers[number]), None)
            if not known:
                continue
            if mine is None:
                self._ctl(number, "member", "add", self._name(number), f"--peer-urls={self._peers[number]}")
            elif mine.name == gone:
                self._ctl(number, "member", "remove", mine.id)
            else:
                names = {peer: self._name(each) for each, peer in enumerate(self._peers)}
                whole = ",".join(f"{names[member.peer]}={member.peer}" for member in known)
                self.members[number].argv = self._argv(number, whole, "existing")
                self.members[number].start()
                self.replaced += 1
                self._lost, self._replacing = None, None
                return

    def _known(self, number: int) -> list[_Known]:
        """The membership; nothing if nobody answers."""
        told = self._ctl(number, "member", "list", "--hex", "--write-out=json")
        try:
            members = json.loads(told)["members"] if told else []
        except ValueError:
            return []
        return [_Known(id=_hex(each["ID"]), name=each.get("name", ""), peer=each["peerURLs"][0]) for each in members]

    def _ctl(self, number: int, *arguments: str) -> str:
        others = ",".join(endpoint for each, endpoint in enumerate(self.endpoints) if each != number)
        argv = [str(etcdctl_binary()), f"--endpoints={others}", f"--command-timeout={ASK_S:g}s", *arguments]
        env = {**self._env, "ETCDCTL_API": "3"}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""


def _hex(identity: int | str) -> str:
    """As etcdctl takes it; it prints numbers or, some releases, hexadecimal digits."""
    return f"{identity:x}" if isinstance(identity, int) else identity


@contextmanager
def replacing(etcd: EtcdMembers) -> Iterator[EtcdMembers]:
    """On leaving, nobody starts members any more."""
    try:
        yield etcd
    finally:
        etcd.close()


def is_alive(service: Service) -> bool:
    return service.process is not None and service.process.poll() is None


def _is_healthy(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{endpoint}/health", timeout=2) as answer:
            return str(json.load(answer)["health"]) == "true"
    except (OSError, urllib.error.URLError, ValueError, KeyError):
        return False


def send(service: Service, number: int) -> None:
    """Signal a service that may have ended."""
    process: subprocess.Popen[bytes] | None = service.process
    if process is not None and process.poll() is None:
        os.kill(process.pid, number)
