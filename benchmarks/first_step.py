"""The script that startup.py times: a two-layer network under DDP. It says when its first step was done.

It knows nothing of dtrain, so that torchrun and dtrain run the very same file.
"""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(16, 64)).sum().backward()
    optimizer.step()
    dist.barrier()
    if dist.get_rank() == 0:
        Path(os.environ["FIRST_STEP_FILE"]).write_text(repr(time.time()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
