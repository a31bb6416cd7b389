"""The network, as gRPC shows it: channels, servers, calls; and what a network does to them.

A message takes time, and may find the way shut in one direction. A unary call's answer may be lost after the server
has done what was asked. A stream keeps its order and breaks as a whole; yet the product claims that losing, repeating
and reordering its own messages costs time only, so streams between workers and coordinators may suffer that too.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio

from dtrain.proto.agent_pb2 import CoordinatorMessage
from tests.sim.loop import SimLoop
from tests.sim.machines import Machine, Process

NOTICED_S = (6.0, 9.5)  # a link that swallows everything is noticed by gRPC's pings within this
_NO_METADATA = grpc.aio.Metadata()


def rpc_error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, _NO_METADATA, _NO_METADATA, details=details)


def refused() -> grpc.aio.AioRpcError:
    return rpc_error(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: Connection refused")


@dataclass
class Weather:
    """How bad the network is; the faults' plan sets it."""

    latency_s: tuple[float, float] = (0.0005, 0.004)
    slow_part: float = 0.0  # of messages that take up to slow_s
    slow_s: float = 1.0
    lost_answers: float = 0.0  # of unary calls
    dropped: float = 0.0  # of messages of streams between workers and coordinators
    doubled: float = 0.0
    shuffled: float = 0.0
    late_s: float = 1.0  # a message that is overtaken comes within this, a second copy within twice as much
    shut: dict[tuple[str, str], int] = field(default_factory=dict)  # directions that let nothing through, counted


class Server(Protocol):
    """What answers under an address."""

    process: Process | None  # None: of the world

    def reachable(self) -> bool: ...
    def unary(self, path: str, request: Any, answer: "Callable[[Any, Exception | None], None]") -> None: ...
    def stream(self, path: str, link: "Link") -> None: ...


class Network:
    """All links of a world."""

    def __init__(self, loop: SimLoop, rng: random.Random, seen: Callable[[str], None]) -> None:
        self.loop = loop
        self.rng = rng
        self.weather = Weather()
        self.servers: dict[str, Server] = {}
        self.machines: dict[str, Machine] = {}  # address -> machine
        self.seen = seen  # counts a situation
        self.links: dict[Link, None] = {}  # in the order in which they came, the same in every process
        self.hold: Callable[[Link, Any], bool] | None = None  # whether a message to a worker is kept on its way
        self.hears: Callable[[Process, Any], None] = lambda process, message: None  # what is sent up a stream
        self.late_s: dict[str, float] = {}  # what these machines send up a stream comes so much later
        self.arrives: Callable[[str, float, Any], None] = lambda host, at_s, message: None  # and what gets there
        self.spoke: dict[str, list[float]] = {}  # worker -> when it reached who had welcomed it
        self.looked: dict[str, float] = {}  # process -> when it last asked who leads

    def delay_s(self) -> float:
        low, high = self.weather.latency_s
        if self.weather.slow_part and self.rng.random() < self.weather.slow_part:
            return self.rng.uniform(high, self.weather.slow_s)
        return self.rng.uniform(low, high)

    def open(self, source: Machine, target: Machine) -> bool:
        if source.dark or target.dark:
            return False
        return not self.weather.shut or not self.weather.shut.get((source.name, target.name))

    def shut(self, source: str, target: str) -> None:
        shut = self.weather.shut
        shut[source, target] = shut.get((source, target), 0) + 1
        for link in list(self.links):
            if {link.client.machine.name, link.server_machine.name} == {source, target}:
                link.starve()

    def reopen(self, source: str, target: str) -> None:
        left = self.weather.shut.get((source, target), 0) - 1
        self.weather.shut[source, target] = max(0, left)
        if left <= 0:
            self.weather.shut.pop((source, target), None)

    async def call(self, client: Process, address: str, path: str, request: Any, timeout_s: float | None) -> Any:
        """One unary call."""
        loop, machine = self.loop, self.machines[address]
        if path.endswith("/Range") and request.key.endswith(b"/leader"):
            self.looked[client.name] = loop.now_s
        future = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def back(result: Any, error: Exception | None) -> None:
            lost = error is None and self.weather.lost_answers and self.rng.random() < self.weather.lost_answers
            if lost or not self.open(machine, client.machine):
                self.seen(f"lost answer: {path.rpartition('/')[2]}")
                result, error = None, rpc_error(grpc.StatusCode.UNAVAILABLE, "Stream removed")
                later_s = self.delay_s() if lost else self.rng.uniform(*NOTICED_S)
            else:
                later_s = self.delay_s()
            loop.call_later(later_s, settle, result, error, context=client.context.copy())

        def arrive() -> None:
            server = self.servers.get(address)
            if not self.open(client.machine, machine):
                pass  # swallowed: the deadline, or the pings, tell
            elif server is None or not server.reachable():
                loop.call_later(self.delay_s(), settle, None, refused(), context=client.context.copy())
            else:
                server.unary(path, request, back)

        loop.after(self.delay_s(), arrive)
        silence_s = self.rng.uniform(*NOTICED_S)
        error = rpc_error(grpc.StatusCode.UNAVAILABLE, "keepalive watchdog timeout")
        if timeout_s is not None and timeout_s < silence_s:
            silence_s, error = timeout_s, rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        timer = loop.call_later(silence_s, settle, None, error)
        try:
            return await future
        finally:
            timer.cancel()


class Link:
    """One bidirectional stream, from its client's end; `to_client` and the like are the server's."""

    def __init__(self, net: Network, client: Process, address: str, path: str, *, messy: bool) -> None:
        self.net = net
        self.client = client
        self.server_machine = net.machines[address]
        self.address = address
        self.path = path
        self.messy = messy  # its messages may be lost, doubled, reordered
        self.on_message: Callable[[Any], None] = lambda message: None  # at the server
        self.on_end: Callable[[], None] = lambda: None  # at the server: the client is gone
        self.ended = False  # for the client
        self.server_ended = False
        self.welcomed = False  # a coordinator's welcome came this way
        self._starves = False
        self._error: Exception | None = None
        self._inbox: list[Any] = []
        self._waiter: asyncio.Future[None] | None = None
        self._last_s = [0.0, 0.0]  # arrival of the newest message, to the server and to the client
        net.links[self] = None
        client.at_end.append(self._client_died)
        connecting_s = net.delay_s()
        self._last_s[0] = net.loop.now_s + connecting_s  # nothing arrives before the connection
        net.loop.after(connecting_s, self._connect)

    # -- the client's end: what grpc.aio's call offers -------------------------------------------------

    async def write(self, message: Any) -> None:
        if self.ended:
            raise self._error or asyncio.InvalidStateError("the stream has ended")
        self.net.hears(self.client, message)
        self._carry(0, message, self.client.machine, self.server_machine, self._reach_server)

    async def read(self) -> Any:
        while not self._inbox:
            if self.ended:
                if self._error is not None:
                    raise self._error
                return grpc.aio.EOF  # type: ignore[attr-defined]
            self._waiter = self.net.loop.create_future()
            await self._waiter
        return self._inbox.pop(0)

    def __aiter__(self) -> "Link":
        return self

    async def __anext__(self) -> Any:
        message = await self.read()
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise StopAsyncIteration
        return message

    def cancel(self) -> bool:
        if not self.ended:
            self._finish(asyncio.CancelledError())
            self.net.loop.after(self.net.delay_s(), self._tell_server)
        return True

    def _finish(self, error: BaseException | None) -> None:
        if not self.ended:
            self.ended = True
            self._error = error  # type: ignore[assignment]
            self.net.links.pop(self, None)
            if self._client_died in self.client.at_end:
                self.client.at_end.remove(self._client_died)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- the network's part ----------------------------------------------------------------------------

    def _connect(self) -> None:
        server = self.net.servers.get(self.address)
        if not self.net.open(self.client.machine, self.server_machine):
            self.starve()
        elif server is None or not server.reachable():
            self._break_client(refused())
        else:
            server.stream(self.path, self)

    def _carry(self, way: int, message: Any, source: Machine, target: Machine, arrive: Callable[..., None]) -> None:
        net, weather = self.net, self.net.weather
        if self._starves or not net.open(source, target):
            self.starve()
            return
        late_s = net.late_s.get(source.name, 0.0) if way == 0 else 0.0
        when_s = max(net.loop.now_s + net.delay_s() + late_s, self._last_s[way])
        if self.messy and (weather.dropped or weather.doubled or weather.shuffled):
            draw = net.rng.random()
            if draw < weather.dropped:
                net.seen("stream message dropped")
                return
            if draw < weather.dropped + weather.doubled:
                net.seen("stream message doubled")
                net.loop.after(when_s - net.loop.now_s + net.rng.uniform(0, 2 * weather.late_s), arrive, message)
            elif draw < weather.dropped + weather.doubled + weather.shuffled:
                net.seen("stream message overtaken")
                net.loop.after(when_s - net.loop.now_s + net.rng.uniform(0, weather.late_s), arrive, message)
                return
        self._last_s[way] = when_s
        net.loop.after(when_s - net.loop.now_s, arrive, message)

    def _reach_server(self, message: Any) -> None:
        if not self.server_ended:
            self.net.arrives(self.server_machine.name, self.net.loop.now_s, message)
            if self.welcomed:
                self.net.spoke.setdefault(self.client.machine.name, []).append(self.net.loop.now_s)
            self.on_message(message)

    def starve(self) -> None:
        """Nothing gets through any more, or a gap could be seen behind it: both ends notice by their pings."""
        if self._starves:
            return
        self._starves = True
        for act in (self._break_client_silently, self._tell_server):
            self.net.loop.after(self.net.rng.uniform(*NOTICED_S), act)

    def _break_client_silently(self) -> None:
        self._break_client(rpc_error(grpc.StatusCode.UNAVAILABLE, "keepalive watchdog timeout"))

    def _break_client(self, error: Exception | None) -> None:
        self.net.loop.call_soon(self._finish, error, context=self.client.context.copy())

    def _tell_server(self) -> None:
        if not self.server_ended:
            self.server_ended = True
            self.on_end()

    def _client_died(self) -> None:
        """The kernel resets the connection, if a packet gets there."""
        self.ended = True
        self.net.links.pop(self, None)
        there = self.net.open(self.client.machine, self.server_machine)
        delay_s = self.net.delay_s() if there else self.net.rng.uniform(*NOTICED_S)
        self.net.loop.after(delay_s, self._tell_server)

    # -- the server's end ------------------------------------------------------------------------------

    def to_client(self, message: Any) -> None:
        held = self.messy and self.net.hold is not None and self.net.hold(self, message)
        if not self.server_ended and not held:
            self._carry(1, message, self.server_machine, self.client.machine, self._reach_client)

    def deliver(self, message: Any) -> None:
        """Have a message arrive that was kept on its way."""
        if self.net.open(self.server_machine, self.client.machine):
            self._reach_client(message)

    def _reach_client(self, message: Any) -> None:
        def take() -> None:
            if not self.ended:
                self.welcomed |= isinstance(message, CoordinatorMessage) and message.HasField("welcome")
                self._inbox.append(message)
                self._wake()

        self.net.loop.call_soon(take, context=self.client.context.copy())

    def finish(self, error: Exception | None) -> None:
        """The server ends the stream."""
        self.server_ended = True
        delay_s = self.net.delay_s() if self.net.open(self.server_machine, self.client.machine) else NOTICED_S[1]
        self.net.loop.after(max(delay_s, self._last_s[1] - self.net.loop.now_s), self._break_client, error)
