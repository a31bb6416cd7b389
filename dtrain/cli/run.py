"""``run`` and ``submit``: hand a job over, and for ``run`` stay with it until it ends.

With a cluster, ``run`` is a submission and a long look: leaving early leaves the job running. Without one,
it brings up a cluster of its own in a data folder and takes it down again; the folder keeps the log and the
checkpoints, so the same name goes on where it stopped.
"""

import asyncio
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dtrain.cli.job_specs import DEFAULT_EVERY_S, DEFAULT_MAX_RESTARTS, Asked, build_spec
from dtrain.cli.options import (
    EITHER_DASH,
    cluster_options,
    etcd_option,
    output_option,
    prefix_option,
    upload_cap_option,
)
from dtrain.common.errors import UserError

if TYPE_CHECKING:
    from dtrain.common.specs import JobSpec
    from dtrain.proto import agent_pb2 as wire

Command = TypeVar("Command", bound=Callable[..., Any])

# Everything behind the script belongs to the script, options included.
_SETTINGS: dict[str, Any] = {**EITHER_DASH, "allow_interspersed_args": False}

KEEP_MAX = 999_999  # checkpoints of a job have six digits
STEP_MAX = 2**40 - 1  # what a request to a trainer has room for
_KEEP_OPTIONS = (
    click.option(
        "--keep-last",
        type=click.IntRange(0, KEEP_MAX),
        default=0,
        metavar="N",
        help="Keep only the N newest checkpoints, pinned ones, and what else is to be kept. Default: keep all.",
    ),
    click.option(
        "--keep-every-steps",
        type=click.IntRange(0, STEP_MAX),
        default=0,
        metavar="N",
        help="With --keep-last: keep those of every multiple of N steps too.",
    ),
    click.option(
        "--keep-every-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="With --keep-last: keep the first of every S seconds too.",
    ),
)


def job_options(command: Command) -> Command:
    """The options that describe a job, the same for ``run`` and ``submit``."""
    for decorate in reversed(
        (
            click.argument("script", metavar="SCRIPT.py"),
            click.argument("args", nargs=-1, type=click.UNPROCESSED),
            click.option("--name", envvar="DTRAIN_NAME", help="Name of the job. Default: the script's, and a suffix."),
            click.option("--nnodes", default="1", show_default=True, metavar="N|MIN:MAX", help="How many nodes."),
            click.option(
                "--nproc-per-node",
                default="1",
                show_default=True,
                metavar="N|auto|cpu|gpu",
                help="Ranks on each node.",
            ),
            click.option(
                "--max-restarts",
                type=int,
                default=DEFAULT_MAX_RESTARTS,
                show_default=True,
                help="How many failures of its own the job survives; lost machines are not counted.",
            ),
            click.option(
                "--restart-window",
                type=float,
                default=0.0,
                metavar="S",
                help="Count --max-restarts over the last S seconds. Default: over the whole run.",
            ),
            click.option(
                "--store",
                envvar="DTRAIN_STORE",
                metavar="URI",
                help="Where checkpoints go: file:///folder, or s3://bucket/prefix?endpoint=URL.",
            ),
            click.option("--every-steps", type=int, metavar="N", help="A checkpoint every N steps."),
            click.option(
                "--every-seconds",
                type=float,
                metavar="S",
                help=f"A checkpoint every S seconds. Default: {DEFAULT_EVERY_S:g}, where there is a store.",
            ),
            *_KEEP_OPTIONS,
            click.option(
                "--hang-timeout",
                default="auto",
                show_default=True,
                metavar="S|auto|off",
                help="Restart the ranks when none completed a step for S seconds. auto: ten times the longest step, "
                "300 s at least.",
            ),
            click.option(
                "--env", multiple=True, metavar="K=V", help="Set a variable for the script; K alone hands it on."
            ),
            click.option(
                "--python", envvar="DTRAIN_PYTHON", default=sys.executable, help="Interpreter. Default: dtrain's own."
            ),
            click.option(
                "--no-python",
                is_flag=True,
                help="Run SCRIPT as a program of its own, without an interpreter before it.",
            ),
        )
    ):
        command = decorate(command)
    return command


@click.command("run", context_settings=_SETTINGS)
@job_options
@click.option("--slots", type=int, help="Room for ranks on each local worker. Default: as many as it needs.")
@upload_cap_option
@cluster_options
def run_command(
    etcd: str | None,
    prefix: str,
    data_dir: str,
    slots: int | None,
    upload_mib_per_s: float | None,
    **options: Any,
) -> int:
    """Run a training script and wait for its end.

    With --etcd the job runs on that cluster. Without, this machine is the cluster: etcd, a coordinator and the
    workers are started in the data folder, and stopped again at the end. What the ranks print comes to stdout,
    what dtrain says to stderr; the exit code is the job's.

    Running the same --name again after a crash or Ctrl-C continues from its newest committed checkpoint.
    """
    from dtrain.cli.launches import run_here, run_on_cluster

    asked = Asked(**options)
    if etcd:
        from dtrain.cli.clients import Address, parse_endpoints

        spec = build_spec(asked, default_store="")
        return asyncio.run(run_on_cluster(Address(etcd=parse_endpoints(etcd), prefix=prefix), spec))
    from dtrain.common.scripts import names_torch
    from dtrain.standalone.cluster import UNSURE_AFTER_S, LocalPlan
    from dtrain.standalone.data_folder import DataFolder

    if not asked.no_python and shutil.which(asked.python) is None:
        raise UserError(f"interpreter {asked.python} not found: give --python a program that can be run here.")
    folder = DataFolder.at(data_dir)
    spec = build_spec(asked, default_store=folder.store.as_uri())
    plan = LocalPlan(
        workers=spec.nnodes_max,
        slots=slots_for(spec, slots),
        prefix=prefix,
        upload_mib_per_s=upload_mib_per_s,
        zygote_after_s=0.0 if names_torch(Path(spec.cwd, spec.script)) else UNSURE_AFTER_S,
    )
    return asyncio.run(run_here(folder, spec, plan))


@click.command("submit", context_settings=_SETTINGS)
@job_options
@etcd_option(required=True)
@prefix_option
@output_option
def submit_command(etcd: str, prefix: str, output: str, **options: Any) -> None:
    """Hand a job to a cluster and return at once."""
    from dtrain.cli.clients import Address, connect, parse_endpoints
    from dtrain.cli.output import print_json

    spec = build_spec(Asked(**options), default_store="")

    async def submit() -> None:
        async with connect(Address(etcd=parse_endpoints(etcd), prefix=prefix)) as coordinator:
            reply = await coordinator.submit(submission(spec, takes_over=False))
        if output == "json":
            print_json({"job": spec.name, "run": reply.run, "resumes_step": reply.resumes_step})
        else:
            click.echo(submitted_words(spec, reply))

    asyncio.run(submit())


def slots_for(spec: "JobSpec", slots: int | None) -> int:
    """Slots of each local worker: what was asked for, if the job fits."""
    if slots is None:
        return spec.nproc_per_node
    if slots < spec.nproc_per_node:
        raise UserError(
            f"nproc-per-node {spec.nproc_per_node} is more than a worker's slots ({slots}): "
            "lower --nproc-per-node, or raise --slots."
        )
    return slots


def submission(spec: "JobSpec", *, takes_over: bool) -> "wire.SubmitRequest":
    """The request for one new run of a job."""
    from dtrain.proto import agent_pb2 as wire

    return wire.SubmitRequest(
        spec=wire.Spec(
            name=spec.name,
            python=spec.python,
            script=spec.script,
            args=spec.args,
            cwd=spec.cwd,
            env=spec.env,
            nnodes_min=spec.nnodes_min,
            nnodes_max=spec.nnodes_max,
            nproc_per_node=spec.nproc_per_node,
            max_restarts=spec.max_restarts,
            restart_window_s=spec.restart_window_s,
            store=spec.store,
            every_steps=spec.checkpoints.every_steps,
            every_seconds=spec.checkpoints.every_seconds,
            keep_last=spec.retention.keep_last,
            keep_every_steps=spec.retention.keep_every_steps,
            keep_every_seconds=spec.retention.keep_every_seconds,
            hang_timeout_s=spec.hang_timeout_s,
            no_python=spec.no_python,
        ),
        request=secrets.token_hex(8),
        takes_over=takes_over,
    )


def submitted_words(spec: "JobSpec", reply: "wire.SubmitReply") -> str:
    words = f"job {spec.name} submitted"
    if reply.run > 1:
        start = f"continues from step {reply.resumes_step}" if reply.resumes_step else "starts again from step 0"
        words += f": run {reply.run} {start}"
    return words if spec.store else f"{words}; without --store nothing is saved, and every failure begins at step 0"
