"""A resumed run sees exactly the batches, and draws exactly the random numbers, of the uninterrupted one."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from dtrain.common.errors import UserError
from dtrain.storage.tree_values import decode
from dtrain.trainer import random_states
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.random_states import RandomStates
from dtrain.trainer.state_tree import Encoder

ITEMS = 22
BATCH = 4  # six batches an epoch, the last one short
STEPS = 15  # into the third epoch


class Noisy(Dataset[torch.Tensor]):
    """Items that are augmented by every global generator, in whichever process loads them."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)

    def __len__(self) -> int:
        return ITEMS


def plain(**options: Any) -> Callable[[], DataLoader[torch.Tensor]]:
    return lambda: DataLoader(Noisy(), batch_size=BATCH, **options)


def own_generators() -> DataLoader[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(Noisy(), batch_size=BATCH, shuffle=True, generator=generator)


def weighted() -> DataLoader[torch.Tensor]:
    return DataLoader(Noisy(), batch_size=BATCH, sampler=WeightedRandomSampler([1.0] * ITEMS, ITEMS))


def distributed() -> DataLoader[torch.Tensor]:
    sampler: DistributedSampler[torch.Tensor] = DistributedSampler(Noisy(), num_replicas=2, rank=1, shuffle=True)
    return DataLoader(Noisy(), batch_size=BATCH, sampler=sampler)


def stateful(num_workers: int) -> Callable[[], Iterable[torch.Tensor]]:
    return lambda: StatefulDataLoader(_Indexed(), batch_size=BATCH, shuffle=True, num_workers=num_workers)


class _Indexed(Noisy):
    """Augmented by index alone: a StatefulDataLoader does not replay what its workers drew."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, index * 0.5], dtype=torch.float64)


LOADERS: dict[str, Callable[[], Iterable[torch.Tensor]]] = {
    "in order": plain(),
    "shuffled": plain(shuffle=True),
    "shuffled, two workers": plain(shuffle=True, num_workers=2, multiprocessing_context="fork"),
    "own generator": own_generators,
    "weighted": weighted,
    "distributed": distributed,
    "stateful": stateful(0),
    "stateful, two workers": stateful(2),
    "a list": lambda: [torch.full((3,), float(at)) for at in range(6)],
}


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def train(position: DataPosition[torch.Tensor], steps: int) -> Iterator[list[object]]:
    """Yield what each step saw and drew; the body draws from every generator, as dropout would."""
    for _ in range(steps):
        batch = position.next_batch()
        yield [batch.tolist(), random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(3).tolist()]


def saved(position: DataPosition[torch.Tensor]) -> str:
    """Return position and random states as they would lie in a shard, tensors included."""
    encoder = Encoder()
    tree = encoder.encode([position.capture(), random_states.capture().to_state()], "it")
    tensors = {name: [str(item.dtype).removeprefix("torch."), item.tolist()] for name, item in encoder.tensors.items()}
    return json.dumps([tree, tensors])


def resumed(
    loader: Iterable[torch.Tensor], text: str, *, world: tuple[int, int] = (2, 2)
) -> DataPosition[torch.Tensor]:
    tree, tensors = json.loads(text)

    def load(name: str) -> torch.Tensor:
        dtype, values = tensors[name]
        return torch.tensor(values, dtype=getattr(torch, dtype))

    place, states = decode(tree, load, torch.device("cpu"))
    position = DataPosition(loader)
    position.seek(place, saved_world_size=world[0], world_size=world[1])
    random_states.restore(RandomStates.from_state(states))
    return position


@pytest.mark.parametrize("kind", LOADERS)
def test_resuming_after_any_step_changes_nothing(kind: str) -> None:
    make = LOADERS[kind]
    seed(1)
    uninterrupted = list(train(DataPosition(make()), STEPS))
    cuts = range(1, STEPS) if "workers" not in kind else (1, 5, 6, 7, 12, 14)
    for cut in cuts:  # 6 and 12 are exactly at an epoch's end
        seed(1)
        position = DataPosition(make())
        before = list(train(position, cut))
        text = saved(position)
        position.close()
        seed(999)  # a fresh process has other states
        after = list(train(resumed(make(), text), STEPS - cut))
        assert before + after == uninterrupted, f"cut after step {cut}"


def test_with_persistent_workers_the_order_is_exact() -> None:
    def make() -> DataLoader[torch.Tensor]:
        return DataLoader(
            _Indexed(),
            batch_size=BATCH,
            shuffle=True,
            num_workers=1,
            persistent_workers=True,
            multiprocessing_context="fork",
        )

    seed(1)
    uninterrupted = list(train(DataPosition(make()), STEPS))
    for cut in (3, 6, 8, 13):
        seed(1)
        position = DataPosition(make())
        before = list(train(position, cut))
        text = saved(position)
        seed(999)
        assert before + list(train(resumed(make(), text), STEPS - cut)) == uninterrupted, f"cut after step {cut}"


def test_an_interrupted_run_can_be_interrupted_again() -> None:
    make = LOADERS["shuffled"]
    seed(1)
    uninterrupted = list(train(DataPosition(make()), STEPS))
    seed(1)
    position = DataPosition(make())
    seen = list(train(position, 4))
    for more in (4, 4, 3):
        text = saved(position)
        seed(999)
        position = resumed(make(), text)
        seen += train(position, more)
    assert seen == uninterrupted


def test_on_another_world_size_all_ranks_together_go_on_where_they_were() -> None:
    class Numbers(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

        def __len__(self) -> int:
            return 48

    def loader(rank: int, world: int) -> DataLoader[Any]:
        sampler: DistributedSampler[int] = DistributedSampler(Numbers(), num_replicas=world, rank=rank, shuffle=True)
        return DataLoader(Numbers(), batch_size=2, sampler=sampler)

    first = [DataPosition(loader(rank, 3)) for rank in range(3)]
    seen = [item for position in first for _ in range(4) for item in position.next_batch().tolist()]
    texts = [saved(position) for position in first]
    second = [resumed(loader(rank, 2), texts[rank], world=(3, 2)) for rank in range(2)]
    seen += [item for position in second for _ in range(6) for item in position.next_batch().tolist()]
    assert sorted(seen) == list(range(48))
    assert all(position.epoch == 0 for position in second)


def test_a_loader_without_data_is_refused() -> None:
    with pytest.raises(UserError, match="gave no batch in epoch 0"):
        DataPosition(list[int]()).next_batch()


def test_an_iterator_that_cannot_begin_again_is_refused_when_it_ends() -> None:
    position = DataPosition(iter([1, 2]))
    assert [position.next_batch(), position.next_batch()] == [1, 2]
    with pytest.raises(UserError, match="gave no batch in epoch 1"):
        position.next_batch()


def test_a_checkpoint_of_another_kind_of_loader_is_refused() -> None:
    position = DataPosition(LOADERS["stateful"]())
    position.next_batch()
    text = saved(position)
    with pytest.raises(UserError, match="with the kind of loader"):
        resumed(LOADERS["shuffled"](), text)
