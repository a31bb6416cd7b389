"""A small training for the tests: DDP, dropout, a shuffled DistributedSampler over several epochs.

Arguments: the folder for results, the number of steps, and the step in whose body to wait for ever (0: none).
Each rank writes ``rank<n>.json`` (what every step of this process saw) and rank 0 ``final.safetensors``.
"""

import json
import random
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import dtrain


def main() -> None:
    results, until, hold_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(60, 8), torch.arange(60))
    with dtrain.join() as run:
        model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5)
        sampler: DistributedSampler[object] = DistributedSampler(data, run.world_size, run.rank, shuffle=True)
        loader = DataLoader(data, batch_size=4, sampler=sampler)
        torch.manual_seed(run.rank + 1)
        random.seed(run.rank + 1)
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, data=loader)
        seen = []
        for inputs, numbers in run.steps(loader, until=until):
            if run.step + 1 == hold_at:
                threading.Event().wait()
            loss = (model(inputs) + random.random() * torch.rand(())).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            seen.append([run.step + 1, numbers.tolist(), loss.item().hex()])
            run.report(loss=loss.item())
        (results / f"rank{run.rank}.json").write_text(json.dumps({"restored": run.restored, "seen": seen}))
        if run.rank == 0:
            save_file(model.module.state_dict(), results / "final.safetensors")


if __name__ == "__main__":
    main()
