"""What one agent is told when it starts."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.common.errors import UserError
from dtrain.common.names import WorkerId

LEASE_TTL_S = 5.0  # an agent that was killed is back well within it, on a busy machine too
LEASE_TTL_MIN_S = 2.0  # etcd grants no less
LEASE_TTL_MAX_S = 3600.0
SHARED_MEMORY = Path("/dev/shm")


def default_slots(devices: Path = Path("/dev")) -> int:
    """One trainer a GPU that the node has and may use; where there is none, one a processor."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = sum(path.name.removeprefix("nvidia").isdecimal() for path in devices.glob("nvidia*"))
    if visible is not None:
        gpus = min(gpus, sum(name.strip() not in ("", "-1", "NoDevFiles") for name in visible.split(",")))
    return gpus or os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """The settings of one agent. Times are in seconds."""

    etcd: tuple[str, ...]  # "host:port", at least one
    worker_id: WorkerId
    data_dir: Path  # journal, lock and logs; one agent at a time
    prefix: str = "/dtrain"
    slots: int = field(default_factory=default_slots)  # trainers that may run here at once, >= 1
    listen: str = "127.0.0.1:0"  # where the Logs service listens; port 0: any free one
    advertise: str = ""  # host, or host:port, under which others reach this node; empty: where it listens
    heartbeat_s: float = 0.5  # a snapshot at least this often
    lease_ttl_s: float = LEASE_TTL_S  # how long etcd remembers a node that says nothing
    fence_after_s: float = 1800.0  # without any coordinator for so long, the trainers are ended
    orphan_after_s: float = 600.0  # without their agent for so long, the trainers are ended
    upload_mib_per_s: float | None = None  # all uploads of this agent together; None: as fast as they go
    zygote: bool = True  # fork trainers from a warm process where that is possible
    zygote_after_s: float = 0.0  # the agent's age from which on there is one
    shared_memory: Path = SHARED_MEMORY  # where rank folders lie; the data folder if it is not there

    def __post_init__(self) -> None:
        if not self.etcd:
            raise UserError("no etcd endpoint was given: name one, as in --etcd 127.0.0.1:2379.")
        if not LEASE_TTL_MIN_S <= self.lease_ttl_s <= LEASE_TTL_MAX_S:
            raise UserError(
                f"lease-ttl {self.lease_ttl_s:g} is not valid: give {LEASE_TTL_MIN_S:g} to {LEASE_TTL_MAX_S:g} seconds."
            )
        if self.slots < 1:
            raise UserError(f"slots {self.slots} is not valid: give 1 or more.")
        if self.listen.rpartition(":")[0] in ("0.0.0.0", "[::]", "") and not self.advertise:
            raise UserError(
                f"listening on {self.listen} does not say how others reach this node: give --advertise HOST as well."
            )
