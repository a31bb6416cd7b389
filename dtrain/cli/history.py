"""Verbs that read a job's event log straight from etcd: they work with no coordinator, and with no cluster.

With ``-o json``, ``history`` prints one event a line, as they come; ``checkpoints`` prints one array.
"""

import asyncio
import json
from typing import TYPE_CHECKING

import click

from dtrain.cli.options import cluster_options, output_option

if TYPE_CHECKING:
    from dtrain.cli.output import Json
    from dtrain.coordinator.core.events import RecordedEvent
    from dtrain.coordinator.core.states import CommittedCheckpoint
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


@click.command("checkpoints")
@click.argument("job")
@cluster_options
@output_option
def checkpoints_command(job: str, etcd: str | None, prefix: str, data_dir: str, output: str) -> None:
    """Show the committed checkpoints of a job."""
    from dtrain.cli.statuses import read_log
    from dtrain.common.names import job_name

    name = job_name(job)

    async def read(client: "EtcdClient", prefix: str) -> None:
        from dtrain.coordinator.core.evolve import evolve
        from dtrain.coordinator.history import read_history

        events = await read_history(client, prefix, name)
        require_job(events, name)
        state = None
        for event in events:
            state = evolve(state, event)
        assert state is not None
        _print_checkpoints(list(state.committed.values()), output)

    asyncio.run(read_log(etcd, prefix, data_dir, read))


def require_job(events: "list[RecordedEvent]", job: str) -> None:
    from dtrain.common.errors import UserError

    if not events:
        raise UserError(f"there is no job named {job!r}: see the names with: dtrain list")


def _print_words(event: "RecordedEvent") -> None:
    from dtrain.cli.event_words import describe, describe_cause
    from dtrain.cli.output import words_of_time

    click.echo(f"{event.seq:>4}  {words_of_time(event.time)}  {describe(event.event)}")
    click.echo(click.style(f"{'':27}because: {describe_cause(event.cause)} (term {event.term})", dim=True))


def _print_json(event: "RecordedEvent") -> None:
    click.echo(json.dumps(event_view(event)))


def event_view(event: "RecordedEvent") -> "dict[str, Json]":
    """One event; the same fields as its value in etcd, and its key."""
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


def checkpoint_view(checkpoint: "CommittedCheckpoint") -> "dict[str, Json]":
    """One committed checkpoint."""
    return {
        "checkpoint": checkpoint.number,
        "step": checkpoint.step,
        "generation": checkpoint.generation,
        "attempt": checkpoint.attempt,
        "world_size": checkpoint.world_size,
        "size_bytes": checkpoint.size_bytes,
        "time": checkpoint.time,
        "marked": checkpoint.marked,
        "quarantined": checkpoint.quarantined or None,
        "manifest": checkpoint.manifest_key,
        "shards": [
            {"rank": shard.rank, "key": shard.key, "size_bytes": shard.size_bytes, "digest": shard.digest}
            for shard in checkpoint.shards
        ],
    }


def _print_checkpoints(checkpoints: "list[CommittedCheckpoint]", output: str) -> None:
    from dtrain.cli.output import print_json, print_table, words_of_bytes, words_of_time

    checkpoints = sorted(checkpoints, key=lambda checkpoint: checkpoint.number)
    if output == "json":
        print_json([checkpoint_view(checkpoint) for checkpoint in checkpoints])
        return
    print_table(
        ("CHECKPOINT", "STEP", "GENERATION", "RANKS", "SIZE", "COMMITTED", "NOTE"),
        (
            (
                str(checkpoint.number),
                str(checkpoint.step),
                str(checkpoint.generation),
                str(checkpoint.world_size),
                words_of_bytes(checkpoint.size_bytes),
                words_of_time(checkpoint.time),
                f"not used again: {checkpoint.quarantined}" if checkpoint.quarantined else "",
            )
            for checkpoint in checkpoints
        ),
        empty="no committed checkpoints yet",
    )
