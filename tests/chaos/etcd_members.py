"""An etcd of three members, each a process that can be killed, frozen and started again."""

import json
import os
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from tests.support.cluster import Service
from tests.support.etcd_server import etcd_binary
from tests.support.facts import wait_for
from tests.support.ports import free_ports

MEMBERS = 3
READY_S = 60.0


class EtcdMembers:
    """The members, with data in ``folder``. Ports are the same for ever."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        ports = free_ports(2 * MEMBERS)
        self.endpoints = [f"127.0.0.1:{port}" for port in ports[:MEMBERS]]
        peers = [f"http://127.0.0.1:{port}" for port in ports[MEMBERS:]]
        whole = ",".join(f"member{number}={peer}" for number, peer in enumerate(peers))
        clean = {name: value for name, value in env.items() if not name.startswith("ETCD_")}
        self.members = []
        for number, peer in enumerate(peers):
            client = f"http://{self.endpoints[number]}"
            argv = [str(etcd_binary()), f"--name=member{number}", f"--data-dir={folder / f'member{number}'}"]
            argv += [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
            argv += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
            argv += [f"--initial-cluster={whole}", "--logger=zap", "--log-outputs=stderr"]
            self.members.append(Service(argv, clean, folder / f"member{number}.log"))

    def start(self) -> None:
        for member in self.members:
            if not is_alive(member):
                member.start()

    def wait_ready(self) -> None:
        """Wait until every member says it is healthy, which needs a leader."""
        wait_for("a healthy etcd", lambda: all(map(_is_healthy, self.endpoints)), deadline_s=READY_S)


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
