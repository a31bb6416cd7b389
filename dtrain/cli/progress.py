"""What a person sees while a job runs: the ranks' lines, dtrain's own, and one line of progress.

On a terminal the progress line stays at the bottom and is redrawn. Elsewhere (a file, a CI log) it is printed
anew every few seconds, and only when it says something new. The ranks' lines go to stdout unchanged but for
their prefix, everything else to stderr, so a pipe gets what the script printed.
"""

import sys
import time
from typing import TYPE_CHECKING

import click

from dtrain.cli.output import completed_step, metrics_of, restores_of, uploads_of, words_of_metrics, words_of_transfer

if TYPE_CHECKING:
    from rich.live import Live

    from dtrain.proto import agent_pb2 as wire

PLAIN_EVERY_S = 5.0  # between two progress lines where they cannot be redrawn
REDRAWS_PER_S = 8


class Screen:
    """Where a run's output goes. Use it as a context manager; lines may come before and after."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._last_plain = ""
        self._next_plain_s = time.monotonic() + PLAIN_EVERY_S
        self._rate = _Rate()

    def __enter__(self) -> "Screen":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True, highlight=False)
            # Redirecting stdout lets the ranks' lines pass above the progress line when both are a terminal.
            self._live = Live(
                console=console,
                transient=True,
                refresh_per_second=REDRAWS_PER_S,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=True,
            )
            self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.__exit__(None, None, None)

    def rank_line(self, rank: int, line: str) -> None:
        # print, not click.echo: it respects the redirection of a live terminal.
        print(with_rank(rank, line), flush=True)

    def say(self, text: str) -> None:
        """A line of dtrain's own."""
        if self._live is not None:
            print(click.style(f"dtrain: {text}", dim=True), file=sys.stderr, flush=True)
        else:
            click.echo(f"dtrain: {text}", err=True)

    def progress(self, job: "wire.JobStatus") -> None:
        """The newest status."""
        self._rate.see(completed_step(job))
        line = progress_words(job, self._rate.per_s())
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(line, style="bold", no_wrap=True, overflow="ellipsis"))
            return
        now = time.monotonic()
        if now >= self._next_plain_s and line != self._last_plain:
            self._next_plain_s = now + PLAIN_EVERY_S
            self._last_plain = line
            self.say(line)


def with_rank(rank: int, line: str) -> str:
    """A rank's line behind its prefix; torch puts the very same one before a traceback by itself."""
    prefix = f"[rank{rank}]: "
    return line if line.startswith(prefix) else prefix + line


class _Rate:
    """Steps a second, smoothed; a restart that goes back begins anew."""

    _WEIGHT = 0.3

    def __init__(self) -> None:
        self._seen: tuple[float, int] | None = None
        self._per_s: float | None = None

    def see(self, step: int) -> None:
        now = time.monotonic()
        if self._seen is None or step < self._seen[1]:
            self._seen, self._per_s = (now, step), None
            return
        passed_s = now - self._seen[0]
        if passed_s < 1.0 and step - self._seen[1] < 10:
            return  # too little happened to tell
        rate = (step - self._seen[1]) / passed_s
        self._per_s = rate if self._per_s is None else self._per_s + self._WEIGHT * (rate - self._per_s)
        self._seen = (now, step)

    def per_s(self) -> float | None:
        return self._per_s


def progress_words(job: "wire.JobStatus", steps_per_s: float | None) -> str:
    """One line: how far, how fast, what was saved."""
    if job.phase == "pending" or (job.waiting_for and not job.ranks):
        return f"{job.job} waits for {job.waiting_for or 'workers'}"
    if job.phase == "running" and not job.ranks:
        return f"{job.job}: its workers have not told the new coordinator yet how far they are"
    step = completed_step(job)
    until = max((rank.report.until_step for rank in job.ranks), default=0)
    ranks = "1 rank" if job.world_size == 1 else f"{job.world_size} ranks"
    parts = [f"{job.job}: step {step}" + (f"/{until}" if until else "")]
    if steps_per_s:
        parts.append(f"{steps_per_s:.1f} steps/s")
        if until > step:
            parts.append(f"{_duration((until - step) / steps_per_s)} left")
    parts.append(ranks)
    if job.ranks:
        first = min(job.ranks, key=lambda rank: rank.report.rank).report
        if metrics := words_of_metrics(metrics_of(first.metrics_json)):
            parts.append(metrics)
        elif step == 0 and first.phase:
            parts.append(first.phase)
    if restoring := words_of_transfer(restores_of(job)):
        parts.append(f"restoring {restoring}")
    if uploading := words_of_transfer(uploads_of(job)):
        parts.append(f"uploading {uploading}")
    if job.committed_checkpoint:
        parts.append(f"saved step {job.committed_step}")
    if job.restarts:
        failures = "1 failure" if job.restarts == 1 else f"{job.restarts} failures"
        parts.append(f"{failures}, {job.restarts_used} of {job.max_restarts} restarts used")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
