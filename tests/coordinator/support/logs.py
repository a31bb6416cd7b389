"""Leaderships and entries for tests of the event log on a real etcd."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from dtrain.common.names import JobName
from dtrain.coordinator import codec
from dtrain.coordinator.codec import Entry
from dtrain.coordinator.core.events import CancelRequested, Cause, Decision, Event, JobCancelled, JobSubmitted
from dtrain.coordinator.election import LeaderRecord, Leadership, campaign, this_process
from dtrain.etcd.client import EtcdClient
from tests.coordinator.support.clusters import PREFIX, WALL_START_S, spec
from tests.support.etcd_server import EtcdServer

DEADLINE_S = 30.0


def leader_record(name: str = "test") -> LeaderRecord:
    return LeaderRecord(id=name, address="127.0.0.1:1", started=WALL_START_S, process=this_process())


def with_client(etcd: EtcdServer, body: Callable[[EtcdClient], Awaitable[None]]) -> None:
    """Do this with a client of the etcd."""

    async def run() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            await body(client)

    asyncio.run(run())


@contextlib.asynccontextmanager
async def leading(client: EtcdClient) -> AsyncIterator[Leadership]:
    """Win the election and give it back at the end."""
    async with asyncio.timeout(DEADLINE_S):
        leadership = await campaign(client, PREFIX, leader_record())
    try:
        yield leadership
    finally:
        await leadership.resign()


def entries(
    term: int, events: Sequence[Event], *, job: str = "mnist", after: Entry | None = None, detail: str = ""
) -> list[Entry]:
    """These events as the next entries of a job's log."""
    made: list[Entry] = []
    for event in events:
        made.append(
            codec.record(
                Decision(event=event, cause=Cause(fact="test", detail=detail)),
                prefix=PREFIX,
                job=JobName(job),
                seq=1 if after is None else after.record.seq + 1,
                term=term,
                time_s=WALL_START_S,
                prev=codec.GENESIS_DIGEST if after is None else after.record.digest,
            )
        )
        after = made[-1]
    return made


def story(runs: int, *, job: str = "mnist") -> list[Event]:
    """A legal log of this many cancelled runs: three events each."""
    told: list[Event] = []
    for run in range(1, runs + 1):
        told += [JobSubmitted(spec=spec(job), run=run, request=f"r{run}"), CancelRequested(), JobCancelled()]
    return told
