"""The store in which ranks of several nodes meet, without the two waits that torch's own way to it has.

- Who connects before rank 0 listens is made to wait by torch, longer and longer, half a second at once. Here a plain
  socket looks every few milliseconds, and torch connects when there is somebody.
- For each connection torch asks the name server for the name of the other side's address, to have it for messages. A
  name server that is away costs seconds each time. So the host's name is made an address before, and while the store
  connects, this thread's questions are answered here: there is no such name.

Rank 0 asks for everybody who comes as well, in a thread of torch's that nothing reaches. It listens on an address of
version 4 where the host has one: written so, it is found in the file of hosts, where torch's own choice
(``::ffff:a.b.c.d``) never is. Who is not in that file is asked for, within the bounds that the worker sets
(``RES_OPTIONS``).
"""

import contextlib
import ctypes
import socket
import struct
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dtrain.trainer.surroundings import Surroundings

LOOK_S = 0.005  # between two looks for a host that does not listen yet
LOOK_MAX_S = 1.0  # of one look at a host that does not answer: sooner than the kernel would try again
NAME_PAUSE_S = 0.1  # between two tries of a name server that does not know the host, or does not answer
PACKET_BYTES = 512  # of a question, at most (RFC 1035)
_HEADER_BYTES = 12
_NO_SUCH_NAME = bytes((0x81, 0x83, 0, 1, 0, 0, 0, 0, 0, 0))  # an answer, NXDOMAIN, one question, no records
_LOOPBACK = bytes((127, 0, 0, 1))
BACKLOG = 4096  # ranks may all come at once; the kernel lowers it to what it allows


def tcp_store(host: str, port: int, surroundings: Surroundings, timeout: timedelta) -> TCPStore:
    """Return the store that rank 0 hosts at this port. Raises RuntimeError if it was not there in time."""
    world_size = surroundings.world_size
    deadline = time.monotonic() + timeout.total_seconds()
    family, address = _resolved(host, port, deadline)
    if surroundings.rank == 0:
        with no_names_asked():
            listening = _listening(family, port).detach()  # torch closes it
            return TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listening)
    _wait_for_host(family, address, port, deadline)
    with no_names_asked():
        return TCPStore(address, port, world_size, is_master=False, timeout=timeout)


class _Resolver(ctypes.Structure):
    """The beginning of what glibc's resolver keeps for each thread, as resolv.h gives it to programs."""

    _fields_ = (
        ("retrans_s", ctypes.c_int),
        ("retry", ctypes.c_int),
        ("options", ctypes.c_ulong),
        ("name_servers", ctypes.c_int),
        ("first_name_server", ctypes.c_ubyte * 16),  # a sockaddr_in
    )
    INITIALISED = 1  # RES_INIT, among the options


@contextlib.contextmanager
def no_names_asked() -> Iterator[None]:
    """Let what this thread asks a name server be answered here, at once: there is no such name.

    Files of hosts are read as ever. Other threads notice nothing.
    """
    libc = ctypes.CDLL(None)
    try:
        state_of_this_thread, initialise = libc["__res_state"], libc["__res_init"]
    except AttributeError:  # another C library than glibc: the look-ups stay, within its bounds
        yield
        return
    state_of_this_thread.restype = ctypes.POINTER(_Resolver)
    resolver = state_of_this_thread().contents
    if not resolver.options & _Resolver.INITIALISED:
        initialise()
    before = bytes(resolver)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        threading.Thread(target=_know_no_name, args=(server.dup(),), name="dtrain-no-names", daemon=True).start()
        port = server.getsockname()[1]
        resolver.name_servers = 1
        resolver.first_name_server[:] = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, _LOOPBACK)
        try:
            yield
        finally:
            ctypes.memmove(ctypes.byref(resolver), before, len(before))
            server.sendto(b"", server.getsockname())


def _know_no_name(server: socket.socket) -> None:
    """Answer every question with "no such name" (RFC 1035), until an empty packet comes."""
    with server:
        while True:
            question, peer = server.recvfrom(PACKET_BYTES)
            if not question:
                return
            end = question.find(b"\0", _HEADER_BYTES) + 1 + 4  # the name, and what is asked about it
            server.sendto(question[:2] + _NO_SUCH_NAME + question[_HEADER_BYTES:end], peer)


def _resolved(host: str, port: int, deadline: float) -> tuple[socket.AddressFamily, str]:
    """The host's address, of version 4 if it has one. Raises RuntimeError if its name was not known in time."""
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(f"the name of the node of rank 0, {host}, has no address: {error}") from error
            time.sleep(NAME_PAUSE_S)
            continue
        family, _, _, _, address = min(found, key=lambda entry: entry[0] is not socket.AF_INET)
        return family, str(address[0])


def _listening(family: socket.AddressFamily, port: int) -> socket.socket:
    """Listen on every address of this host, as torch does."""
    try:
        return socket.create_server(("", port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise RuntimeError(f"rank 0 cannot listen on port {port}: {error}") from error


def _wait_for_host(family: socket.AddressFamily, address: str, port: int, deadline: float) -> None:
    """Return when somebody listens there. Raises RuntimeError when nobody did in time."""
    while not _listens(family, address, port):
        if time.monotonic() >= deadline:
            raise RuntimeError(f"rank 0 does not listen at {address}:{port}")
        time.sleep(LOOK_S)


def _listens(family: socket.AddressFamily, address: str, port: int) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as looking:
        looking.settimeout(LOOK_MAX_S)
        try:
            looking.connect((address, port))
        except OSError:
            return False
        # On rank 0's own node the kernel may give a socket that very port, and connect it with itself.
        return bool(looking.getsockname() != looking.getpeername())
