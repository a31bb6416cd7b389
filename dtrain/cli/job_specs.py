"""From what a person typed to a :class:`~dtrain.common.specs.JobSpec`, or one sentence that says what to mend."""

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from dtrain.common.errors import UserError
from dtrain.common.names import JobName, job_name
from dtrain.common.specs import CheckpointPolicy, JobSpec, RetentionPolicy

DEFAULT_EVERY_S = 60.0  # a crash costs a minute of work at most, and a minute hides any upload
DEFAULT_MAX_RESTARTS = 10
_SUFFIX_BYTES = 3  # six hex digits tell the runs of one script apart
_STEM_CHARS = 48  # leaves room for the suffix in a name


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of ``run`` and ``submit`` as they were typed."""

    script: str
    args: tuple[str, ...]
    name: str | None
    nnodes: str
    nproc_per_node: str
    max_restarts: int
    restart_window: float
    store: str | None
    every_steps: int | None
    every_seconds: float | None
    keep_last: int
    keep_every_steps: int
    keep_every_seconds: float
    env: tuple[str, ...]
    python: str
    no_python: bool = False
    hang_timeout: str = "auto"


def build_spec(asked: Asked, *, default_store: str) -> JobSpec:
    """The job's spec. ``default_store`` is empty where none can be assumed; then no policy means no checkpoints."""
    script = _program(asked.script) if asked.no_python else _script(asked.script)
    nnodes_min, nnodes_max = parse_nnodes(asked.nnodes)
    store = absolute_store(asked.store) if asked.store else default_store
    return JobSpec(
        name=job_name(asked.name) if asked.name is not None else default_name(script.stem),
        python=asked.python,
        no_python=asked.no_python,
        script=str(script),
        args=asked.args,
        cwd=str(Path.cwd()),
        env=parse_env(asked.env),
        nnodes_min=nnodes_min,
        nnodes_max=nnodes_max,
        nproc_per_node=parse_nproc(asked.nproc_per_node),
        max_restarts=asked.max_restarts,
        restart_window_s=asked.restart_window,
        store=store,
        checkpoints=_policy(asked, store),
        retention=RetentionPolicy(
            keep_last=asked.keep_last,
            keep_every_steps=asked.keep_every_steps,
            keep_every_seconds=asked.keep_every_seconds,
        ),
        hang_timeout_s=parse_hang_timeout(asked.hang_timeout),
    )


def _script(named: str) -> Path:
    script = Path(named).expanduser().absolute()
    if not script.is_file():
        raise UserError(f"script {named} not found: give the path of a Python file (looked at {script}).")
    return script


def _program(named: str) -> Path:
    """A file that can be run, given by its path or found on PATH."""
    found = shutil.which(Path(named).expanduser()) or shutil.which(Path(named).expanduser().absolute())
    if found is None:
        raise UserError(
            f"program {named} not found: with --no-python, give an executable file (chmod +x), or a command."
        )
    return Path(found).absolute()


def _policy(asked: Asked, store: str) -> CheckpointPolicy:
    steps, seconds = asked.every_steps, asked.every_seconds
    if (steps is not None or seconds is not None) and not store:
        raise UserError("checkpoints need a store: give --store s3://bucket/prefix, or file:///folder that all share.")
    for option, value in (("--every-steps", steps), ("--every-seconds", seconds)):
        if value is not None and value < 0:
            raise UserError(f"{option} {value:g} is not valid: give a number above 0, or 0 for no checkpoints.")
    if steps is None and seconds is None:
        return CheckpointPolicy(every_seconds=DEFAULT_EVERY_S) if store else CheckpointPolicy()
    return CheckpointPolicy(every_steps=steps or 0, every_seconds=seconds or 0.0)


def parse_nnodes(text: str) -> tuple[int, int]:
    """``"4"`` is (4, 4); ``"1:4"`` is (1, 4)."""
    match = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", text.strip())
    smallest = int(match[1]) if match else 0
    largest = int(match[2] or match[1]) if match else 0
    if smallest < 1 or largest < smallest:
        raise UserError(f"nnodes {text} is not valid: give N, or MIN:MAX with 1 <= MIN <= MAX, as in --nnodes 1:4.")
    return smallest, largest


def parse_nproc(text: str) -> int:
    """A number, or what torchrun calls ``cpu``, ``gpu`` and ``auto``, counted on this machine."""
    if text == "cpu":
        return os.cpu_count() or 1
    if text in ("gpu", "auto"):
        import torch  # a second of waiting, only for who asks to count devices

        devices = torch.cuda.device_count()
        if devices == 0 and text == "gpu":
            raise UserError("nproc-per-node gpu finds no CUDA device here: give a number, or 'cpu'.")
        return devices or os.cpu_count() or 1
    if not re.fullmatch(r"\d{1,6}", text.strip()) or int(text) < 1:
        raise UserError(f"nproc-per-node {text} is not valid: give a number of 1 or more, or auto, cpu or gpu.")
    return int(text)


def parse_hang_timeout(text: str) -> float | None:
    """Seconds; None for ``auto``, 0 for ``off``. Whether the number is one that may be given, the spec says."""
    words = {"auto": None, "off": 0.0}
    if text in words:
        return words[text]
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"hang-timeout {text} is not valid: give seconds, 'auto', or 'off'.") from error


def parse_env(entries: tuple[str, ...]) -> dict[str, str]:
    """``K=V`` sets K; a bare ``K`` hands this environment's K on."""
    values: dict[str, str] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"env {entry!r} is not valid: give NAME=VALUE, as in --env OMP_NUM_THREADS=4.")
        if not equals and name not in os.environ:
            raise UserError(f"env {name} is not set here: give it a value, as in --env {name}=VALUE.")
        values[name] = value if equals else os.environ[name]
    return values


def default_name(stem: str) -> JobName:
    """The script's name made valid, and a suffix so that two runs of one script do not meet."""
    stem = re.sub(r"[^a-z0-9]+", "-", stem.lower())[:_STEM_CHARS].strip("-") or "job"
    return job_name(f"{stem}-{secrets.token_hex(_SUFFIX_BYTES)}")


def absolute_store(uri: str) -> str:
    """A plain path becomes a file:// URI; workers run in other folders than this command."""
    if "://" in uri:
        return uri
    return Path(uri).expanduser().absolute().as_uri()
