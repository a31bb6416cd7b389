"""gRPC's two ends over the modelled network: what production code gets from `grpc.aio`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from tests.sim.loop import CURRENT
from tests.sim.machines import Process
from tests.sim.network import Link, Network, rpc_error


class Channel:
    """What ``grpc.aio.insecure_channel`` returns."""

    def __init__(self, net: Network, target: str) -> None:
        process = CURRENT.get()
        assert process is not None, "a channel of nobody"
        self._net, self._target, self._process = net, target, process
        self._links: list[Link] = []

    def unary_unary(self, path: str, *_: Any, **__: Any) -> Callable[..., Any]:
        def method(request: Any, timeout: float | None = None, **_: Any) -> Any:
            return self._net.call(self._process, self._target, path, request, timeout)

        return method

    def stream_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., Link]:
        def method(*_: Any, timeout: float | None = None, **__: Any) -> Link:
            messy = path.startswith("/dtrain.")
            link = Link(self._net, self._process, self._target, path, messy=messy)
            if timeout is not None:
                late = rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
                self._net.loop.call_later(timeout, link._finish, late)
            else:
                self._links.append(link)
            return link

        return method

    unary_stream = stream_unary = stream_stream

    async def close(self, grace: float | None = None) -> None:
        for link in self._links:
            link.cancel()
        self._links.clear()

    async def __aenter__(self) -> "Channel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Aborted(Exception):
    pass


class _Context:
    """What a handler may ask of its call."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def abort(self, code: grpc.StatusCode, details: str = "", *_: object) -> None:
        self.error = rpc_error(code, details)
        raise _Aborted(details)


class GrpcServer:
    """What ``grpc.aio.server`` returns: production servicers behind an address."""

    def __init__(self, net: Network) -> None:
        process = CURRENT.get()
        assert process is not None, "a server of nobody"
        self.process: Process | None = process
        self._owner = process
        self._net = net
        self._handlers: dict[str, Any] = {}
        self._started = False

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The registered ones are enough."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self._handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def add_insecure_port(self, address: str) -> int:
        host, _, port = address.rpartition(":")
        self._net.servers[f"{host}:{port}"] = self
        self._net.machines[f"{host}:{port}"] = self._owner.machine
        return int(port)

    async def start(self) -> None:
        self._started = True

    async def stop(self, grace: float | None = None) -> None:
        self._started = False

    def reachable(self) -> bool:
        return self._owner.alive and self._started

    def unary(self, path: str, request: Any, answer: Callable[[Any, Exception | None], None]) -> None:
        context = _Context()

        async def serve() -> None:
            try:
                result = await self._handlers[path].unary_unary(request, context)
            except _Aborted:
                answer(None, context.error)
            else:
                answer(result, None)

        def begin() -> None:
            self._net.loop.create_task(serve(), context=self._owner.context.copy())

        self._net.loop.call_soon(begin, context=self._owner.context.copy())

    def stream(self, path: str, link: Link) -> None:
        owner, loop, context = self._owner, self._net.loop, _Context()
        inbox: asyncio.Queue[Any] = asyncio.Queue()

        async def requests() -> AsyncIterator[Any]:
            while True:
                yield await inbox.get()

        async def serve() -> None:
            try:
                async for message in self._handlers[path].stream_stream(requests(), context):
                    link.to_client(message)
            except _Aborted:
                link.finish(context.error)
            else:
                link.finish(None)
            finally:
                owner.at_end.remove(died)

        def begin() -> None:
            task = loop.create_task(serve(), context=owner.context.copy())
            link.on_end = lambda: loop.call_soon(task.cancel, context=owner.context.copy())

        def died() -> None:
            if owner.machine.dark:
                link.starve()
            link.finish(rpc_error(grpc.StatusCode.UNAVAILABLE, "Socket closed"))

        link.on_message = lambda message: loop.call_soon(inbox.put_nowait, message, context=owner.context.copy())
        owner.at_end.append(died)
        loop.call_soon(begin, context=owner.context.copy())
