"""A small training with everything that is awkward to shard: for tests that save in one world and read in another.

Arguments: ``plain``, ``ddp``, ``fsdp``, ``inside`` (FSDP, tracked inside of an object of the script's own), ``tp``
(tensor parallel) or ``fsdp_tp`` (both: a mesh of two dimensions); the folder for results; the number of steps. Rank 0
writes every tensor whole to ``begun.safetensors`` before the first step of this process, and to ``whole.safetensors``
at its end; each rank writes ``rank<n>.json``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain.trainer import partition

partition.CUT_BYTES = 100  # so that even these tensors are cut into rows,
partition.WITNESS_BYTES_MAX = 24  # and most are no witnesses


class Net(nn.Module):
    """Tied weights, two types, a frozen parameter, buffers, and sizes that no world divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 5)
        self.low = nn.Linear(5, 6).to(torch.bfloat16)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))  # one row: most ranks have none
        self.frozen = nn.Parameter(torch.randn(3, 4), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.body(self.embedding(tokens)))
        hidden = self.norm(self.low(hidden.to(torch.bfloat16)).float())
        found: torch.Tensor = self.head(hidden * self.scale)
        return found


class Own:
    """Something that each rank has for itself."""

    def __init__(self, rank: int) -> None:
        self.held = torch.full((3,), float(rank))

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state["held"]


class Inside:
    """Holds model and optimizer, and an average of the weights that its first step makes."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.average: dict[str, torch.Tensor] = {}

    def step(self) -> None:
        self.optimizer.step()
        for name, parameter in self.model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.detach(), 0.1)
            else:
                self.average[name] = parameter.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        held = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**held, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]


def wrapped(model: Net, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how in ("fsdp", "inside"):
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.low)
        fully_shard(model)
    if how in ("tp", "fsdp_tp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
        # DTensors between the two: a plain tensor would not tell that the five features are cut unevenly.
        plan = {"body": ColwiseParallel(use_local_output=False), "low": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        if how == "fsdp_tp":
            fully_shard(model.low, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a collective
    return full.detach().clone().contiguous()


def all_whole(
    net: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": whole(tensor) for name, tensor in net.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{what}": whole(value) for what, value in values.items()}
    found |= {f"average.{name}": whole(value) for name, value in average.items()}
    return found


def main() -> None:
    how, results, until = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    with dtrain.join() as run:
        torch.manual_seed(until * 1000 + len(how))  # another start in another run: what is the same was restored
        net = Net()
        for parameter in [*net.parameters(), *net.buffers()]:
            dist.broadcast(parameter.data, 0)
        model = wrapped(net, how)
        # Not foreach: it takes no tensors of several meshes together.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
        own = Own(run.rank)
        inside = Inside(model, optimizer)
        if how == "inside":
            run.track(inside=inside)
        else:
            run.track(model=model, optimizer=optimizer)
        run.track_local(own=own)
        torch.manual_seed(0 if "tp" in how else run.rank)  # tensor parallel ranks see the same batch
        batches = [torch.randint(0, 7, (4,)) for _ in range(until)]
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        began = False
        for tokens in run.steps(batches, until=until):
            begun = {} if began else all_whole(inner, optimizer, inside.average)
            if begun and run.rank == 0:
                save_file(begun, results / "begun.safetensors")
            began = True
            loss = nn.functional.cross_entropy(model(tokens), tokens)
            optimizer.zero_grad()
            loss.backward()
            (inside if how == "inside" else optimizer).step()
        found = all_whole(inner, optimizer, inside.average)
        same_tensor = net.head.weight is net.embedding.weight
        planned = "torch.distributed.checkpoint" in sys.modules
        told = {"restored": run.restored, "own": own.held.tolist(), "tied": same_tensor, "planned": planned}
        (results / f"rank{run.rank}.json").write_text(json.dumps(told))
        if run.rank == 0:
            save_file(found, results / "whole.safetensors")


if __name__ == "__main__":
    main()
