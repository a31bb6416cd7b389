"""The verb that hands a checkpoint to programs that know nothing of dtrain."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtrain.cli.options import cluster_options

if TYPE_CHECKING:
    from dtrain.common.names import JobName
    from dtrain.coordinator.core.states import CommittedCheckpoint
    from dtrain.etcd.client import EtcdClient

READ_DEADLINE_S = 60.0  # for one read, all tries together: a person waits


@click.command("export")
@click.argument("job")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.IntRange(min=1), help="Which one; the newest sound one if not said.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["safetensors", "dcp"]),
    default="safetensors",
    show_default=True,
    help="A file of whole tensors, or a folder for torch.distributed.checkpoint's load().",
)
@cluster_options
def export_command(
    job: str, destination: Path, checkpoint: int | None, kind: str, etcd: str | None, prefix: str, data_dir: str
) -> None:
    """Write a checkpoint's whole tensors to DESTINATION, each verified, whatever sharding it was saved with."""
    from dtrain.cli.statuses import read_log
    from dtrain.common.errors import UserError
    from dtrain.common.names import job_name

    name = job_name(job)
    if destination.exists():
        raise UserError(f"{destination} is there already: name a new one.")
    found: list[CommittedCheckpoint] = []

    async def read(client: "EtcdClient", prefix: str) -> None:
        found.append(await _chosen(client, prefix, name, checkpoint))

    asyncio.run(read_log(etcd, prefix, data_dir, read))
    count = _export(found[-1], destination, kind)
    click.echo(f"checkpoint {found[-1].number} of step {found[-1].step}: {count} tensors written to {destination}")


async def _chosen(client: "EtcdClient", prefix: str, job: "JobName", number: int | None) -> "CommittedCheckpoint":
    from dtrain.cli.verification import read_state
    from dtrain.common.errors import UserError
    from dtrain.common.names import CheckpointNumber

    state = await read_state(client, prefix, job)
    newest = state.newest_restorable
    chosen = newest if number is None else state.committed.get(CheckpointNumber(number))
    if chosen is None or chosen.expired:
        which = "no checkpoint to export" if number is None else f"no checkpoint {number}"
        raise UserError(f"job {job} has {which}: see what there is with: dtrain checkpoints {job}")
    return chosen


def _export(checkpoint: "CommittedCheckpoint", destination: Path, kind: str) -> int:
    from dtrain.storage.patient import PatientStore
    from dtrain.storage.retrying import read_again_if_damaged
    from dtrain.storage.uris import open_store
    from dtrain.storage.verify import read_manifest
    from dtrain.trainer.exporting import export_dcp, export_safetensors

    store = PatientStore(open_store(checkpoint.store), deadline_s=READ_DEADLINE_S)
    manifest = read_again_if_damaged(lambda: read_manifest(store, checkpoint.manifest_key, checkpoint.manifest_digest))
    write = export_dcp if kind == "dcp" else export_safetensors
    return write(store, manifest, destination)
