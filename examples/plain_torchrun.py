"""An ordinary torchrun script that knows nothing of dtrain.

    torchrun --standalone --nproc-per-node 2 examples/plain_torchrun.py
    dtrain run --nproc-per-node 2 examples/plain_torchrun.py

Under ``dtrain run`` it is started, supervised and restarted as torchrun would do it. It keeps no checkpoints, so a
restart begins at step 0; examples/digits.py shows what to add.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps to train (default: %(default)s)")
    parser.add_argument("--slow-ms", type=float, default=0.0, help="stretch each step by this many milliseconds")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    draw = torch.Generator().manual_seed(rank)

    loss = torch.zeros(())
    for _ in range(arguments.steps):
        inputs = torch.randn(64, 16, generator=draw)
        loss = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if arguments.slow_ms:
            time.sleep(arguments.slow_ms / 1000)

    if rank == 0:
        restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
        print(f"{world_size} ranks, {arguments.steps} steps, {restarts} restarts: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
