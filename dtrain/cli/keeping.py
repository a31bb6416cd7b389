"""Verbs about what is kept: which checkpoints there are, which must stay, and whether storage still has them."""

import asyncio
from typing import TYPE_CHECKING

import click

from dtrain.cli.options import cluster_options, output_option

if TYPE_CHECKING:
    from dtrain.cli.output import Json
    from dtrain.cli.verification import Verdict
    from dtrain.common.names import JobName
    from dtrain.coordinator.core.states import CommittedCheckpoint, JobState
    from dtrain.etcd.client import EtcdClient

EXIT_DAMAGED = 1
CHECKPOINT_MAX = 999_999  # a number of six digits

checkpoint_argument = click.argument("checkpoint", type=click.IntRange(1, CHECKPOINT_MAX))


@click.command("checkpoints")
@click.argument("job")
@cluster_options
@output_option
def checkpoints_command(job: str, etcd: str | None, prefix: str, data_dir: str, output: str) -> None:
    """Show the committed checkpoints of a job, and which of them are kept."""
    from dtrain.cli.statuses import read_log
    from dtrain.cli.verification import read_state
    from dtrain.common.names import job_name

    name = job_name(job)

    async def read(client: "EtcdClient", prefix: str) -> None:
        _print_checkpoints(await read_state(client, prefix, name), output)

    asyncio.run(read_log(etcd, prefix, data_dir, read))


@click.command("pin")
@click.argument("job")
@checkpoint_argument
@cluster_options
def pin_command(job: str, checkpoint: int, etcd: str | None, prefix: str, data_dir: str) -> None:
    """Keep a checkpoint whatever the job's --keep options say."""
    asyncio.run(_pin(job, checkpoint, etcd, prefix, data_dir, pinned=True))
    click.echo(f"checkpoint {checkpoint} of job {job} is kept until you unpin it")


@click.command("unpin")
@click.argument("job")
@checkpoint_argument
@cluster_options
def unpin_command(job: str, checkpoint: int, etcd: str | None, prefix: str, data_dir: str) -> None:
    """Let a pinned checkpoint go: the job's --keep options decide about it again."""
    asyncio.run(_pin(job, checkpoint, etcd, prefix, data_dir, pinned=False))
    click.echo(f"checkpoint {checkpoint} of job {job} is not pinned any more")


async def _pin(job: str, checkpoint: int, etcd: str | None, prefix: str, data_dir: str, *, pinned: bool) -> None:
    from dtrain.cli.clients import connect, require_cluster
    from dtrain.common.names import job_name

    async with connect(require_cluster(etcd, prefix, data_dir)) as coordinator:
        await coordinator.pin(job_name(job), checkpoint, pinned=pinned)


@click.command("verify")
@click.argument("job")
@click.option(
    "--deep", is_flag=True, help="Read every byte and compare every digest; what is damaged is not used again."
)
@cluster_options
@output_option
def verify_command(job: str, deep: bool, etcd: str | None, prefix: str, data_dir: str, output: str) -> int:
    """Look whether storage still holds a job's committed checkpoints. Exit code 1 if one is damaged.

    Without --deep manifests and indexes are read, and of shards and packs only the sizes.
    """
    from dtrain.cli.output import print_json
    from dtrain.cli.verification import verify_job
    from dtrain.common.names import job_name

    state, verdicts = asyncio.run(verify_job(etcd, prefix, data_dir, job_name(job), deep=deep))
    if output == "json":
        print_json([verdict_view(verdict) for verdict in verdicts])
    else:
        _print_verdicts(state, verdicts)
    return 0 if all(verdict.sound for verdict in verdicts) else EXIT_DAMAGED


def verdict_view(verdict: "Verdict") -> "dict[str, Json]":
    """What was found of one checkpoint."""
    damage = [*verdict.damage, *([verdict.marker] if verdict.marker is not None else [])]
    return {
        "checkpoint": verdict.checkpoint.number,
        "step": verdict.checkpoint.step,
        "sound": verdict.sound,
        "deep": verdict.deep,
        "damage": [{"key": finding.key, "why": finding.why} for finding in damage],
        "recorded": verdict.recorded,
    }


def _print_verdicts(state: "JobState", verdicts: "list[Verdict]") -> None:
    from dtrain.cli.output import words_of_bytes

    if not verdicts:
        click.echo(f"job {state.name} has no checkpoint to restore from")
    for verdict in verdicts:
        checkpoint = verdict.checkpoint
        name = f"checkpoint {checkpoint.number} of step {checkpoint.step}"
        if verdict.sound:
            looked = "every byte is as recorded" if verdict.deep else "all there, sizes as recorded"
            click.echo(f"{name}: sound, {words_of_bytes(checkpoint.size_bytes)}, {looked}")
        for finding in verdict.damage:
            click.echo(f"{name}: damaged: {finding.key}: {finding.why}")
        if verdict.marker is not None:
            click.echo(f"{name}: its commit marker is damaged: {verdict.marker.key}: {verdict.marker.why}")
        if verdict.damage:
            click.echo(f"{name}: {_consequence(verdict)}")


def _consequence(verdict: "Verdict") -> str:
    if verdict.recorded:
        return "never restored from again"
    if verdict.deep:
        return "no coordinator runs here that could record it; a run that meets the damage goes back to the one before"
    return "verify --deep records it, so that no run tries it"


def state_of(checkpoint: "CommittedCheckpoint", wanted: "set[int]") -> str:
    """What is to become of a checkpoint, in one word."""
    if checkpoint.expired:
        return "expired"
    if checkpoint.quarantined:
        return "quarantined"
    if checkpoint.pinned:
        return "pinned"
    return "kept" if checkpoint.number in wanted else "unwanted"


def checkpoint_view(job: "JobName", checkpoint: "CommittedCheckpoint", wanted: "set[int]") -> "dict[str, Json]":
    """One committed checkpoint."""
    return {
        "checkpoint": checkpoint.number,
        "step": checkpoint.step,
        "state": state_of(checkpoint, wanted),
        "generation": checkpoint.generation,
        "attempt": checkpoint.attempt,
        "world_size": checkpoint.world_size,
        "size_bytes": checkpoint.size_bytes,
        "uploaded_bytes": checkpoint.uploaded_bytes(job),
        "time": checkpoint.time,
        "marked": checkpoint.marked,
        "quarantined": checkpoint.quarantined or None,
        "pinned": checkpoint.pinned,
        "expired": checkpoint.expired,
        "manifest": checkpoint.manifest_key,
        "shards": [
            {"rank": shard.rank, "key": shard.key, "size_bytes": shard.size_bytes, "digest": shard.digest}
            for shard in checkpoint.shards
        ],
        "packs": [{"key": pack.key, "size_bytes": pack.size_bytes} for pack in sorted(checkpoint.packs)],
    }


def _print_checkpoints(state: "JobState", output: str) -> None:
    from dtrain.cli.output import print_json, print_table, words_of_bytes, words_of_time
    from dtrain.coordinator.core.retention import kept

    checkpoints = [state.committed[number] for number in sorted(state.committed)]
    wanted = {int(number) for number in kept(state.spec.retention, checkpoints)}
    if output == "json":
        print_json([checkpoint_view(state.name, checkpoint, wanted) for checkpoint in checkpoints])
        return
    print_table(
        ("CHECKPOINT", "STEP", "GENERATION", "RANKS", "SIZE", "UPLOADED", "COMMITTED", "STATE", "NOTE"),
        (
            (
                str(checkpoint.number),
                str(checkpoint.step),
                str(checkpoint.generation),
                str(checkpoint.world_size),
                words_of_bytes(checkpoint.size_bytes),
                words_of_bytes(checkpoint.uploaded_bytes(state.name)),
                words_of_time(checkpoint.time),
                state_of(checkpoint, wanted),
                f"not used again: {checkpoint.quarantined}" if checkpoint.quarantined else "",
            )
            for checkpoint in checkpoints
        ),
        empty="no committed checkpoints yet",
    )
