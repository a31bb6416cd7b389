"""Where the script finds itself: under a dtrain worker, under torchrun, or started by hand.

One script must run in all three, so what differs is read once from the environment into one record, and nothing
else in this room looks at the environment. A variable that is there but cannot be right is refused by name,
because a rank with a wrong idea of itself would write another rank's shard.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dtrain.common.errors import UserError
from dtrain.common.names import Generation, JobName, job_name

LOCAL_JOB = "local"  # the job's name in storage when nobody gave one


class Launcher(Enum):
    """Who started this process."""

    WORKER = "worker"  # DTRAIN_RANK_DIR is set: a dtrain worker supervises this trainer
    TORCHRUN = "torchrun"  # RANK is set: torchrun, or anything that speaks its variables
    PLAIN = "plain"  # a world of one


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the environment says about this process."""

    launcher: Launcher
    rank: int  # 0 <= rank < world_size
    world_size: int  # >= 1
    local_rank: int  # 0 <= local_rank < local_world_size
    local_world_size: int  # 1 <= local_world_size <= world_size: ranks on this node
    job: JobName
    generation: Generation  # 1 when no worker supervises
    rank_dir: Path | None  # the folder shared with the worker; set if and only if a worker supervises
    rendezvous: str  # file:///path or tcp://host:port; empty: torchrun's env://, or a world of one
    save_last: bool  # wait after the last step until the worker has asked for it and it is staged
    error_file: Path | None  # where torchrun's convention wants the record of an uncaught exception
    local_store: str  # where local mode keeps checkpoints; empty for none
    local_every_steps: int  # steps between two local checkpoints; 0 when not said


def read(environment: Mapping[str, str]) -> Surroundings:
    """Return what ``environment`` says; raise :class:`UserError` naming the variable that cannot be right."""
    rank_dir = environment.get("DTRAIN_RANK_DIR", "")
    if rank_dir:
        launcher = Launcher.WORKER
    elif "RANK" in environment:
        launcher = Launcher.TORCHRUN
    else:
        launcher = Launcher.PLAIN
    if launcher is Launcher.PLAIN:
        rank, world_size, local_rank, local_world_size = 0, 1, 0, 1
    else:
        world_size = _number(environment, "WORLD_SIZE", 1, minimum=1)
        rank = _number(environment, "RANK", 0, minimum=0)
        local_rank = _number(environment, "LOCAL_RANK", 0, minimum=0)
        local_world_size = _number(environment, "LOCAL_WORLD_SIZE", 1, minimum=1)
        _below(environment, "RANK", rank, "WORLD_SIZE", world_size)
        _below(environment, "LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size)
    error_file = environment.get("TORCHELASTIC_ERROR_FILE", "")
    return Surroundings(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        job=job_name(environment.get("DTRAIN_JOB") or LOCAL_JOB),
        generation=Generation(_number(environment, "DTRAIN_GENERATION", 1, minimum=1)),
        rank_dir=Path(rank_dir) if rank_dir else None,
        rendezvous=environment.get("DTRAIN_RENDEZVOUS", "") if launcher is Launcher.WORKER else "",
        save_last=launcher is Launcher.WORKER and environment.get("DTRAIN_SAVE_LAST") == "1",
        error_file=Path(error_file) if error_file else None,
        local_store=environment.get("DTRAIN_LOCAL_STORE", ""),
        local_every_steps=_number(environment, "DTRAIN_LOCAL_EVERY_STEPS", 0, minimum=0),
    )


def _number(environment: Mapping[str, str], name: str, default: int, *, minimum: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < minimum:
        raise UserError(f"the environment variable {name}={text!r} is not valid: give a whole number >= {minimum}.")
    return int(text)


def _below(environment: Mapping[str, str], name: str, value: int, bound_name: str, bound: int) -> None:
    if value >= bound:
        raise UserError(
            f"{name}={value} does not fit {bound_name}={environment.get(bound_name, '1')}: "
            "ranks count from 0, so start this script with all of its launcher's variables or with none."
        )
