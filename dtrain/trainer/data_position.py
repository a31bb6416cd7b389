"""The data position: where in its data a rank is, so that a resumed run sees exactly the batches it would have seen.

A loader that can tell and take its own state (torchdata's StatefulDataLoader) does so. Any other one (a plain
DataLoader, a list, whatever can be iterated again) is positioned by replay: the random states are set to what they
were before the epoch's ``iter()``, because a shuffling loader draws its order from them; the batches already consumed
are read again and dropped; only then are the checkpoint's own random states set, because ``iter()`` draws too.

Replay also repeats what workers (``num_workers > 0``) drew for augmentation, since their seeds come from the epoch's
``iter()``. Its price is reading the epoch's consumed batches once more.

Limits:
- An iterator that is not started anew by ``iter()`` is positioned from its first batch on, and has one epoch.
- With ``persistent_workers`` the order of batches is exact; what such a worker drew in earlier epochs is not repeated.
- On another world size a DistributedSampler's position is scaled to the samples that all ranks together consumed,
  rounded down, so up to one batch a rank is seen again. Other samplers keep their own count of batches. A loader with
  its own state takes the state of the rank whose shard this rank was given.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch.utils.data.distributed import DistributedSampler

from dtrain.common.errors import PermanentError, UserError
from dtrain.trainer import random_states
from dtrain.trainer.random_states import RandomStates

Batch = TypeVar("Batch")
_END = object()  # no batch is this
_log = logging.getLogger("dtrain")
REPLAY_TOLD_AT = 1000  # batches: fewer are read again before anybody wonders


@dataclass(frozen=True, slots=True, kw_only=True)
class _EpochStart:
    """What an epoch's order is drawn from."""

    states: RandomStates  # before iter()
    generators: list[torch.Tensor]  # states of the loader's own generators then, in the order of _generators()


class DataPosition(Generic[Batch]):
    """Gives batches, epoch after epoch, and knows where it is."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self._loader = loader
        self._iterator: Iterator[Batch] | None = None
        self._epoch = 0  # epochs completed
        self._batches = 0  # batches of this epoch handed out
        self._start: _EpochStart | None = None  # None for a loader with its own state, and before the first batch

    @property
    def epoch(self) -> int:
        """Epochs completed so far."""
        return self._epoch

    def next_batch(self) -> Batch:
        """Return the next batch, of the next epoch if this one is over. Raises :class:`UserError` on no data."""
        while True:
            iterator = self._iterator if self._iterator is not None else self._begin_epoch()
            batch = next(iterator, _END)
            if batch is not _END:
                self._batches += 1
                return cast("Batch", batch)
            if self._batches == 0:
                raise UserError(
                    f"the data loader ({type(self._loader).__name__}) gave no batch in epoch {self._epoch}: "
                    "give one with data, that can be iterated once for each epoch."
                )
            self._next_epoch()

    def close(self) -> None:
        """Let go of the iterator, and so of its worker processes."""
        self._iterator = None

    def capture(self) -> dict[str, Any]:
        """Return the position after the last batch handed out, as plain data."""
        own = self._loader.state_dict() if _has_own_state(self._loader) else None  # type: ignore[attr-defined]
        start = self._start
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "loader": own,
            "generators": [generator.get_state() for generator in _generators(self._loader)],
            "start": None
            if start is None
            else {"states": start.states.to_state(), "generators": list(start.generators)},
        }

    def seek(self, position: dict[str, Any], *, saved_world_size: int, world_size: int) -> None:
        """Go where ``position`` says. Changes the global random states: set them afterwards."""
        self._epoch, batches = position["epoch"], position["batches"]
        if _has_own_state(self._loader) != (position["loader"] is not None):
            raise UserError(
                f"the checkpoint's data position does not fit this loader ({type(self._loader).__name__}): "
                "resume with the kind of loader (with or without state_dict) that was used when it was saved."
            )
        if position["loader"] is not None:
            self._loader.load_state_dict(position["loader"])  # type: ignore[attr-defined]
            self._begin_epoch()
            self._batches = batches
            return
        if saved_world_size != world_size and _is_distributed(self._loader):
            batches = batches * saved_world_size // world_size
        self._replay(position, batches)

    def _replay(self, position: dict[str, Any], batches: int) -> None:
        start = position["start"]
        if start is None:
            raise PermanentError("the checkpoint holds no start of its epoch, so its data position cannot be found")
        if self._epoch > 0 and getattr(self._loader, "persistent_workers", False):
            # From its second iter() on such a loader draws less: make that one the second here too.
            iter(self._loader)
        if batches >= REPLAY_TOLD_AT:
            _log.warning(
                "reads %d batches again to find its place in the data: a loader with a state_dict() need not", batches
            )
        random_states.restore(RandomStates.from_state(start["states"]))
        self._set_generators(start["generators"])
        iterator = self._begin_epoch()
        skipped = 0
        while skipped < batches:
            if next(iterator, _END) is _END:
                break  # fewer in this world than before: the epoch is over, which next_batch() will find
            skipped += 1
        self._batches = batches
        self._set_generators(position["generators"])

    def _begin_epoch(self) -> Iterator[Batch]:
        for sampler in _samplers(self._loader):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(self._epoch)
        if not _has_own_state(self._loader):
            generators = [generator.get_state() for generator in _generators(self._loader)]
            self._start = _EpochStart(states=random_states.capture(), generators=generators)
        self._iterator = iter(self._loader)
        return self._iterator

    def _next_epoch(self) -> None:
        self._iterator = None
        self._epoch += 1
        self._batches = 0

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        generators = _generators(self._loader)
        if len(generators) != len(states):
            raise UserError(
                f"the loader has {len(generators)} random generators of its own, the checkpoint {len(states)}: "
                "resume with the loader that was used when it was saved."
            )
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _has_own_state(loader: object) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _samplers(loader: object) -> list[object]:
    """Return the loader's samplers, each once, the outer ones first."""
    outer = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), outer, getattr(outer, "sampler", None)]
    return [item for at, item in enumerate(found) if item is not None and all(item is not one for one in found[:at])]


def _generators(loader: object) -> list[torch.Generator]:
    """Return the random generators that the loader draws its order from, apart from torch's global one."""
    found = [getattr(item, "generator", None) for item in (loader, *_samplers(loader))]
    return [
        item
        for at, item in enumerate(found)
        if isinstance(item, torch.Generator) and all(item is not one for one in found[:at])
    ]


def _is_distributed(loader: object) -> bool:
    return any(isinstance(sampler, DistributedSampler) for sampler in _samplers(loader))
