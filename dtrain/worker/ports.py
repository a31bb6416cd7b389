"""A port that is free for the next generation's rendezvous, because this agent holds it.

The coordinator must name MASTER_PORT before rank 0 runs. A port that was merely free a moment ago may be taken
by then, so the agent holds one bound (not listening) and lets go just before rank 0 is spawned.
"""

import socket


class HeldPort:
    """One bound port at a time."""

    def __init__(self) -> None:
        self._socket = _bind()

    @property
    def number(self) -> int:
        return int(self._socket.getsockname()[1])

    def release(self, number: int) -> None:
        """Let go of the port if it is this one, and hold another."""
        if number == self.number:
            held = self._socket
            self._socket = _bind()  # first, so that it cannot be the same one
            held.close()

    def close(self) -> None:
        self._socket.close()


def _bind() -> socket.socket:
    """Bind any free port for both families, as c10d's store listens."""
    if socket.has_dualstack_ipv6():
        both = socket.socket(socket.AF_INET6)
        try:
            both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            both.bind(("::", 0))
            return both
        except OSError:
            both.close()  # IPv6 is compiled in and switched off: a container's usual state
    only = socket.socket(socket.AF_INET)
    only.bind(("0.0.0.0", 0))
    return only
