"""Free ports for servers that cannot choose one by themselves."""

import socket
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Return so many different ports of 127.0.0.1 that were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def remove_sockets(ports: Iterable[int | str]) -> None:
    """Remove the sockets that SeaweedFS makes in /tmp, wherever its data is, and that a killed one leaves."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)
