"""Saves or loads a sharded model by torch's own calls, on a store of dtrain's.

Arguments: ``save``, ``thread`` or ``process`` (which save beside the training), or ``load``; the store, the rank, the
world size, the file to meet in. Loading compares.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dtrain


def state(fill: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(35.0).view(7, 5)
    sharded = distribute_tensor(whole if fill else torch.zeros(7, 5), mesh, [Shard(0)])
    plain = torch.arange(6, dtype=torch.bfloat16) if fill else torch.zeros(6, dtype=torch.bfloat16)
    return {"model": {"sharded": sharded, "plain": plain}, "step": 7 if fill else 0, "words": ["a"] if fill else []}


def main() -> None:
    what, store, rank, world, meet = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    if what in ("thread", "process"):
        writer = dtrain.dcp.StoreWriter(store, job="plain", checkpoint=3, step=7)
        dcp.async_save(state(True), storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType(what)).result()
    elif what == "save":
        dcp.save(state(True), storage_writer=dtrain.dcp.StoreWriter(store, job="plain", checkpoint=3, step=7))
    else:
        found, expected = state(False), state(True)
        dcp.load(found, storage_reader=dtrain.dcp.StoreReader(store, job="plain"))
        sharded = found["model"]["sharded"]
        assert isinstance(sharded, DTensor)
        assert torch.equal(sharded.to_local(), expected["model"]["sharded"].to_local())
        assert torch.equal(found["model"]["plain"], expected["model"]["plain"])
        assert (found["step"], found["words"]) == (7, ["a"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
