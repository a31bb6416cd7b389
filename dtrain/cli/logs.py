"""``logs``: what the ranks printed, from the workers that keep it, or from their folders after a run."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtrain.cli.options import cluster_options, output_option

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from dtrain.cli.log_streams import LogStream, Show
    from dtrain.coordinator.core.events import RecordedEvent
    from dtrain.standalone.data_folder import DataFolder


@click.command("logs")
@click.argument("job")
@click.option("--rank", type=click.IntRange(min=0), help="This rank only. Default: all.")
@click.option("-f", "--follow", is_flag=True, help="Go on with lines as they are printed, until the job ends.")
@cluster_options
@output_option
def logs_command(
    job: str, rank: int | None, follow: bool, etcd: str | None, prefix: str, data_dir: str, output: str
) -> None:
    """Show what the ranks of a job printed. With -o json, one object with rank and line, per line."""
    from dtrain.cli.attending import while_active
    from dtrain.cli.clients import active_cluster, connect_etcd
    from dtrain.cli.history import require_job
    from dtrain.cli.log_streams import LogStream
    from dtrain.cli.progress import with_rank
    from dtrain.common.names import job_name
    from dtrain.coordinator.history import follow_history, read_history
    from dtrain.standalone.data_folder import DataFolder

    name = job_name(job)

    def show(of_rank: int, line: str) -> None:
        click.echo(json.dumps({"rank": of_rank, "line": line}) if output == "json" else with_rank(of_rank, line))

    async def read() -> None:
        address = active_cluster(etcd, prefix, data_dir)
        if address is None:
            show_kept(DataFolder.at(data_dir), name, rank, show)
            return
        async with connect_etcd(address) as client:
            events = await read_history(client, address.prefix, name)
            require_job(events, name)
            _require_rank(events, name, rank)
            stream = LogStream(client, address.prefix, name, show=show, rank=rank)
            if follow:
                work = _follow_to_the_end(stream, follow_history(client, address.prefix, name), events[-1].seq)
                await while_active(None if etcd else DataFolder.at(data_dir), work)
            else:
                await stream.drain(everything=True)

    asyncio.run(read())


def _require_rank(events: "list[RecordedEvent]", job: str, rank: int | None) -> None:
    from dtrain.common.errors import UserError
    from dtrain.coordinator.core.events import GenerationStarted

    worlds = [each.event.world_size for each in events if isinstance(each.event, GenerationStarted)]
    if rank is not None and worlds and rank >= max(worlds):
        raise UserError(f"job {job} never had a rank {rank}: give --rank 0 to {max(worlds) - 1}.")


async def _follow_to_the_end(stream: "LogStream", events: "AsyncIterator[RecordedEvent]", known: int) -> None:
    """Show lines until the job's newest run has ended, and the rest of them."""
    from dtrain.cli.attending import until

    await until(_until_ended(events, known), stream.follow())
    await stream.drain()


async def _until_ended(events: "AsyncIterator[RecordedEvent]", known: int) -> None:
    """Return when the job has ended, going by the log from event ``known`` on."""
    from dtrain.coordinator.core.events import JobCancelled, JobFailed, JobSubmitted, JobSucceeded

    over = False
    async for each in events:
        if isinstance(each.event, JobSubmitted | JobSucceeded | JobFailed | JobCancelled):
            over = not isinstance(each.event, JobSubmitted)
        if over and each.seq >= known:
            return


def show_kept(folder: "DataFolder", job: str, rank: int | None, show: "Show") -> None:
    """Show what the workers of a data folder have kept of a job, where nothing runs any more."""
    from dtrain.common.errors import UserError

    wanted = "*" if rank is None else str(rank)
    logs = sorted(folder.root.glob(f"workers/*/logs/{job}/generation-*/rank-{wanted}.log"), key=_generation_and_rank)
    if not logs:
        raise UserError(
            f"no logs of job {job!r} are kept in data folder {folder.root}: "
            "give --etcd HOST:PORT of a cluster, or --data-dir of an earlier run."
        )
    for log in logs:
        with log.open(errors="replace") as lines:
            for line in lines:
                show(_generation_and_rank(log)[1], line.rstrip("\r\n").rpartition("\r")[2])


def _generation_and_rank(log: Path) -> tuple[int, int]:
    return int(log.parent.name.rpartition("-")[2]), int(log.stem.rpartition("-")[2])
