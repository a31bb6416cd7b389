"""Verbs that ask the coordinator about jobs, or ask it to do something to one.

``list`` and ``status`` also answer where nothing runs: they read a data folder's log then.
"""

import asyncio
import secrets
from collections.abc import Callable

import click

from dtrain.cli.options import cluster_options, output_option

CANCEL_TIMEOUT_S = 60.0  # a worker gives trainers 5 s; a node that is cut off is given up within its lease
CHECKPOINT_TIMEOUT_S = 600.0  # an upload of many GiB takes minutes


def timeout_option(default_s: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--timeout", "timeout_s", type=float, default=default_s, show_default=True, help="Seconds to wait at most."
    )


@click.command("list")
@cluster_options
@output_option
def list_command(etcd: str | None, prefix: str, data_dir: str, output: str) -> None:
    """Show all jobs."""
    from dtrain.cli.output import job_view, print_jobs, print_json
    from dtrain.cli.statuses import read_statuses

    jobs = asyncio.run(read_statuses(etcd, prefix, data_dir, job=""))
    print_json([job_view(job) for job in jobs]) if output == "json" else print_jobs(jobs)


@click.command("status")
@click.argument("job")
@cluster_options
@output_option
def status_command(job: str, etcd: str | None, prefix: str, data_dir: str, output: str) -> None:
    """Show one job: its ranks, their steps and metrics, its checkpoints, and what it waits for."""
    from dtrain.cli.output import job_view, print_job, print_json
    from dtrain.cli.statuses import read_statuses
    from dtrain.common.names import job_name

    found = asyncio.run(read_statuses(etcd, prefix, data_dir, job=job_name(job)))
    for status in found:
        print_json(job_view(status)) if output == "json" else print_job(status)


@click.command("workers")
@cluster_options
@output_option
def workers_command(etcd: str | None, prefix: str, data_dir: str, output: str) -> None:
    """Show the workers of the cluster."""
    from dtrain.cli.clients import connect, require_cluster
    from dtrain.cli.output import print_json, print_workers, worker_view

    async def ask() -> None:
        async with connect(require_cluster(etcd, prefix, data_dir)) as coordinator:
            workers = await coordinator.workers()
        print_json([worker_view(worker) for worker in workers]) if output == "json" else print_workers(workers)

    asyncio.run(ask())


@click.command("cancel")
@click.argument("job")
@timeout_option(CANCEL_TIMEOUT_S)
@cluster_options
@output_option
def cancel_command(job: str, timeout_s: float, etcd: str | None, prefix: str, data_dir: str, output: str) -> None:
    """End a job and wait until it has ended. Its committed checkpoints stay."""
    from dtrain.cli.clients import require_cluster
    from dtrain.cli.output import job_view, print_json
    from dtrain.cli.statuses import status_of_log
    from dtrain.cli.waits import cancel_and_wait
    from dtrain.common.names import job_name

    ended = asyncio.run(cancel_and_wait(require_cluster(etcd, prefix, data_dir), job_name(job), timeout_s))
    if output == "json":
        print_json(job_view(status_of_log(ended)))
    else:
        click.echo(f"job {job} is {ended.phase}")


@click.command("checkpoint")
@click.argument("job")
@timeout_option(CHECKPOINT_TIMEOUT_S)
@cluster_options
@output_option
def checkpoint_command(job: str, timeout_s: float, etcd: str | None, prefix: str, data_dir: str, output: str) -> None:
    """Take a checkpoint now and wait until it is committed."""
    from dtrain.cli.clients import require_cluster
    from dtrain.cli.output import print_json
    from dtrain.cli.waits import wait_for_checkpoint
    from dtrain.common.names import job_name

    async def take() -> None:
        address = require_cluster(etcd, prefix, data_dir)
        taken = await wait_for_checkpoint(address, job_name(job), secrets.token_hex(8), timeout_s)
        if output == "json":
            print_json({"job": job, "checkpoint": taken.checkpoint, "attempt": taken.attempt, "step": taken.step})
        else:
            click.echo(f"checkpoint {taken.checkpoint} of step {taken.step} is committed")

    asyncio.run(take())
