"""``logs``: what the ranks printed, from the workers that keep it."""

import asyncio
import json

import click

from dtrain.cli.options import cluster_options, output_option


@click.command("logs")
@click.argument("job")
@click.option("--rank", type=click.IntRange(min=0), help="This rank only. Default: all.")
@click.option("-f", "--follow", is_flag=True, help="Go on with lines as they are printed.")
@cluster_options
@output_option
def logs_command(
    job: str, rank: int | None, follow: bool, etcd: str | None, prefix: str, data_dir: str, output: str
) -> None:
    """Show what the ranks of a job printed. With -o json, one object with rank and line, per line."""
    from dtrain.cli.clients import connect_etcd, require_cluster
    from dtrain.cli.history import require_job
    from dtrain.cli.log_streams import LogStream
    from dtrain.cli.progress import with_rank
    from dtrain.common.names import job_name
    from dtrain.coordinator.history import read_history

    name = job_name(job)

    def show(of_rank: int, line: str) -> None:
        click.echo(json.dumps({"rank": of_rank, "line": line}) if output == "json" else with_rank(of_rank, line))

    async def read() -> None:
        address = require_cluster(etcd, prefix, data_dir)
        async with connect_etcd(address) as client:
            require_job(await read_history(client, address.prefix, name), name)
            stream = LogStream(client, address.prefix, name, show=show, rank=rank)
            await (stream.follow() if follow else stream.drain(everything=True))

    asyncio.run(read())
