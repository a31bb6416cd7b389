"""The script that recovery.py kills: a two-layer network under DDP that says when it came how far.

It runs under dtrain and, in dtrain's local mode, under torchrun: the very same file. Each line of its record is one
moment of one rank, with the time on the machine's clock.
"""

import time

FIRST_LINE = time.time()

import json  # noqa: E402 - what comes before the imports is measured
import os  # noqa: E402

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import dtrain  # noqa: E402

STEP_S = 0.02
NEVER = 1_000_000  # steps: it trains until it is ended


def main() -> None:
    imported = time.time()
    record = os.open(os.environ["RECOVERY_RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    torch.set_num_threads(1)

    def say(moment: str, at: float, step: int = 0) -> None:
        line = {"rank": int(os.environ["RANK"]), "pid": os.getpid(), "moment": moment, "at": at, "step": step}
        os.write(record, json.dumps(line).encode() + b"\n")

    say("first line", FIRST_LINE)
    say("imported", imported)
    with dtrain.join() as run:
        say("joined", time.time())
        model = DistributedDataParallel(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1)))
        optimizer = torch.optim.AdamW(model.parameters())
        loader = DataLoader(TensorDataset(torch.randn(64, 512)), batch_size=16)
        run.track(model=model, optimizer=optimizer)
        say("built", time.time())
        restored = False
        for (inputs,) in run.steps(loader, until=NEVER):
            if not restored:
                restored = True
                say("restored", time.time())
            optimizer.zero_grad()
            model(inputs).pow(2).mean().backward()
            optimizer.step()
            say("step", time.time(), run.step + 1)
            time.sleep(STEP_S)  # stands for the work of a larger model


if __name__ == "__main__":
    main()
