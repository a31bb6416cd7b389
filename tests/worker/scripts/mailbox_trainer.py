"""A trainer that speaks through its mailbox only: steps, stages what is asked, ends when a file appears.

Arguments: the file that ends it, and the seconds of one step. Its staged bytes name the rank and the step.
"""

import json
import mmap
import os
import sys
import time
from pathlib import Path

from dtrain.common.mailbox import MAILBOX_BYTES, Mailbox, RestoreState, TrainerPhase, unpack
from dtrain.storage.ranges import NeededRange
from dtrain.storage.restore_files import MANIFEST_FILE, NEEDS_FILE, RESTORE_FOLDER, SHARD_FILE, encode_needs
from dtrain.storage.shards import (
    RANK_ENTRY,
    STEP_ENTRY,
    TREE_ENTRY,
    WORLD_SIZE_ENTRY,
    TensorEntry,
    parse_header,
    plan,
)


def payload(rank: int, step: int) -> bytes:
    return f"rank {rank} at step {step}\n".encode() * 1000


def staged_bytes(rank: int, step: int, world_size: int = 2) -> bytes:
    """A shard whose one tensor names the rank and the step."""
    data, name = payload(rank, step), f"payload.{rank}"
    shape = (len(data),)
    tensor = TensorEntry(
        name=name, dtype="U8", shape=shape, offsets_in_whole=(0,), global_shape=shape, size_bytes=len(data)
    )
    metadata = {
        STEP_ENTRY: str(step),
        RANK_ENTRY: str(rank),
        WORLD_SIZE_ENTRY: str(world_size),
        TREE_ENTRY: json.dumps({"objects": {"model": {"tensor": name}}}),
    }
    return plan([tensor], metadata).header + data


def ask_for_payload(folder: Path, rank: int) -> None:
    """Say that the own payload is needed, once the worker has told what there is."""
    restore = folder.parent / RESTORE_FOLDER
    while not (restore / MANIFEST_FILE).exists():
        time.sleep(0.005)
    needed = NeededRange(shard=rank, tensor=f"payload.{rank}", begin=0, end=len(payload(rank, 5)))
    (folder / ".new").write_bytes(encode_needs([needed]))
    (folder / ".new").rename(folder / NEEDS_FILE)


def restored(folder: Path, rank: int) -> bytes:
    data = (folder.parent / RESTORE_FOLDER / SHARD_FILE.format(rank)).read_bytes()
    return data[parse_header(data).data_start :]


def main() -> None:
    end, step_s = Path(sys.argv[1]), float(sys.argv[2])
    folder, rank = Path(os.environ["DTRAIN_RANK_DIR"]), int(os.environ["RANK"])
    with (folder / "mailbox").open("r+b") as file:
        page = mmap.mmap(file.fileno(), MAILBOX_BYTES)
    box = Mailbox(page)
    box.phase = TrainerPhase.RESTORING
    if box.restore is not RestoreState.NOTHING:
        ask_for_payload(folder, rank)
    while box.restore is RestoreState.PENDING:
        time.sleep(0.005)
    if box.restore is RestoreState.READY:
        print("restored", restored(folder, rank)[:30], flush=True)
    box.tracking, box.until_step, box.phase = True, 1_000_000, TrainerPhase.TRAINING
    answered, step = 0, 0
    while not end.exists():
        time.sleep(step_s)
        step += 1
        box.completed_step = step
        attempt, wanted = unpack(box.request)
        if attempt > answered and wanted <= step:
            answered = attempt
            if wanted < step:
                box.missed = box.request
                continue
            slot = box.stage_slot or 0
            box.begin_staging(slot)
            data = staged_bytes(rank, step)
            (folder / f"slot{slot}").write_bytes(data)
            box.publish_staged(box.request, slot=slot, size_bytes=len(data))
    print(f"rank {rank} ended after step {step}", flush=True)


if __name__ == "__main__":
    main()
