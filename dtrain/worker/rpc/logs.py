"""The Logs service: what the trainers of this node printed, from the beginning or from where a reader stopped.

Log files are plain files that keepers append to, ``<data folder>/logs/<job>/generation-0001/rank-0.log``. A
reader that follows is served by looking at their sizes, so a trainer that prints never waits for a reader.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from dtrain.common.errors import UserError
from dtrain.common.names import JobName, job_name
from dtrain.proto import agent_pb2 as wire
from dtrain.proto.agent_pb2_grpc import LogsServicer

CHUNK_BYTES = 256 * 1024  # of one message: a bound on what one reader holds in memory here
FOLLOW_S = 0.2  # between two looks at the sizes
_GENERATION = re.compile(r"generation-(\d+)")
_RANK = re.compile(r"rank-(\d+)\.log")


def log_path(logs: Path, job: JobName, generation: int, rank: int) -> Path:
    """Where the keeper of this rank appends what its trainer prints."""
    return logs / job / f"generation-{generation:04d}" / f"rank-{rank}.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class _LogFile:
    generation: int
    rank: int
    path: Path


class LogFiles(LogsServicer):
    """Serves the log files under one folder."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs

    async def Tail(
        self, request: wire.TailRequest, context: "grpc.aio.ServicerContext[wire.TailRequest, wire.LogChunk]"
    ) -> AsyncIterator[wire.LogChunk]:
        """Stream the job's logs, oldest generation first; while following, what is appended later."""
        try:
            job = job_name(request.job)
        except UserError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        offsets = {(start.generation, start.rank): start.offset for start in getattr(request, "from")}
        while True:
            for file in await asyncio.to_thread(self._find, job):
                if not request.all_ranks and file.rank != request.rank:
                    continue
                name = (file.generation, file.rank)
                while data := await asyncio.to_thread(_read, file.path, offsets.get(name, 0)):
                    offset = offsets.get(name, 0)
                    offsets[name] = offset + len(data)
                    yield wire.LogChunk(generation=file.generation, rank=file.rank, offset=offset, data=data)
            if not request.follow:
                return
            await asyncio.sleep(FOLLOW_S)

    def _find(self, job: JobName) -> list[_LogFile]:
        found = []
        for path in (self._logs / job).glob("generation-*/rank-*.log"):
            generation, rank = _GENERATION.fullmatch(path.parent.name), _RANK.fullmatch(path.name)
            if generation and rank:
                found.append(_LogFile(generation=int(generation[1]), rank=int(rank[1]), path=path))
        return sorted(found, key=lambda file: (file.generation, file.rank))


def _read(path: Path, offset: int) -> bytes:
    """Return at most CHUNK_BYTES from ``offset`` on; empty at the end, or if the file is gone."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)
    except FileNotFoundError:
        return b""
