"""A training whose ranks hold different things: two stages of a pipeline, each sharded over a mesh of its own ranks.

Arguments: the folder for results; the number of steps. Each rank writes what it holds before the first step of this
process to ``begun<n>.safetensors``, and at its end to ``ended<n>.safetensors``. No activations are sent: what is
tested is who stores what.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dtrain


class Stage(nn.Module):
    """One of the two stages, with its layers under the names that they have in the whole model."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.add_module(f"layer{number}", nn.Linear(5, 5))
        self.add_module(f"norm{number}", nn.BatchNorm1d(5))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            hidden = module(hidden)
        return hidden


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = dict(model.state_dict())
    for number, values in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{what}": value for what, value in values.items()}
    locals_ = {name: value.to_local() if hasattr(value, "to_local") else value for name, value in found.items()}
    return {name: value.detach().clone().contiguous() for name, value in locals_.items()}


def main() -> None:
    results, until = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    with dtrain.join() as run:
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp"))
        number = mesh["pp"].get_local_rank()
        torch.manual_seed(until * 1000 + number)  # another start in another run: what is the same was restored
        model = Stage(number)
        fully_shard(model, mesh=mesh["dp"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run.track(model=model, **{f"optimizer{number}": optimizer})
        batches = [torch.randn(4, 5) for _ in range(until)]
        began = False
        for batch in run.steps(batches, until=until):
            if not began:
                save_file(held(model, optimizer), results / f"begun{run.rank}.safetensors")
                began = True
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
        save_file(held(model, optimizer), results / f"ended{run.rank}.safetensors")


if __name__ == "__main__":
    main()
