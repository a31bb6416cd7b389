"""A trainer that speaks through its mailbox only: steps, stages what is asked, ends when a file appears.

Arguments: the file that ends it, and the seconds of one step. Its staged bytes name the rank and the step.
"""

import mmap
import os
import sys
import time
from pathlib import Path

from dtrain.common.mailbox import MAILBOX_BYTES, Mailbox, RestoreState, TrainerPhase, unpack


def staged_bytes(rank: int, step: int) -> bytes:
    return f"rank {rank} at step {step}\n".encode() * 1000


def main() -> None:
    end, step_s = Path(sys.argv[1]), float(sys.argv[2])
    folder, rank = Path(os.environ["DTRAIN_RANK_DIR"]), int(os.environ["RANK"])
    with (folder / "mailbox").open("r+b") as file:
        page = mmap.mmap(file.fileno(), MAILBOX_BYTES)
    box = Mailbox(page)
    box.phase = TrainerPhase.RESTORING
    while box.restore is RestoreState.PENDING:
        time.sleep(0.005)
    if box.restore is RestoreState.READY:
        print("restored", (folder / "restore.safetensors").read_bytes()[:30], flush=True)
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
