"""The job that the survival tests attack: two ranks, dropout, shuffled data, a scheduler, all state that matters.

Each rank appends one line for each step it begins to its own record, so that the tests can say what really was
trained, whatever the system claims. The record is the trainer's own: dtrain neither reads nor writes it.
"""

import argparse
import json
import os
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dtrain

FROZEN_STEPS = 100


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(256, 16, generator=generator)
    return TensorDataset(inputs, inputs.pow(2).sum(dim=1, keepdim=True))


def wait_for_ever() -> None:
    threading.Event().wait()


class Slow:
    """Takes long to be saved and loaded, the first time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def linger(self) -> None:
        time.sleep(self.seconds)
        self.seconds = 0.0

    def state_dict(self) -> dict[str, int]:
        self.linger()
        return {"nothing": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.linger()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=40.0)
    parser.add_argument("--hurry", type=Path, help="once this file is there, steps take no longer than they must")
    parser.add_argument("--frozen-kib", type=int, default=0, help="of a layer that changes at every 100th step only")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--final", type=Path, required=True)
    parser.add_argument("--hang-at", type=int, default=0, help="rank 1 of the first generation never ends this step")
    parser.add_argument(
        "--linger-s",
        type=float,
        default=0.0,
        help="of whatever is no step and may take long: a restore, and the rest in the first generation",
    )
    args = parser.parse_args()
    linger_s = args.linger_s if os.environ["DTRAIN_GENERATION"] == "1" else 0.0
    time.sleep(linger_s)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with dtrain.join() as run:
        torch.manual_seed(1234)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.9)
        dataset = data()
        sampler = DistributedSampler(dataset, num_replicas=run.world_size, rank=run.rank, shuffle=True, seed=3)
        loader = DataLoader(dataset, batch_size=16, sampler=sampler)
        torch.manual_seed(100 + run.rank)  # dropout differs by rank
        frozen = nn.ParameterList(torch.ones(args.frozen_kib * 128, 1) for _ in range(2 if args.frozen_kib else 0))
        frozen.requires_grad_(False)
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, data=loader, frozen=frozen)
        if args.linger_s:
            run.track_local(slow=Slow(args.linger_s))
        time.sleep(linger_s)
        first = True
        record = os.open(args.records / f"rank{run.rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for inputs, targets in run.steps(loader, until=args.steps):
            line = {"generation": run.generation, "step": run.step + 1, "pid": os.getpid(), "sum": float(inputs.sum())}
            os.write(record, json.dumps(line).encode() + b"\n")
            if first:
                time.sleep(linger_s)
                first = False
            if linger_s and run.step + 1 == args.hang_at - 2:
                with run.paused():
                    time.sleep(linger_s)
            if run.generation == 1 and run.rank == 1 and run.step + 1 == args.hang_at:
                wait_for_ever()
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if run.step % FROZEN_STEPS == 0:
                for part in frozen:
                    part.add_(run.step)
            if args.hurry is None or not args.hurry.exists():
                time.sleep(args.step_ms / 1000)  # stands for the work of a larger model
            run.report(loss=loss.item())
        if run.rank == 0:
            partial = args.final.with_suffix(".partial")
            final = {
                **model.module.state_dict(),
                **{f"frozen.{name}": part for name, part in frozen.state_dict().items()},
            }
            save_file({name: tensor.contiguous() for name, tensor in final.items()}, partial)
            partial.rename(args.final)


if __name__ == "__main__":
    main()
