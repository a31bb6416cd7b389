"""Who stores what: once each, evenly, and worked out by every rank alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtrain.common.names import Step
from dtrain.storage.tensor_codes import size_bytes
from dtrain.trainer import partition
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.dtensors import local_part
from dtrain.trainer.partition import Partition, Share
from dtrain.trainer.parts import TensorPart
from dtrain.trainer.state_tree import Encoder
from dtrain.trainer.tracking import CapturedState, TrackedState


def shares(tensors: dict[str, torch.Tensor], world_size: int, spread: set[str] | None = None) -> list[Share]:
    names = tensors.keys() if spread is None else spread
    return [
        Partition(rank=rank, world_size=world_size).share(tensors, spread=names, own=(), sharded={})
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_byte_is_stored_once_and_by_everybody_alike(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "CUT_BYTES", 1000)
    monkeypatch.setattr(partition, "WITNESS_BYTES_MAX", 0)
    tensors = {f"t{n}": torch.arange(n * 100.0).view(n * 10, 10) for n in range(1, 12)}
    tensors |= {f"s{n}": torch.zeros(n) for n in range(20)}
    found = shares(tensors, world_size)
    for name, tensor in tensors.items():
        pieces = []
        for share in found:
            if name in share.tensors:
                part = share.parts.get(name, TensorPart(global_shape=tuple(tensor.shape), offsets=(0,) * tensor.dim()))
                assert part.global_shape == tuple(tensor.shape)
                pieces.append((part.offsets[0], share.tensors[name]))
        assert torch.equal(torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]), tensor), name
    loads = [sum(map(size_bytes, share.tensors.values())) for share in found]
    assert max(loads) <= 1.1 * sum(loads) / world_size + 100


def test_a_tensor_with_fewer_rows_than_ranks_is_cut_into_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "CUT_BYTES", 10)
    monkeypatch.setattr(partition, "WITNESS_BYTES_MAX", 0)
    found = shares({"w": torch.ones(2, 50)}, 3)
    assert [tuple(share.tensors["w"].shape) for share in found if "w" in share.tensors] == [(1, 50), (1, 50)]


def test_what_nothing_keeps_equal_is_rank_0s_and_its_load_is_counted() -> None:
    tensors = {"buffer": torch.ones(100_000), "a": torch.ones(60_000), "b": torch.ones(40_000)}
    found = shares(tensors, 2, {"a", "b"})
    assert [set(share.tensors) for share in found] == [{"buffer"}, {"a", "b"}]


def test_some_small_tensors_from_all_over_the_state_are_stored_by_every_rank() -> None:
    large = {f"layer{n:02}.weight": torch.ones(10_000) for n in range(40)}
    small = {f"layer{n:02}.bias": torch.ones(100) for n in range(40)}
    counts = {f"layer{n:02}.step": torch.tensor(1.0) for n in range(40)}
    found = [set(share.tensors) for share in shares(large | small | counts, 3)]
    witnesses = found[0] & found[1] & found[2]
    assert witnesses <= small.keys()
    assert len(witnesses) > partition.WITNESSES_MAX / 2
    assert {name[:6] for name in witnesses} == {"layer0", "layer1", "layer2", "layer3"}
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert found[one] & found[other] == witnesses, "all else is stored once"
    assert found[0] | found[1] | found[2] == large.keys() | small.keys() | counts.keys()


def test_the_share_follows_when_the_state_changes() -> None:
    mine = Partition(rank=0, world_size=1)
    for names in ("ab", "abc", "c"):
        tensors = {name: torch.ones(2) for name in names}
        assert mine.share(tensors, spread=set(names), own=(), sharded={}).tensors.keys() == set(names)


def captured(rank: int, world_size: int, **items: object) -> CapturedState:
    tracked = TrackedState(rank=rank, world_size=world_size)
    for name, item in items.items():
        tracked.add(name, item)
    position = DataPosition([torch.zeros(1)])
    position.next_batch()
    return tracked.capture(Step(1), position)


def test_parameters_are_spread_buffers_are_rank_0s_and_what_is_a_ranks_own_is_each_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partition, "WITNESS_BYTES_MAX", 0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    states = [captured(rank, 2, model=model, compiled=torch.compile(nn.Linear(2, 2))) for rank in (0, 1)]
    names = [{name for name in state.tensors if name.startswith("model.")} for state in states]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {f"model.{name}" for name in model.state_dict()}
    assert {f"model.{name}" for name, _ in model.named_buffers()} <= names[0]
    assert names[1], "rank 1 stores parameters"
    assert "compiled.weight" in states[0].tensors.keys() | states[1].tensors.keys(), "named as without torch.compile"
    for rank, state in enumerate(states):
        assert {name for name in state.tensors if name.startswith("_")} == {
            name for name in state.tensors if name.startswith(f"_rank.{rank}.dtrain.")
        }
        assert f"_rank.{rank}.dtrain.random.torch_cpu" in state.tensors


@contextmanager
def rank_of_four(rank: int) -> Iterator[DeviceMesh]:
    """This process as one rank of a 2 x 2 mesh whose collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2, 2))
    finally:
        dist.destroy_process_group()


def test_of_replicas_of_a_part_only_the_first_stores_it() -> None:
    stored = {}
    for rank in range(4):
        with rank_of_four(rank) as mesh:
            local = torch.full((2 if rank % 2 == 0 else 1, 4), float(rank))
            tensor = DTensor.from_local(
                local, mesh, [Replicate(), Shard(0)], run_check=False, shape=torch.Size((3, 4)), stride=(4, 1)
            )
            _, part = local_part(tensor, "w")
            assert part.global_shape == (3, 4)
            stored[rank] = (part.offsets, part.stored_here)
    assert stored == {0: ((0, 0), True), 1: ((2, 0), True), 2: ((0, 0), False), 3: ((2, 0), False)}


def test_a_sum_that_was_not_made_yet_is_refused_by_name_with_the_mend() -> None:
    with rank_of_four(0) as mesh:
        tensor = DTensor.from_local(torch.ones(2), mesh, [Partial(), Replicate()], run_check=False)
        with pytest.raises(TypeError, match=r"model\.w is a DTensor with a Partial placement.*redistribute"):
            Encoder().encode({"w": tensor}, "model")


def test_sharded_state_is_no_ranks_own() -> None:
    with rank_of_four(0) as mesh:
        tensor = DTensor.from_local(torch.ones(2), mesh, [Replicate(), Shard(0)], run_check=False)
        with pytest.raises(TypeError, match=r"is sharded over ranks.*run\.track\(\)"):
            Encoder("_rank.0.").encode_own({"w": tensor}, "model")


def test_what_could_not_be_made_sharded_again_is_refused_when_it_is_saved() -> None:
    with rank_of_four(0) as mesh:
        local = torch.ones(2, dtype=torch.complex128)
        tensor = DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)
        with pytest.raises(TypeError, match=r"model\.w is sharded and of complex128.*view_as_real"):
            Encoder().encode({"w": tensor}, "model")
