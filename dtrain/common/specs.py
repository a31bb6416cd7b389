"""What a person asks for: the job's spec, recorded in its first event and never changed by dtrain."""

import math
from dataclasses import dataclass, field

from dtrain.common.errors import UserError
from dtrain.common.names import JobName

# The log's times have three digits behind the point: shorter spans would all be different, or overflow.
KEEP_EVERY_SECONDS_MIN = 0.001
HANG_TIMEOUT_MIN_S = 1.0  # progress is reported twice a second
HANG_TIMEOUT_MAX_S = 1e6  # eleven days


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """When checkpoints are taken. Both zero: only on request. Never both set."""

    every_steps: int = 0  # >= 0; a checkpoint at each multiple
    every_seconds: float = 0.0  # >= 0; seconds between the starts of two checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """Which committed checkpoints are kept. What any of the rules wants is kept; the newest one always is."""

    keep_last: int = 0  # >= 0; the newest ones; 0 keeps all, and then the other rules say nothing
    keep_every_steps: int = 0  # >= 0; those of each multiple
    keep_every_seconds: float = 0.0  # >= 0; the first of each such span of time


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One training run as its submitter described it."""

    name: JobName
    python: str  # interpreter that runs the script, an absolute path or a name looked up on the worker's PATH
    script: str  # absolute path on every node
    args: tuple[str, ...] = ()
    cwd: str = "/"  # absolute path on every node
    env: dict[str, str] = field(default_factory=dict)  # added to the worker's own environment
    nnodes_min: int = 1  # 1 <= nnodes_min <= nnodes_max
    nnodes_max: int = 1
    nproc_per_node: int = 1  # >= 1; each takes one slot of a worker
    max_restarts: int = 10  # >= 0; generations after the first that a failure of a trainer may cost
    restart_window_s: float = 0.0  # >= 0; over how long max_restarts is counted; 0: over the whole run
    store: str = ""  # file:///folder or s3://bucket/prefix?endpoint=...
    checkpoints: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    no_python: bool = False  # the script is a program of its own: no interpreter is put before it
    hang_timeout_s: float | None = None  # no rank completed a step for so long: hung. None: by its steps; 0: never

    def __post_init__(self) -> None:
        if self.nnodes_min < 1 or self.nnodes_max < self.nnodes_min:
            raise UserError(
                f"nnodes {self.nnodes_min}:{self.nnodes_max} is not valid: "
                "give N, or MIN:MAX with 1 <= MIN <= MAX, as in --nnodes 1:4."
            )
        if self.nproc_per_node < 1:
            raise UserError(f"nproc-per-node {self.nproc_per_node} is not valid: give 1 or more.")
        if self.max_restarts < 0:
            raise UserError(f"max-restarts {self.max_restarts} is not valid: give 0 or more.")
        if self.hang_timeout_s is not None and not (
            self.hang_timeout_s == 0 or HANG_TIMEOUT_MIN_S <= self.hang_timeout_s <= HANG_TIMEOUT_MAX_S
        ):
            raise UserError(
                f"hang-timeout {self.hang_timeout_s:g} is not valid: give {HANG_TIMEOUT_MIN_S:g} to "
                f"{HANG_TIMEOUT_MAX_S:g} seconds, 'auto', or 'off'."
            )
        if not math.isfinite(self.restart_window_s) or self.restart_window_s < 0:
            raise UserError(
                f"restart-window {self.restart_window_s:g} is not valid: give seconds, or 0 for the whole run."
            )
        if not math.isfinite(self.checkpoints.every_seconds):
            raise UserError("every-seconds must be a finite number: JSON, in which the log is written, has no other.")
        if self.checkpoints.every_steps < 0 or self.checkpoints.every_seconds < 0:
            raise UserError("every-steps and every-seconds must not be negative: leave them out for no checkpoints.")
        if self.checkpoints.every_steps and self.checkpoints.every_seconds:
            raise UserError("give --every-steps or --every-seconds, not both.")
        kept = self.retention
        if not math.isfinite(kept.keep_every_seconds) or 0 < kept.keep_every_seconds < KEEP_EVERY_SECONDS_MIN:
            raise UserError(f"keep-every-seconds must be a finite number of {KEEP_EVERY_SECONDS_MIN:g} or more.")
        if kept.keep_last < 0 or kept.keep_every_steps < 0 or kept.keep_every_seconds < 0:
            raise UserError("keep-last, keep-every-steps and keep-every-seconds must not be negative.")
        if (kept.keep_every_steps or kept.keep_every_seconds) and not kept.keep_last:
            raise UserError("give --keep-last as well: without it every checkpoint is kept.")
