"""Ranks that hold different sharded things, as the stages of a pipeline do: each is stored, and comes back."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtrain.common.mailbox import RestoreState, pack, unpack
from dtrain.common.names import Step
from dtrain.storage.catalogs import Catalog, IncompleteCheckpoint, catalog_of
from dtrain.storage.indexes import index_shard, open_index
from dtrain.trainer import dtensors
from dtrain.trainer.copying import Copier
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.staging import ShardLayouts
from dtrain.trainer.tracking import TrackedState
from dtrain.worker.shard_images import probable_needs
from tests.support.warm_scripts import WarmScripts
from tests.trainer.pipeline_script import Stage
from tests.trainer.playing_worker import RankFolder, offer

SCRIPT = Path(__file__).parent / "pipeline_script.py"
STEPS = 2


def catalog(shards: list[bytes]) -> Catalog:
    found = [index_shard(memoryview(data))[0] for data in shards]
    return catalog_of([open_index(data, key=str(rank), shard_key=str(rank)) for rank, data in enumerate(found)])


def shard_of(rank: int, *, mesh_names: tuple[str, str], apart: str, differ: bool = False) -> bytes:
    """Return what one of four ranks stages, of a mesh of 2 x 2 whose collectives do nothing.

    ``apart``: "stages" if the rows of the mesh hold different layers; "names" if they hold different values under the
    same names; "nothing" if they hold the same. ``differ``: buffers do, on each rank.
    """
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=mesh_names)
        row = rank // 2
        torch.manual_seed(row if apart != "nothing" else 0)
        model = Stage(row if apart == "stages" else 0)
        if differ:
            model.norm0.running_mean.fill_(float(rank))
        fully_shard(model, mesh=mesh if mesh_names[0] == "replicas" else mesh[mesh_names[1]])
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return staged(rank, model, optimizer, name=f"optimizer{row if apart == 'stages' else 0}")
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # to torch one mesh is the same on every rank, and a process is one rank
        dtensors._ranks_of_mesh.cache_clear()


def staged(rank: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, name: str, world_size: int = 4) -> bytes:
    tracked = TrackedState(rank=rank, world_size=world_size)
    tracked.add("model", model)
    tracked.add(name, optimizer)
    image = ShardLayouts(rank=rank, world_size=world_size).lay_out(tracked.capture(Step(1), DataPosition([1])))
    page = bytearray(image.plan.total_bytes)
    image.copy_into(memoryview(page), Copier(1))
    return bytes(page)


def test_each_stage_of_a_pipeline_is_stored_by_its_own_ranks() -> None:
    found = catalog([shard_of(rank, mesh_names=("pp", "dp"), apart="stages") for rank in range(4)])
    for stage in (0, 1):
        ranks = {2 * stage, 2 * stage + 1}
        weights = found.tensors[f"model.layer{stage}.weight"], found.tensors[f"optimizer{stage}.state.0.exp_avg"]
        assert all({chunk.shard for chunk in weight.chunks} == ranks for weight in weights)
        plain = f"model.norm{stage}.running_mean", f"optimizer{stage}.state.0.step"
        assert all([chunk.shard for chunk in found.tensors[name].chunks] == [2 * stage] for name in plain)


def test_two_things_under_one_name_are_refused_and_named() -> None:
    shards = [shard_of(rank, mesh_names=("pp", "dp"), apart="names") for rank in range(4)]
    with pytest.raises(IncompleteCheckpoint, match=r"'model\.layer0\.\w+': ranks 0 and 2 hold different .* own"):
        catalog(shards)


def test_of_copies_on_several_meshes_one_is_kept_and_of_buffers_the_first_ranks_counts() -> None:
    shards = [shard_of(rank, mesh_names=("outer", "inner"), apart="nothing", differ=True) for rank in range(4)]
    found = catalog(shards)
    assert [chunk.shard for chunk in found.tensors["model.layer0.weight"].chunks] == [0, 1]
    assert [chunk.shard for chunk in found.tensors["model.norm0.running_mean"].chunks] == [0]
    brought = {(each.tensor, each.shard) for each in probable_needs(found, [3], 4)}
    assert {shard for name, shard in brought if name == "model.layer0.weight"} == {1}, "the copy that is kept"


def test_replicas_of_one_mesh_are_not_even_staged_twice() -> None:
    shards = [shard_of(rank, mesh_names=("replicas", "shards"), apart="nothing") for rank in range(4)]
    for data in shards[2:]:
        names = open_index(index_shard(memoryview(data))[0], key="", shard_key="").header.tensors
        assert not [name for name in names if name.startswith("model.layer0.")]


def test_a_pipeline_of_four_ranks_goes_on_from_the_same_bits(warm: WarmScripts, tmp_path: Path) -> None:
    shards = run(warm, tmp_path / "first", until=STEPS)
    run(warm, tmp_path / "second", until=STEPS + 1, shards=shards)
    for rank in range(4):
        before = load_file(tmp_path / "first" / f"ended{rank}.safetensors")
        after = load_file(tmp_path / "second" / f"begun{rank}.safetensors")
        assert before.keys() == after.keys() and f"layer{rank // 2}.weight" in after and "0.exp_avg" in after
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def run(warm: WarmScripts, folder: Path, *, until: int, shards: list[bytes] | None = None) -> list[bytes]:
    """Train on four ranks until ``until``, from ``shards`` or from nothing. Return what they stage at the end."""
    folder.mkdir()
    staged = []
    with ExitStack() as stack:
        ranks = [stack.enter_context(RankFolder(folder / "g1", rank=rank, world_size=4)) for rank in range(4)]
        if shards is not None:
            offer(ranks, shards)
        for rank in ranks:
            if shards is None:
                rank.mailbox.restore = RestoreState.NOTHING
            rank.mailbox.request = pack(1, until)
            rank.start_warm(warm, SCRIPT, str(folder), str(until))
        for rank in ranks:
            assert rank.wait_exit() == 0, rank.output()
            word, slot, size_bytes = rank.mailbox.staged
            assert unpack(word) == (1, until), rank.output()
            staged.append((rank.path / f"slot{slot}").read_bytes()[:size_bytes])
    return staged
