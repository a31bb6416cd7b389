"""The script that is tuned under attack: a frozen model with small trained adapters; one layer thaws on the way."""

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import dtrain

FEATURES, HIDDEN, RANK = 512, 1024, 4  # two frozen matrices of 2 MiB, adapters of some KiB


class Tuned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.second = nn.Linear(HIDDEN, FEATURES, bias=False)
        self.down = nn.Linear(FEATURES, RANK, bias=False)
        self.up = nn.Linear(RANK, FEATURES, bias=False)
        self.first.requires_grad_(False)
        self.second.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(inputs))) + self.up(self.down(inputs))
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--thaw-at", type=int, required=True)
    parser.add_argument("--final", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with dtrain.join() as run:
        torch.manual_seed(7)
        model = Tuned()
        adapters = torch.optim.AdamW([*model.down.parameters(), *model.up.parameters()], lr=1e-3)
        thawed = torch.optim.SGD(model.second.parameters(), lr=1e-3)
        run.track(model=model, adapters=adapters, thawed=thawed)
        for _ in run.steps(DataLoader(range(50)), until=args.steps):
            model.second.requires_grad_(run.step >= args.thaw_at)
            generator = torch.Generator().manual_seed(1000 * run.step + run.rank)
            inputs = torch.randn(8, FEATURES, generator=generator)
            loss = (model(inputs) - inputs).pow(2).mean()
            for optimizer in (adapters, thawed):
                optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
            adapters.step()
            thawed.step()
            time.sleep(0.05)  # stands for the work of a larger model
        if run.rank == 0:
            partial = args.final.with_suffix(".partial")
            save_file(dict(model.state_dict()), partial)
            partial.rename(args.final)


if __name__ == "__main__":
    main()
