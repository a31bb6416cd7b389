"""What the disk does not hold yet is in no snapshot, whenever a heartbeat comes."""

import asyncio
import threading
from collections.abc import Iterable
from types import SimpleNamespace

from dtrain.common.names import Generation, JobName, Term, WorkerId
from dtrain.worker.agent import Agent
from dtrain.worker.core.actions import JournalEntry
from dtrain.worker.core.inputs import CommandReceived, Noop
from dtrain.worker.core.snapshots import project
from dtrain.worker.core.states import CommandStage, NodeState

DEADLINE_S = 20.0


class SlowJournal:
    """Its disk takes until it is told to go on."""

    def __init__(self) -> None:
        self.writing, self.go_on = threading.Event(), threading.Event()

    def write(self, entries: Iterable[JournalEntry]) -> None:
        self.writing.set()
        assert self.go_on.wait(DEADLINE_S)


def test_a_snapshot_that_is_sent_while_the_journal_is_written_tells_the_state_before() -> None:
    journal, acted = SlowJournal(), asyncio.Event()
    agent = object.__new__(Agent)  # its loop alone: no etcd, no coordinator
    agent._state = NodeState(worker=WorkerId("w1"), slots=1, fence_after_s=60.0)
    agent._journal = journal  # type: ignore[assignment]
    agent._shells = SimpleNamespace(send_snapshot=acted.set)  # type: ignore[assignment]

    async def play() -> None:
        agent._inputs = asyncio.Queue()
        turns = asyncio.create_task(agent._turns())
        agent._emit(
            CommandReceived(
                term=Term(1), id="noop", job=JobName(""), generation=Generation(0), position=None, body=Noop()
            )
        )
        assert await asyncio.to_thread(journal.writing.wait, DEADLINE_S)
        assert project(agent._state).commands == () and not acted.is_set()
        journal.go_on.set()
        async with asyncio.timeout(DEADLINE_S):
            await acted.wait()
        assert [command.stage for command in project(agent._state).commands] == [CommandStage.DONE]
        turns.cancel()

    asyncio.run(play())
