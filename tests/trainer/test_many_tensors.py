"""Thousands of small tensors: what is kept from checkpoint to checkpoint saves time, and changes no byte."""

import json
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.common.names import Step
from dtrain.storage.shards import LENGTH_BYTES, parse_header
from dtrain.trainer.copying import Copier
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.staging import ShardLayouts, tree_text
from dtrain.trainer.tracking import TrackedState


class Holding:
    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Rank:
    """One rank's way from objects to a shard, kept from checkpoint to checkpoint."""

    def __init__(self, world_size: int, **items: Any) -> None:
        self.tracked = TrackedState(rank=0, world_size=world_size)
        for name, item in items.items():
            self.tracked.add(name, item)
        self.layouts = ShardLayouts(rank=0, world_size=world_size)

    def page(self) -> bytearray:
        image = self.layouts.lay_out(self.tracked.capture(Step(1), DataPosition([1])))
        page = bytearray(image.plan.total_bytes)
        image.copy_into(memoryview(page), Copier(1))
        return page

    def staged(self) -> tuple[str, bytes]:
        """Return the header's text without its padding, and the data."""
        page = self.page()
        start = parse_header(page).data_start
        return page[LENGTH_BYTES:start].decode().rstrip(), bytes(page[start:])


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_kept_changes_no_byte_whatever_changes_in_between(world_size: int) -> None:
    held = Holding({"a": torch.ones(3), "b": {"c": torch.zeros(2, 2)}, "lr": 0.5})
    model = torch.nn.BatchNorm1d(4)
    kept = Rank(world_size, held=held, model=model)
    seen = set()
    for change in (
        {},
        {"lr": 1},  # a scalar's type
        {"lr": 12345678901},
        {"a": torch.full((3,), 7.0)},
        {"a": torch.ones(3, 1)},  # shape
        {"a": torch.ones(3, 1, dtype=torch.float64)},  # type
        {"a": torch.ones(1, 3, dtype=torch.complex128)},
        {"a": torch.ones(3, 2).T},  # not dense
        {"a": torch.zeros(2, 3, requires_grad=True)},
        {"d": torch.arange(3)},  # structure
        {"b": {"c": [torch.zeros(2, 2)]}},
        {"b.c": torch.ones(2), "b": {"c": torch.zeros(2)}},  # two tensors, one path
        {"b": "text", "ü\x7f\n": "\ud800"},
    ):
        held.state = {**held.state, **change}
        found = kept.staged()
        assert found == Rank(world_size, held=held, model=model).staged(), change
        seen.add(found)
    assert len(seen) == 13, "every change is in the shard"


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.booleans(), st.none(), st.integers(-(2**63), 2**63 - 1))))
def test_a_trees_text_is_to_the_byte_what_the_standard_library_writes(tree: dict[str, Any]) -> None:
    assert tree_text(tree) == json.dumps(tree, separators=(",", ":"))


def test_a_small_tensor_costs_few_calls() -> None:
    many = 2000
    rank = Rank(1, held=Holding({f"t{number}": torch.zeros(2) for number in range(many)}))
    rank.page()
    calls = 0

    def count(_frame: object, event: str, _what: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        rank.page()
    finally:
        sys.setprofile(None)
    assert calls < 12 * many  # calls, for time on a busy machine says little; half of them are torch's
