"""How verbs answer: tables and sentences for people, JSON with stable fields for programs.

The JSON is built here and nowhere else, field by field, so that a change of a message never changes what a
program reads. Fields are only ever added. docs/cli.md lists them.
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dtrain.coordinator.core.events import Victim
    from dtrain.proto import agent_pb2 as wire

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


def print_json(value: Json) -> None:
    """One JSON document; indented where a person may be looking."""
    click.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """A table without lines, as kubectl prints them; ``empty`` is said when there is no row."""
    cells = [list(row) for row in rows]
    if not cells:
        click.echo(empty)
        return
    widths = [max(len(row[index]) for row in [list(columns), *cells]) for index in range(len(columns))]
    for row in [list(columns), *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def words_of_bytes(size_bytes: int) -> str:
    """A size as people say it: ``1.5 MiB``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def words_of_time(unix_s: float) -> str:
    """A moment as people read it, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def metrics_of(metrics_json: str) -> dict[str, Json]:
    """The metrics that a rank reported; empty if it reported none."""
    values = json.loads(metrics_json) if metrics_json else {}
    return values if isinstance(values, dict) else {}


def words_of_metrics(metrics: Mapping[str, Json]) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in metrics.items()
    )


def words_of_transfer(transfers: Sequence["wire.Transfer"]) -> str:
    """How far transfers are together: ``35 % of 1.2 GiB``; empty if there is none."""
    total = sum(transfer.bytes_total for transfer in transfers)
    if not total:
        return ""
    done = sum(min(transfer.bytes_done, transfer.bytes_total) for transfer in transfers)
    return f"{100 * done // total} % of {words_of_bytes(total)}"


def uploads_of(job: "wire.JobStatus") -> list["wire.Transfer"]:
    """The uploads of a job's ranks that are under way."""
    return [rank.report.upload for rank in job.ranks if rank.report.HasField("upload")]


def restores_of(job: "wire.JobStatus") -> list["wire.Transfer"]:
    """The restores of a job's workers that are under way."""
    return [restore.transfer for restore in job.restores]


def transfer_view(transfer: "wire.Transfer") -> dict[str, Json]:
    return {"bytes_done": transfer.bytes_done, "bytes_total": transfer.bytes_total}


def rank_view(rank: "wire.JobRank") -> dict[str, Json]:
    """One rank of a job."""
    report = rank.report
    exited = report.state == 2  # RankState.EXITED
    return {
        "rank": report.rank,
        "worker": rank.worker,
        "pid": report.pid,
        "state": ("pending", "running", "exited")[report.state],
        "phase": report.phase,
        "completed_step": report.completed_step,
        "until_step": report.until_step,
        "checkpointable": report.tracking,
        "step_s": report.step_s,
        "metrics": metrics_of(report.metrics_json),
        "exit_code": report.exit_code if exited and not report.exit_unknown else None,
        "error": report.error,
        "upload": transfer_view(report.upload) if report.HasField("upload") else None,
    }


def failure_view(failure: "wire.Failure") -> dict[str, Json]:
    """What a generation died of."""
    return {
        "generation": failure.generation,
        "time": failure.time,
        "kind": failure.kind,
        "reason": failure.reason,
        "traceback": failure.traceback,
        "victims": [
            {"rank": each.rank, "worker": each.worker, "exit_code": each.exit_code, "error": each.error}
            for each in failure.victims
        ],
    }


def words_of_victims(victims: "Iterable[Victim | wire.Victim]") -> str:
    """The ranks that a failure took along, for the end of the sentence that names it; empty if there are none."""
    named = [f"rank {victim.rank} on {victim.worker}" for victim in victims]
    return f"; its victims: {', '.join(named)}" if named else ""


def job_view(job: "wire.JobStatus") -> dict[str, Json]:
    """One job."""
    ended = job.phase in ENDED_PHASES
    return {
        "job": job.job,
        "phase": job.phase,
        "waiting_for": job.waiting_for,
        "reason": job.reason,
        "exit_code": job.exit_code if ended else None,
        "run": job.run,
        "generation": job.generation,
        "world_size": job.world_size,
        "restarts": job.restarts,
        "restarts_used": job.restarts_used,
        "max_restarts": job.max_restarts,
        "checkpoints": job.checkpoints,
        "committed_checkpoint": job.committed_checkpoint or None,
        "committed_step": job.committed_step if job.committed_checkpoint else None,
        "completed_step": completed_step(job),
        "until_step": max((rank.report.until_step for rank in job.ranks), default=0),
        "store": job.store,
        "restores": [{"worker": restore.worker, **transfer_view(restore.transfer)} for restore in job.restores],
        "last_failure": failure_view(job.last_failure) if job.HasField("last_failure") else None,
        "ranks": [rank_view(rank) for rank in sorted(job.ranks, key=lambda rank: rank.report.rank)],
    }


ENDED_PHASES = frozenset({"succeeded", "failed", "cancelled", "interrupted"})


def completed_step(job: "wire.JobStatus") -> int:
    """The step that every rank has completed."""
    return min((rank.report.completed_step for rank in job.ranks), default=0)


def worker_view(worker: "wire.WorkerStatus") -> dict[str, Json]:
    """One worker."""
    return {
        "worker": worker.worker,
        "host": worker.host,
        "address": worker.address,
        "slots": worker.slots,
        "slots_used": worker.slots_used,
        "registered": worker.registered,
        "connected": worker.connected,
        "phase": worker.phase,
        "version": worker.version,
    }


def print_jobs(jobs: Sequence["wire.JobStatus"]) -> None:
    print_table(
        ("JOB", "PHASE", "RUN", "GENERATION", "RANKS", "STEP", "RESTARTS", "CHECKPOINTS", "NEWEST"),
        (
            (
                job.job,
                job.phase,
                str(job.run),
                str(job.generation),
                str(job.world_size),
                _of_until(job),
                f"{job.restarts_used}/{job.max_restarts}",
                str(job.checkpoints),
                f"step {job.committed_step}" if job.committed_checkpoint else "-",
            )
            for job in jobs
        ),
        empty="no jobs",
    )


def _of_until(job: "wire.JobStatus") -> str:
    if not job.ranks:
        return "-"
    until = max(rank.report.until_step for rank in job.ranks)
    return f"{completed_step(job)}/{until}" if until else str(completed_step(job))


def print_job(job: "wire.JobStatus") -> None:
    """One job in full."""
    newest = f"{job.committed_checkpoint}, step {job.committed_step}" if job.committed_checkpoint else "none yet"
    lines = [
        ("job", job.job),
        ("phase", job.phase + (f" (exit code {job.exit_code})" if job.phase in ENDED_PHASES else "")),
        ("because", job.reason),
        ("waiting for", job.waiting_for),
        ("run", f"{job.run}, generation {job.generation}, {job.restarts_used} of {job.max_restarts} restarts used"),
        ("step", _of_until(job)),
        ("checkpoints", f"{job.checkpoints} committed; newest: {newest}"),
        ("store", job.store),
        ("uploading", words_of_transfer(uploads_of(job))),
        ("restoring", words_of_transfer(restores_of(job))),
        ("last failure", _words_of_failure(job)),
    ]
    for name, value in lines:
        if value:
            click.echo(f"{name + ':':14}{value}")
    if job.last_failure.traceback:
        click.echo("\n" + indented(job.last_failure.traceback))
    if job.ranks:
        click.echo()
        print_table(
            ("RANK", "WORKER", "PID", "PHASE", "STEP", "STEP TIME", "UPLOAD", "METRICS"),
            (_rank_row(rank) for rank in sorted(job.ranks, key=lambda rank: rank.report.rank)),
            empty="",
        )


def _words_of_failure(job: "wire.JobStatus") -> str:
    if not job.HasField("last_failure"):
        return ""
    failure = job.last_failure
    return f"generation {failure.generation}: {failure.reason}{words_of_victims(failure.victims)}"


def indented(text: str) -> str:
    """A traceback below the line that it belongs to."""
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())


def _rank_row(rank: "wire.JobRank") -> tuple[str, ...]:
    view, report = rank_view(rank), rank.report
    metrics = words_of_metrics(metrics_of(report.metrics_json)) or report.error
    phase = f"exited ({view['exit_code']})" if view["state"] == "exited" else report.phase or str(view["state"])
    step_time = f"{report.step_s * 1000:.1f} ms" if report.step_s else "-"
    upload = words_of_transfer([report.upload] if report.HasField("upload") else []) or "-"
    done = str(report.completed_step)
    return (str(report.rank), rank.worker, str(report.pid), phase, done, step_time, upload, metrics)


def print_workers(workers: Sequence["wire.WorkerStatus"]) -> None:
    print_table(
        ("WORKER", "HOST", "SLOTS", "USED", "PHASE", "LEASE", "STREAM", "VERSION"),
        (
            (
                worker.worker,
                worker.host,
                str(worker.slots),
                str(worker.slots_used),
                worker.phase,
                "alive" if worker.registered else "gone",
                "open" if worker.connected else "closed",
                worker.version,
            )
            for worker in workers
        ),
        empty="no workers: start one per node with 'dtrain worker --etcd HOST:PORT'",
    )
