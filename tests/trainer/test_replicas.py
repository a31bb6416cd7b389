"""Ranks that should hold the same and do not: their shares are never joined into a state that no rank had."""

import pytest
import torch
from torch import nn

from dtrain.storage.catalogs import IncompleteCheckpoint
from tests.trainer.test_pipelines import catalog, staged

FEATURES = 256  # weights of a quarter of a MiB, which no rank but one stores


def shard_of(rank: int, *, seed: int, frozen: bool = False) -> bytes:
    """Return what one of two ranks stages of a model that it made and trained alone."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(3)))
    if frozen:
        torch.manual_seed(0)
        for layer in list(model)[:2]:
            layer.requires_grad_(False)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.1)
    torch.manual_seed(seed)
    model(torch.randn(4, FEATURES)).square().sum().backward()
    optimizer.step()
    return staged(rank, model, optimizer, name="optimizer", world_size=2)


def test_replicas_that_are_equal_are_stored_together() -> None:
    found = catalog([shard_of(rank, seed=1) for rank in (0, 1)])
    owners = {chunk.shard for name in found.tensors if name.endswith("weight") for chunk in found.tensors[name].chunks}
    assert owners == {0, 1}, "large tensors are spread"


@pytest.mark.parametrize("frozen", [False, True], ids=["all differs", "most is frozen and equal"])
def test_replicas_that_differ_are_refused_with_the_tensor_the_ranks_and_the_mend(frozen: bool) -> None:
    with pytest.raises(
        IncompleteCheckpoint, match=r"tensor '\S+': ranks 0 and 1 hold different values .* run\.track_local\(\)"
    ):
        catalog([shard_of(rank, seed=rank, frozen=frozen) for rank in (0, 1)])
