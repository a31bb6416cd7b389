"""Recognise handwritten digits: a small network, real data, any number of ranks.

    dtrain run --nproc-per-node 2 --every-steps 50 examples/digits.py --steps 300
    torchrun --standalone --nproc-per-node 2 examples/digits.py
    python examples/digits.py

The data (1,797 images of 8 x 8 pixels) comes with scikit-learn, so nothing is downloaded. The run is deterministic:
killed and resumed any number of times, it ends with the same weights, bit for bit, as when it is left alone.
"""

import argparse
import os
import time
from pathlib import Path

# Must be set before CUDA starts; cuBLAS is not deterministic without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import dtrain

HELD_OUT = 360  # images kept for the accuracy at the end


class Net(nn.Module):
    """Two convolutions and two dense layers; the dropout makes random states matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Linear(64, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (batch, 10) for images of shape (batch, 1, 8, 8)."""
        scores: torch.Tensor = self.layers(images)
        return scores


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Return (training set, held-out set), shuffled the same way every time."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return TensorDataset(images[HELD_OUT:], labels[HELD_OUT:]), TensorDataset(images[:HELD_OUT], labels[:HELD_OUT])


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, device: torch.device) -> float:
    """Return the share of images in ``data`` that ``model`` recognises."""
    model.eval()
    images, labels = data.tensors
    return float((model(images.to(device)).argmax(1) == labels.to(device)).float().mean())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps to train (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step and rank (default: %(default)s)")
    parser.add_argument("--slow-ms", type=float, default=0.0, help="stretch each step by this many milliseconds")
    parser.add_argument("--save-final", type=Path, help="where rank 0 writes the final weights (safetensors)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums in another order would give other last bits
    torch.use_deterministic_algorithms(True)
    train, held_out = load_data()

    with dtrain.join() as run:
        model = DistributedDataParallel(
            Net().to(run.device), device_ids=[run.device.index] if run.device.type == "cuda" else None
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, arguments.steps))
        sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(
            train, run.world_size, run.rank, shuffle=True
        )
        loader = DataLoader(train, batch_size=arguments.batch_size, sampler=sampler)
        torch.manual_seed(1 + run.rank)  # the weights start alike; dropout is drawn by each rank for itself
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, data=loader)

        for images, labels in run.steps(loader, until=arguments.steps):
            loss = nn.functional.cross_entropy(model(images.to(run.device)), labels.to(run.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.report(loss=loss.item())
            if arguments.slow_ms:
                time.sleep(arguments.slow_ms / 1000)

        if run.rank == 0:
            share = accuracy(model.module, held_out, run.device)
            run.report(accuracy=share)
            print(f"step {run.step}: {share:.1%} of {HELD_OUT} held-out digits recognised", flush=True)
            if arguments.save_final:
                from safetensors.torch import save_file

                save_file(model.module.state_dict(), arguments.save_final)


if __name__ == "__main__":
    main()
