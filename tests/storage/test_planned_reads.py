"""torch's planner on our parts: the right bytes at the right places, and a sentence with a name where it cannot."""

from collections.abc import Mapping

import pytest
import torch

from dtrain.common.errors import UserError
from dtrain.storage.catalogs import TensorChunk, WholeTensor
from dtrain.storage.planned_reads import read_planned
from dtrain.storage.ranges import NeededRange


def rows(*cuts: int, columns: int = 3) -> WholeTensor:
    """A float32 tensor cut into rows, each part at the start of its own shard."""
    starts = [0, *cuts[:-1]]
    chunks = tuple(
        TensorChunk(
            shard=shard, shape=(stop - start, columns), offsets=(start, 0), begin=0, end=4 * (stop - start) * columns
        )
        for shard, (start, stop) in enumerate(zip(starts, cuts, strict=True))
    )
    return WholeTensor(dtype="F32", shape=(cuts[-1], columns), chunks=chunks)


def images(value: torch.Tensor, whole: WholeTensor) -> dict[int, memoryview]:
    return {
        chunk.shard: memoryview(
            bytearray(value[chunk.offsets[0] : chunk.offsets[0] + chunk.shape[0]].numpy().tobytes())
        )
        for chunk in whole.chunks
    }


@pytest.mark.parametrize("cuts", [(7,), (2, 7), (3, 3, 7)])
def test_a_whole_tensor_is_filled_from_parts_and_asks_for_each_once(cuts: tuple[int, ...]) -> None:
    value, whole, asked = torch.arange(21.0).view(7, 3), rows(*cuts), set[NeededRange]()

    def bring(needed: set[NeededRange]) -> Mapping[int, memoryview]:
        asked.update(needed)
        return images(value, whole)

    target = torch.nn.Parameter(torch.zeros(7, 3))
    read_planned({"w": target}, {"w": whole, "other": rows(4)}, bring)
    assert torch.equal(target, value) and target.requires_grad
    filled = [chunk for chunk in whole.chunks if chunk.volume]
    assert asked == {NeededRange(shard=one.shard, tensor="w", begin=0, end=one.end) for one in filled}


def test_numbers_without_a_dimension_and_tensors_without_elements_need_nothing_special() -> None:
    one = TensorChunk(shard=0, shape=(), offsets=(), begin=0, end=4)
    none = TensorChunk(shard=0, shape=(0, 5), offsets=(0, 0), begin=4, end=4)
    wholes = {
        "step": WholeTensor(dtype="F32", shape=(), chunks=(one,)),
        "empty": WholeTensor(dtype="F32", shape=(0, 5), chunks=(none,)),
    }
    targets = {"step": torch.zeros(()), "empty": torch.empty(0, 5)}
    asked = []

    def bring(needed: set[NeededRange]) -> Mapping[int, memoryview]:
        asked.extend(needed)
        return {0: memoryview(bytearray(torch.tensor(3.0).numpy().tobytes()))}

    read_planned(targets, wholes, bring)
    assert targets["step"] == 3 and [need.tensor for need in asked] == ["step"]


def nothing(needed: set[NeededRange]) -> Mapping[int, memoryview]:
    raise AssertionError(f"nothing may be read, but was: {needed}")


def test_what_the_planner_refuses_is_told_with_the_tensors_name() -> None:
    targets = {"fits": torch.zeros(4, 3), "model.other": torch.zeros(4, 4)}
    with pytest.raises(UserError, match=r"tensor 'model\.other' .* cannot be laid out.*[Ss]ize") as caught:
        read_planned(targets, {"fits": rows(4), "model.other": rows(4)}, nothing)
    assert isinstance(caught.value.__cause__, ValueError), "torch's own words are kept"


def test_a_hole_in_what_was_saved_is_never_left_to_chance() -> None:
    whole = rows(2, 4)
    holed = WholeTensor(dtype="F32", shape=(4, 3), chunks=whole.chunks[:1])
    with pytest.raises(UserError, match=r"'w' .*: 6 of the 12 elements on this rank were saved"):
        read_planned({"w": torch.zeros(4, 3)}, {"w": holed}, nothing)
