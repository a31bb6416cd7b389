"""A real trainer whose state is larger than a small shared memory. It steps until it is ended."""

import threading

import torch

import dtrain

STATE_BYTES = 8 * 1024 * 1024


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # no two ranks may hold different states under one name
    model = torch.nn.Linear(STATE_BYTES // 4 // 1024, 1024, bias=False)
    with dtrain.join() as run:
        run.track(model=model)
        for _ in run.steps([0], until=1_000_000):
            threading.Event().wait(0.01)


if __name__ == "__main__":
    main()
