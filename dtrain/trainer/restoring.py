"""Restoring: from a shard's bytes to a saved state.

A worker has checked size and digest before it hands a shard over; a shard is still read as if it came from a
stranger, because a wrong tensor would not crash but train on nonsense. Nothing in it is ever executed.

Every tensor handed out is a copy: the file lies in memory that the worker may take back.
"""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch

from dtrain.common.errors import ShardDamagedError
from dtrain.common.mailbox import Mailbox, RestoreState
from dtrain.common.names import Step
from dtrain.storage import shards
from dtrain.storage.shards import ShardHeader
from dtrain.trainer.tensor_codes import DTYPE_OF_CODE, view_bytes
from dtrain.trainer.tracking import SavedState

RESTORE_FILE = "restore.safetensors"
POLL_FIRST_S = 0.0005  # a shard that is already there costs nothing
POLL_MAX_S = 0.02  # what one look at the mailbox may cost a restart in delay


def wait_for_worker(mailbox: Mailbox) -> bool:
    """Wait until the worker has said what this rank starts from. Return True if a shard is there.

    There is no bound: storage may be away for hours and the worker goes on trying. A worker that is gone for good
    is noticed by this trainer's keeper, which ends the trainer. Signals interrupt the wait.
    """
    pause, wait_s = Event(), POLL_FIRST_S  # an Event that nobody sets: a sleep that handlers can break
    while (state := mailbox.restore) is RestoreState.PENDING:
        pause.wait(wait_s)
        wait_s = min(wait_s * 2, POLL_MAX_S)
    return state is RestoreState.READY


def read_shard_file(path: Path) -> SavedState:
    """Return the state in the shard at ``path``; it is mapped, not read. Raises :class:`ShardDamagedError`."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ShardDamagedError(str(path), "is empty")
        # A private mapping: torch wants memory that could be written, the file stays as it is.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return read_shard(memoryview(mapped), key=str(path))


def read_shard(data: memoryview, *, key: str) -> SavedState:
    """Return the state in a shard's bytes (writable memory). Raises :class:`ShardDamagedError` naming ``key``."""
    header = shards.parse_header(data, key=key, total_bytes=len(data))
    for name, part in shards.layout_of(header, key=key).items():
        if part.global_shape != header.tensors[name].shape:
            raise ShardDamagedError(key, f"tensor {name!r} is a part of a larger one, which this version cannot join")
    try:
        tree = json.loads(header.metadata[shards.TREE_ENTRY])
        step, rank, world_size = (
            int(header.metadata[entry]) for entry in (shards.STEP_ENTRY, shards.RANK_ENTRY, shards.WORLD_SIZE_ENTRY)
        )
    except (KeyError, ValueError) as error:
        raise ShardDamagedError(key, f"its metadata cannot be read: {error!r}") from error
    if not isinstance(tree, dict) or step < 0 or not 0 <= rank < world_size:
        raise ShardDamagedError(key, f"its metadata is not valid: step {step}, rank {rank} of {world_size}")
    return SavedState(
        step=Step(step),
        rank=rank,
        world_size=world_size,
        tree=tree,
        load=_ShardTensors(data=data, header=header, key=key),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardTensors:
    """The tensors of a shard, by name."""

    data: memoryview
    header: ShardHeader
    key: str

    def __call__(self, name: str) -> torch.Tensor:
        span = self.header.tensors.get(name)
        if span is None:
            raise ShardDamagedError(self.key, f"its tree names tensor {name!r}, which it does not hold")
        if span.dtype not in DTYPE_OF_CODE:
            raise ShardDamagedError(self.key, f"tensor {name!r} is of {span.dtype}, which this torch does not know")
        view = view_bytes(self.data, span.dtype, span.shape, self.header.data_start + span.begin)
        return view.clone()
