"""Stay with a job until it ends: its events, its ranks' output and its progress, at once.

The log decides when the job has ended; status and output only show. So a follower needs etcd, and the
coordinator may come and go meanwhile.
"""

import asyncio
import time
from dataclasses import dataclass, replace

from dtrain.cli.clients import Coordinator
from dtrain.cli.event_words import describe
from dtrain.cli.log_streams import LogStream
from dtrain.cli.progress import Screen
from dtrain.common.errors import DtrainError
from dtrain.common.names import JobName
from dtrain.coordinator.core.events import (
    AttemptSwept,
    CheckpointAborted,
    CheckpointCommitted,
    CheckpointDeleted,
    CheckpointExpired,
    CheckpointMarked,
    CheckpointStarted,
    Event,
    GenerationStarted,
    JobCancelled,
    JobFailed,
    JobSubmitted,
    JobSucceeded,
    MembersFinished,
    RunInterrupted,
)
from dtrain.coordinator.history import follow_history
from dtrain.etcd.client import EtcdClient

SILENT_S = 5.0  # without an answer, before it is said that there is none
STATUS_S = 0.5  # how often progress is asked for: workers report as often
# Of no interest to who watches a run; `dtrain history` tells them.
_HOUSEKEEPING = (
    MembersFinished,
    CheckpointStarted,
    CheckpointMarked,
    CheckpointExpired,
    CheckpointDeleted,
    AttemptSwept,
)
EXIT_CANCELLED = 1  # a run that somebody else ended did not succeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run of a job ended."""

    exit_code: int
    words: str


class Follower:
    """Follows run ``run`` of a job."""

    def __init__(
        self, etcd: EtcdClient, coordinator: Coordinator, *, prefix: str, job: JobName, run: int, screen: Screen
    ) -> None:
        self._etcd = etcd
        self._coordinator = coordinator
        self._prefix = prefix
        self._job = job
        self._run = run
        self._screen = screen
        self._events = follow_history(etcd, prefix, job)
        self._saved = False
        self._never_saved = ""  # what to say of it at the end

    async def follow(self) -> Outcome:
        """Show everything until the run has ended, then the rest of its output."""
        first_generation = await self._find_run()
        logs = LogStream(
            self._etcd, self._prefix, self._job, show=self._screen.rank_line, first_generation=first_generation
        )
        end = asyncio.create_task(self._read_events(), name="events")
        shows = [
            asyncio.create_task(logs.follow(), name="logs"),
            asyncio.create_task(self._show_progress(), name="progress"),
        ]
        try:
            # The shows run for ever: one that is done has failed, and its error is the answer.
            done, _ = await asyncio.wait([end, *shows], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            outcome = await end
        finally:
            for task in (end, *shows):
                task.cancel()
            await asyncio.gather(end, *shows, return_exceptions=True)
        await logs.drain()
        return outcome

    async def _find_run(self) -> int:
        """Read up to the run's submission; return its first generation. What earlier runs printed is not its own."""
        newest_generation = 0
        async for recorded in self._events:
            match recorded.event:
                case GenerationStarted(generation=generation):
                    newest_generation = generation
                case JobSubmitted(run=run) if run == self._run:
                    return newest_generation + 1
                case _:
                    continue
        raise AssertionError("a history is followed for ever")

    async def _read_events(self) -> Outcome:
        async for recorded in self._events:
            if (outcome := _outcome(recorded.event)) is not None:
                if outcome.exit_code == 0 and not self._saved:
                    return replace(outcome, words=outcome.words + self._never_saved)
                return outcome
            if isinstance(recorded.event, CheckpointCommitted):
                self._saved = True
            elif isinstance(recorded.event, CheckpointAborted) and not recorded.event.missed:
                self._never_saved = f"; no checkpoint of this run could be stored: {recorded.event.reason}"
            if not isinstance(recorded.event, _HOUSEKEEPING):
                self._screen.say(describe(recorded.event))
        raise AssertionError("a history is followed for ever")

    async def _show_progress(self) -> None:
        heard_s, told = time.monotonic(), False
        while True:
            try:
                reply = await self._coordinator.status(self._job, patience_s=0.0)
            except DtrainError as error:  # nobody leads just now; the next look makes up for it
                if not told and time.monotonic() - heard_s > SILENT_S:
                    told = True
                    self._screen.say(f"no news of the job just now: {error}")
            else:
                if told:
                    self._screen.say("the cluster answers again")
                heard_s, told = time.monotonic(), False
                for job in reply.jobs:
                    self._screen.progress(job)
            await asyncio.sleep(STATUS_S)


def _outcome(event: Event) -> Outcome | None:
    match event:
        case JobSucceeded():
            return Outcome(exit_code=0, words=describe(event))
        case JobFailed(exit_code=exit_code):
            return Outcome(exit_code=exit_code or 1, words=describe(event))
        case JobCancelled() | RunInterrupted():
            return Outcome(exit_code=EXIT_CANCELLED, words=describe(event))
        case _:
            return None
