"""What all ranks print, from all workers, as one stream of whole lines.

Each worker serves the logs of the ranks it ran. A stream that breaks (its agent died, its node left) is
opened again where it stopped, so no line is lost or shown twice while the log lives.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc
import grpc.aio

from dtrain.cli.clients import CHANNEL_OPTIONS
from dtrain.common.errors import RetryableError, UserError
from dtrain.etcd.client import EtcdClient
from dtrain.proto import agent_pb2 as wire

REOPEN_S = 0.2  # pause before a broken stream is opened again; an agent restarts within a second
LOOK_S = 1.0  # how often new workers are looked for while following
LINE_MAX_BYTES = 64 * 1024  # a longer line is shown in parts
DRAIN_TIMEOUT_S = 5.0  # for the last bytes of a job that has ended

Show = Callable[[int, str], None]  # rank, line


@dataclass(slots=True)
class LineJoiner:
    """Chunks of bytes in, whole lines out, for each log by itself."""

    _rests: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def feed(self, generation: int, rank: int, data: bytes) -> Iterator[str]:
        *lines, rest = (self._rests.get((generation, rank), b"") + data).split(b"\n")
        while len(rest) > LINE_MAX_BYTES:
            lines.append(rest[:LINE_MAX_BYTES])
            rest = rest[LINE_MAX_BYTES:]
        self._rests[generation, rank] = rest
        for line in lines:
            yield _text(line)

    def rests(self) -> Iterator[tuple[int, str]]:
        """(rank, text) of last lines without an end."""
        for (_, rank), rest in sorted(self._rests.items()):
            if rest:
                yield rank, _text(rest)
        self._rests.clear()


def _text(line: bytes) -> str:
    # A carriage return rewrites a line on a terminal (tqdm): what counts is what it ended as.
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


class LogStream:
    """The logs of one job. ``show`` is called with each line as it comes."""

    def __init__(
        self,
        etcd: EtcdClient,
        prefix: str,
        job: str,
        *,
        show: Show,
        rank: int | None = None,  # None: all ranks
        first_generation: int = 1,  # older generations are not shown
    ) -> None:
        self._etcd = etcd
        self._workers_prefix = f"{prefix}/workers/"
        self._job = job
        self._rank = rank
        self._show = show
        self._first_generation = first_generation
        self._joiner = LineJoiner()
        self._offsets: dict[str, dict[tuple[int, int], int]] = {}  # by worker: where each log goes on

    async def follow(self) -> None:
        """Show lines until cancelled. Workers that appear later are followed as well."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for worker in await self._workers():
                    if worker not in tasks:
                        tasks[worker] = asyncio.create_task(self._follow_worker(worker), name=f"logs of {worker}")
                for task in tasks.values():
                    if task.done():
                        task.result()  # it runs for ever, so it failed: raise its error
                await asyncio.sleep(LOOK_S if tasks else REOPEN_S)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def drain(self, *, everything: bool = False) -> None:
        """Show what is there and was not shown yet. With ``everything``, no worker at all is an error."""
        workers = await self._workers()
        if everything and not workers:
            raise UserError("no worker is registered, so no log can be read: start the workers that ran the job.")
        reads = (self._read_to_the_end(worker, address) for worker, address in sorted(workers.items()))
        results = await asyncio.gather(*reads, return_exceptions=True)
        for rank, line in self._joiner.rests():
            self._show(rank, line)
        for worker, result in zip(sorted(workers), results, strict=True):
            if isinstance(result, grpc.aio.AioRpcError) and everything:
                raise UserError(
                    f"the logs of worker {worker} at {workers[worker]} cannot be read now: it is gone, or starts again "
                    f"just now. What its ranks printed lies in its --data-dir, below logs/{self._job}."
                ) from result
            if isinstance(result, BaseException) and not isinstance(result, grpc.aio.AioRpcError | TimeoutError):
                raise result

    async def _read_to_the_end(self, worker: str, address: str) -> None:
        """Read what there is. Raises TimeoutError."""
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            await self._read(worker, address, follow=False)

    async def _workers(self) -> dict[str, str]:
        """Registered workers and their addresses; none while etcd does not answer."""
        try:
            found, _ = await self._etcd.range_prefix(self._workers_prefix)
        except RetryableError:
            return {}
        return {kv.key.removeprefix(self._workers_prefix): str(json.loads(kv.value)["address"]) for kv in found}

    async def _follow_worker(self, worker: str) -> None:
        while True:
            address = (await self._workers()).get(worker)
            if address is not None:
                with contextlib.suppress(grpc.aio.AioRpcError):  # the agent is restarting or gone: look again
                    await self._read(worker, address, follow=True)
            await asyncio.sleep(REOPEN_S)

    async def _read(self, worker: str, address: str, *, follow: bool) -> None:
        offsets = self._offsets.setdefault(worker, {})
        request = wire.TailRequest(
            job=self._job,
            all_ranks=self._rank is None,
            rank=self._rank or 0,
            follow=follow,
            **{
                "from": [
                    wire.LogOffset(generation=generation, rank=rank, offset=offset)
                    for (generation, rank), offset in offsets.items()
                ]
            },
        )
        async with grpc.aio.insecure_channel(address, options=list(CHANNEL_OPTIONS)) as channel:
            tail = channel.unary_stream(
                "/dtrain.v1.Logs/Tail",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=wire.LogChunk.FromString,
            )
            async for chunk in tail(request):
                offsets[chunk.generation, chunk.rank] = chunk.offset + len(chunk.data)
                if chunk.generation < self._first_generation:
                    continue
                for line in self._joiner.feed(chunk.generation, chunk.rank, chunk.data):
                    self._show(chunk.rank, line)
