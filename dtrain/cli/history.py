"""The verb that shows a job's event log straight from etcd: it works with no coordinator, and with no cluster.

With ``-o json`` it prints one event a line, as they come.
"""

import asyncio
import json
from typing import TYPE_CHECKING

import click

from dtrain.cli.options import cluster_options, output_option

if TYPE_CHECKING:
    from dtrain.cli.output import Json
    from dtrain.coordinator.core.events import RecordedEvent
    from dtrain.etcd.client import EtcdClient


@click.command("history")
@click.argument("job")
@click.option(
    "-f", "--follow", is_flag=True, help="Go on with events as they happen, until Ctrl-C or the end of a local run."
)
@cluster_options
@output_option
def history_command(job: str, follow: bool, etcd: str | None, prefix: str, data_dir: str, output: str) -> None:
    """Show every decision about a job, and its cause. The chain of events is verified on the way."""
    from dtrain.cli.statuses import read_log
    from dtrain.common.names import job_name

    name = job_name(job)
    show = _print_json if output == "json" else _print_words

    async def read(client: "EtcdClient", prefix: str) -> None:
        from dtrain.cli.attending import while_active
        from dtrain.coordinator.history import follow_history, read_history
        from dtrain.standalone.data_folder import DataFolder

        if not follow:
            events = await read_history(client, prefix, name)
            require_job(events, name)
            for event in events:
                show(event)
            return

        async def follow_on() -> None:
            async for event in follow_history(client, prefix, name):
                show(event)

        await while_active(None if etcd else DataFolder.at(data_dir), follow_on())

    asyncio.run(read_log(etcd, prefix, data_dir, read))


def require_job(events: "list[RecordedEvent]", job: str) -> None:
    from dtrain.common.errors import UserError

    if not events:
        raise UserError(f"there is no job named {job!r}: see the names with: dtrain list")


def _print_words(event: "RecordedEvent") -> None:
    from dtrain.cli.event_words import describe, describe_cause
    from dtrain.cli.output import indented, words_of_time

    click.echo(f"{event.seq:>4}  {words_of_time(event.time)}  {describe(event.event)}")
    click.echo(click.style(f"{'':27}because: {describe_cause(event.cause)} (term {event.term})", dim=True))
    if event.cause.traceback:
        click.echo(click.style(indented(event.cause.traceback), dim=True))


def _print_json(event: "RecordedEvent") -> None:
    click.echo(json.dumps(event_view(event)))


def event_view(event: "RecordedEvent") -> "dict[str, Json]":
    """One event; the same fields as its value in etcd but for `prev`, and its key."""
    import msgspec

    return {
        "seq": event.seq,
        "term": event.term,
        "time": event.time,
        "type": event.type,
        "data": msgspec.to_builtins(event.event),
        "cause": msgspec.to_builtins(event.cause),
        "key": event.key,
    }
