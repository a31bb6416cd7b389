"""The long-running verbs: one per role of a cluster, in the foreground, as service managers like it.

They log to stderr, end in order on SIGTERM or Ctrl-C, and are safe to kill and to start again at any time.
"""

import asyncio
import logging
import os
import shlex
import socket
import subprocess
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path

import click

from dtrain.cli.main import EXIT_FAILED
from dtrain.cli.options import DEFAULT_DATA_DIR, data_dir_option, etcd_option, prefix_option, upload_cap_option

ETCD_WAIT_S = 10.0  # an etcd that is just starting beside us


def etcd_wait_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--etcd-wait",
        "etcd_wait_s",
        type=click.FloatRange(min=0.0),
        envvar="DTRAIN_ETCD_WAIT",
        default=ETCD_WAIT_S,
        show_default=True,
        help="Seconds to wait for etcd to answer at the start.",
    )(command)


@click.command("coordinator")
@etcd_option(required=True)
@prefix_option
@click.option(
    "--listen",
    envvar="DTRAIN_LISTEN",
    metavar="HOST:PORT",
    default="127.0.0.1:0",
    show_default=True,
    help="Where workers and people reach it; port 0 takes a free one.",
)
@click.option("--advertise", envvar="DTRAIN_ADVERTISE", default="", metavar="HOST", help="Name others reach it by.")
@click.option("--identity", envvar="DTRAIN_IDENTITY", default="", help="Its name, for people. Default: its address.")
@etcd_wait_option
def coordinator_command(etcd: str, prefix: str, listen: str, advertise: str, identity: str, etcd_wait_s: float) -> int:
    """Serve as a coordinator. Start two or more: one leads, the others take over when it dies."""
    from dtrain.cli.clients import parse_endpoints, probe_etcd
    from dtrain.common import failpoints
    from dtrain.coordinator.service import CoordinatorConfig, serve
    from dtrain.etcd.probes import known_lossy

    _log_to_stderr()
    failpoints.arm(os.environ)
    config = CoordinatorConfig(
        etcd=parse_endpoints(etcd), listen=listen, prefix=prefix, identity=identity, advertise=advertise
    )

    async def run() -> int:
        version = await probe_etcd(config.etcd, wait_s=etcd_wait_s)
        if warning := known_lossy(version):
            logging.getLogger(__name__).warning(warning)
        return await serve(config)

    return _serving(run())


@click.command("worker")
@etcd_option(required=True)
@prefix_option
@click.option("--worker-id", envvar="DTRAIN_WORKER_ID", help="Its name in the cluster. Default: this host's name.")
@click.option(
    "--slots",
    envvar="DTRAIN_SLOTS",
    type=int,
    help="Room for ranks. Default: one a GPU, or without any one a processor.",
)
@click.option(
    "--data-dir",
    envvar="DTRAIN_DATA_DIR",
    type=click.Path(file_okay=False),
    default=f"{DEFAULT_DATA_DIR}/worker",
    show_default=True,
    help="Its journal and the ranks' logs; must outlive restarts.",
)
@click.option(
    "--listen",
    envvar="DTRAIN_LISTEN",
    metavar="HOST:PORT",
    default="127.0.0.1:0",
    show_default=True,
    help="Where logs are served; port 0 takes a free one.",
)
@click.option("--advertise", envvar="DTRAIN_ADVERTISE", default="", metavar="HOST", help="Name others reach it by.")
@click.option(
    "--orphan-after",
    "orphan_after_s",
    type=click.FloatRange(min=0.0),
    envvar="DTRAIN_ORPHAN_AFTER",
    help="Seconds after which ranks without their agent end themselves.",
)
@click.option(
    "--lease-ttl",
    "lease_ttl_s",
    type=float,
    envvar="DTRAIN_LEASE_TTL",
    help="Seconds after which a node that says nothing is given up, about. Default: 5.",
)
@click.option(
    "--zygote/--no-zygote",
    envvar="DTRAIN_ZYGOTE",
    default=True,
    show_default=True,
    help="Fork ranks from a warm process that has imported torch.",
)
@click.option(
    "--zygote-after",
    "zygote_after_s",
    type=click.FloatRange(min=0.0),
    envvar="DTRAIN_ZYGOTE_AFTER",
    default=0.0,
    show_default=True,
    help="Seconds from the worker's start until that process begins to import.",
)
@upload_cap_option
@etcd_wait_option
def worker_command(
    etcd: str,
    prefix: str,
    worker_id: str | None,
    slots: int | None,
    data_dir: str,
    listen: str,
    advertise: str,
    orphan_after_s: float | None,
    lease_ttl_s: float | None,
    zygote: bool,
    zygote_after_s: float,
    upload_mib_per_s: float | None,
    etcd_wait_s: float,
) -> int:
    """Serve as the worker agent of this node; one per node. Ranks survive its restart."""
    from dtrain.cli.clients import parse_endpoints, probe_etcd
    from dtrain.common import failpoints, names
    from dtrain.worker.agent import serve
    from dtrain.worker.config import WorkerConfig, default_slots

    _log_to_stderr()
    failpoints.arm(os.environ)
    config = WorkerConfig(
        etcd=parse_endpoints(etcd),
        prefix=prefix,
        worker_id=names.worker_id(worker_id or default_worker_id(socket.gethostname())),
        slots=slots if slots is not None else default_slots(),
        data_dir=Path(data_dir).expanduser().absolute(),
        listen=listen,
        advertise=advertise,
        zygote=zygote,
        zygote_after_s=zygote_after_s,
        upload_mib_per_s=upload_mib_per_s,
    )
    if orphan_after_s is not None:
        config = replace(config, orphan_after_s=orphan_after_s)
    if lease_ttl_s is not None:
        config = replace(config, lease_ttl_s=lease_ttl_s)

    async def run() -> int:
        await probe_etcd(config.etcd, wait_s=etcd_wait_s)
        return await serve(config)

    return _serving(run())


def default_worker_id(host: str) -> str:
    """A host's name as a worker id: lower case, and only its first label's worth of odd characters replaced."""
    return "".join(char if char.isalnum() or char in "-._" else "-" for char in host.lower()).strip("-._") or "worker"


@click.command("etcd", context_settings={"allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ETCDCTL ARGUMENTS]...")
@data_dir_option
def etcd_command(arguments: tuple[str, ...], data_dir: str) -> int:
    """Look into the etcd of a data folder with etcdctl.

    With arguments, etcdctl is run with them once: dtrain etcd get --prefix /dtrain/jobs/ --keys-only.
    Without, etcd is served until Ctrl-C, and the command that reaches it is printed.
    """
    from dtrain.cli.interrupts import Interrupted, interruptible
    from dtrain.cli.options import DEFAULT_PREFIX
    from dtrain.common.errors import UserError
    from dtrain.standalone.cluster import with_etcd_of
    from dtrain.standalone.data_folder import DataFolder, Endpoints

    folder = DataFolder.at(data_dir)
    if not folder.has_history():
        raise UserError(f"nothing has run in data folder {folder.root} yet: give --data-dir of an earlier run.")

    async def look(endpoint: str) -> int:
        return (await asyncio.to_thread(subprocess.run, etcdctl(endpoint, arguments), check=False)).returncode

    async def serve(endpoint: str) -> int:
        folder.publish(Endpoints(etcd=endpoint, prefix=DEFAULT_PREFIX, pid=os.getpid()))
        try:
            click.echo(f"etcd of {folder.root} listens on {endpoint}; Ctrl-C ends it. Look with:")
            click.echo(f"  {shlex.join(etcdctl(endpoint, ('get', '--prefix', f'{DEFAULT_PREFIX}/')))}")
            await asyncio.Event().wait()
        finally:
            folder.withdraw()
        return 0

    async def run() -> int:
        active = folder.active()
        if active is not None and arguments:
            return await look(active.etcd)
        try:
            work = with_etcd_of(folder, look if arguments else serve)
            return await interruptible(work, first=lambda: None, hurry=lambda: None)
        except Interrupted:
            return 0

    return asyncio.run(run())


def etcdctl(endpoint: str, arguments: Sequence[str]) -> list[str]:
    """The etcdctl command that talks to ``endpoint``; it can be pasted."""
    from dtrain.etcd.binaries import find_etcdctl

    # `env` says it in one word list: version 3.4 and later default to API 3, 3.3 does not.
    return ["env", "ETCDCTL_API=3", str(find_etcdctl()), f"--endpoints={endpoint}", *arguments]


def _serving(service: Coroutine[object, object, int]) -> int:
    """Run a service to its end; return its exit code. An error of the system is told whole: nobody is there to ask."""
    try:
        return asyncio.run(service)
    except OSError:
        logging.getLogger(__name__).exception("ended by an error of the system")
        return EXIT_FAILED


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
