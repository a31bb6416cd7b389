"""A checkpoint of one world is read in another: other ranks, other sharding, the same bits."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dtrain.common.mailbox import RestoreState, pack, unpack
from dtrain.storage.catalogs import Catalog, catalog_of
from dtrain.storage.indexes import index_shard, open_index
from tests.support.warm_scripts import WarmScripts
from tests.trainer.playing_worker import RankFolder, offer

SCRIPT = Path(__file__).parent / "sharded_script.py"
STEPS = 3


@dataclass(frozen=True)
class Saved:
    shards: list[bytes]
    tensors: dict[str, torch.Tensor]  # each whole


def run(
    warm: WarmScripts, folder: Path, how: str, world: int, shards: list[bytes] | None = None, until: int = STEPS
) -> tuple[Saved, list[dict[str, Any]]]:
    """Train until ``until`` from ``shards`` (or from nothing), with a checkpoint at the end if there are steps."""
    steps = until > STEPS or shards is None
    folder.mkdir()
    with ExitStack() as stack:
        ranks = [stack.enter_context(RankFolder(folder / "g1", rank=rank, world_size=world)) for rank in range(world)]
        if shards is not None:
            offer(ranks, shards)
        for rank in ranks:
            if shards is None:
                rank.mailbox.restore = RestoreState.NOTHING
            if steps:
                rank.mailbox.request = pack(1, until)
            rank.start_warm(warm, SCRIPT, how, str(folder), str(until))
        staged = []
        for rank in ranks:
            assert rank.wait_exit() == 0, rank.output()
            word, slot, size_bytes = rank.mailbox.staged
            if steps:
                assert unpack(word) == (1, until), rank.output()
                staged.append((rank.path / f"slot{slot}").read_bytes()[:size_bytes])
    told = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    return Saved(staged, load_file(folder / "whole.safetensors")), told


def catalog(shards: list[bytes]) -> Catalog:
    found = [index_shard(memoryview(data))[0] for data in shards]
    return catalog_of([open_index(data, key=str(rank), shard_key=str(rank)) for rank, data in enumerate(found)])


@pytest.fixture(scope="module")
def saved(warm: WarmScripts, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Saved]:
    """Checkpoints by wrapping and world size, each made once."""
    known: dict[tuple[str, int], Saved] = {}

    def make(how: str, world: int) -> Saved:
        if (how, world) not in known:
            known[how, world], _ = run(warm, tmp_path_factory.mktemp("saved") / f"{how}{world}", how, world)
        return known[how, world]

    return make


@pytest.mark.parametrize(
    ("how", "world", "then", "then_world"),
    [
        ("ddp", 2, "fsdp", 2),
        ("fsdp", 2, "ddp", 2),
        ("fsdp", 2, "fsdp", 1),
        ("inside", 2, "inside", 2),
        ("inside", 2, "inside", 1),
        ("inside", 1, "inside", 2),
        ("fsdp", 1, "fsdp", 2),
        ("fsdp", 3, "fsdp", 2),
        ("fsdp", 2, "plain", 1),
        ("fsdp", 2, "fsdp", 2),
        ("tp", 2, "fsdp", 1),
        ("fsdp_tp", 4, "tp", 2),
        ("tp", 2, "fsdp_tp", 4),
    ],
)
def test_every_tensor_is_the_same_bits_in_another_world(
    how: str,
    world: int,
    then: str,
    then_world: int,
    saved: Callable[[str, int], Saved],
    warm: WarmScripts,
    tmp_path: Path,
) -> None:
    before = saved(how, world)
    after, told = run(warm, tmp_path / "then", then, then_world, before.shards)
    assert all(rank["restored"] and rank["tied"] for rank in told)
    moved = (how, world) != (then, then_world)
    assert [rank["planned"] for rank in told] == [moved] * then_world, "what did not move needs no planner"
    assert [rank["own"] for rank in told] == [[float(rank % world)] * 3 for rank in range(then_world)]
    average = {"average"} if how == "inside" else set()
    assert {name.split(".")[0] for name in before.tensors} == {"model", "optimizer"} | average
    same_bits(before.tensors, after.tensors)


def same_bits(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        found = after[name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_two_ranks_go_on_as_one_and_then_as_three(
    saved: Callable[[str, int], Saved], warm: WarmScripts, tmp_path: Path
) -> None:
    before = saved("ddp", 2)
    for number, world in enumerate((1, 3), start=1):
        folder = tmp_path / str(world)
        after, told = run(warm, folder, "ddp", world, before.shards, until=STEPS + number)
        assert all(rank["restored"] and rank["planned"] for rank in told)
        same_bits(before.tensors, load_file(folder / "begun.safetensors"))
        assert not torch.equal(after.tensors["model.body.weight"], before.tensors["model.body.weight"]), "it trained on"
        before = after


def test_what_an_object_of_the_scripts_own_makes_at_its_first_step_is_sharded_again(
    saved: Callable[[str, int], Saved], warm: WarmScripts, tmp_path: Path
) -> None:
    before = saved("inside", 2)
    after, told = run(warm, tmp_path / "then", "inside", 2, before.shards, until=STEPS + 1)
    assert all(rank["restored"] for rank in told)
    same_bits(before.tensors, load_file(tmp_path / "then" / "begun.safetensors"))
    assert not torch.equal(after.tensors["model.body.weight"], before.tensors["model.body.weight"]), "it trained on"


def test_equal_state_is_stored_once_and_every_rank_stores_its_share(saved: Callable[[str, int], Saved]) -> None:
    found = catalog(saved("ddp", 2).shards)
    tensors = found.tensors
    kept_bytes = [
        chunk.end - chunk.begin
        for name, tensor in tensors.items()
        for chunk in tensor.chunks
        if name.startswith(("model.", "optimizer."))
    ]
    assert sum(kept_bytes) == sum(tensor.numel() * tensor.element_size() for tensor in saved("ddp", 2).tensors.values())
    sent_bytes = [
        sum(
            span.end - span.begin
            for name, span in shard.header.tensors.items()
            if name.startswith(("model.", "optimizer."))
        )
        for shard in found.shards
    ]
    assert max(sent_bytes) < 0.6 * sum(sent_bytes)
    assert len(tensors["model.embedding.weight"].chunks) == 2, "large tensors are cut into rows"
    assert {chunk.shard for chunk in tensors["model.norm.running_mean"].chunks} == {0}, "buffers are rank 0's"
    assert tensors["_rank.0.own.held"].chunks[0].shard == 0 and tensors["_rank.1.own.held"].chunks[0].shard == 1


def test_names_are_the_same_however_the_model_is_wrapped(saved: Callable[[str, int], Saved]) -> None:
    names = [
        {name for name in catalog(saved(how, 2).shards).tensors if name.startswith(("model.", "optimizer."))}
        for how in ("ddp", "fsdp")
    ]
    assert names[0] == names[1]
