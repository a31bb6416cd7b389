"""What a checkpoint of one rank holds, taken and put back: tracked objects, data position, random states.

All of it is of the same step. Putting back has an order that matters: first the objects, then the data position
(whose replay draws random numbers), the random states last.
"""

import logging
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from dtrain.common.errors import PermanentError, UserError
from dtrain.common.names import Step
from dtrain.trainer import random_states
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.random_states import RandomStates
from dtrain.trainer.state_tree import Encoder, Json, decode
from dtrain.trainer.tensor_codes import size_bytes

_log = logging.getLogger("dtrain")


@runtime_checkable
class Stateful(Protocol):
    """Anything that can tell its state as plain data and take it back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class TensorSource(Protocol):
    """Where the tensors of a saved state are read from."""

    def __call__(self, name: str) -> torch.Tensor:
        """Return the tensor of this name, on the CPU, owned by the caller."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedState:
    """A rank's state at the end of one step, before its bytes are copied."""

    step: Step
    tree: dict[str, Json]  # "objects": {name: tree}, "position": tree, "random": tree
    tensors: dict[str, torch.Tensor]  # views of the live state


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A rank's state read from a shard. Its tensors are read when they are asked for."""

    step: Step
    rank: int  # whose shard this is; not always the rank that restores it
    world_size: int  # of the run that saved it
    tree: dict[str, Any]
    load: TensorSource


class TrackedState:
    """The objects that the script asked to keep, by name."""

    def __init__(self) -> None:
        self._objects: dict[str, Stateful] = {}
        self._sources: dict[str, object] = {}  # tracked data loaders without a state of their own

    def __bool__(self) -> bool:
        return bool(self._objects or self._sources)

    def add(self, name: str, item: object) -> None:
        """Track ``item``. Raises :class:`UserError` if the name is taken or the item cannot be tracked."""
        if name in self._objects or name in self._sources:
            raise UserError(f"run.track({name}=...) was called twice: give each object its own name, once.")
        if name.startswith("_"):
            raise UserError(f"run.track({name}=...): a name must not start with an underscore.")
        if isinstance(item, Stateful):
            self._objects[name] = item
        elif hasattr(item, "__iter__"):
            self._sources[name] = item
        else:
            raise UserError(
                f"run.track({name}=...) cannot keep a {type(item).__module__}.{type(item).__qualname__}: "
                "give it state_dict() and load_state_dict(), or track something that has them."
            )

    def bind_loader(self, loader: object) -> None:
        """Say which loader the steps take their batches from: its state is the data position."""
        self._objects = {name: item for name, item in self._objects.items() if item is not loader}
        for name, item in self._sources.items():
            if item is not loader:
                raise UserError(
                    f"run.track({name}=...) got a {type(item).__name__} without state_dict(), and it is not the loader "
                    "given to run.steps(): only that one's position can be followed."
                )

    def capture(self, step: Step, position: DataPosition[Any]) -> CapturedState:
        """Return the state at the end of ``step``. Raises TypeError naming what cannot be stored."""
        encoder = Encoder()
        objects: Json = {name: encoder.encode(item.state_dict(), name) for name, item in self._objects.items()}
        tree: dict[str, Json] = {
            "objects": objects,
            "position": encoder.encode(position.capture(), "dtrain.position"),
            "random": encoder.encode(random_states.capture().to_state(), "dtrain.random"),
        }
        return CapturedState(step=step, tree=tree, tensors=encoder.tensors)

    def estimate_bytes(self) -> int:
        """Return about how many bytes the tensors of a capture take.

        Safe in any thread at any time, for it calls no code of the script: an object's state_dict() may run
        collectives, or change what it shows. So what is in neither modules nor optimizers is not counted.
        Raises RuntimeError if an object is changed meanwhile.
        """
        total_bytes = 0
        for item in self._objects.values():
            if isinstance(item, torch.nn.Module):
                for module in item.modules():  # a tensor of two names is stored twice, but seldom: counted once
                    held = [*module._parameters.values(), *module._buffers.values()]
                    total_bytes += sum(size_bytes(tensor) for tensor in held if tensor is not None)
            elif isinstance(item, torch.optim.Optimizer):
                for state in list(item.state.values()):
                    values = list(state.values()) if isinstance(state, dict) else []
                    total_bytes += sum(size_bytes(value) for value in values if isinstance(value, torch.Tensor))
        return total_bytes

    def restore_objects(self, saved: SavedState, device: torch.device) -> None:
        """Load every tracked object. Raises :class:`UserError` naming the object that does not fit."""
        trees = _section(saved, "objects")
        if missing := sorted(self._objects.keys() - trees.keys()):
            raise UserError(
                f"the checkpoint of step {saved.step} holds no {', '.join(missing)} (it holds {', '.join(trees)}): "
                "track the objects under the names they were saved with, or submit under another job name."
            )
        for name in trees.keys() - self._objects.keys():
            _log.warning("the checkpoint of step %d holds %r, which is not tracked now: left out", saved.step, name)
        for name, item in self._objects.items():
            value = decode(trees[name], saved.load, device)
            try:
                item.load_state_dict(value)
            except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(
                    f"{name} ({type(item).__name__}) does not accept its state of step {saved.step}: {error}. "
                    "Build it as it was when it was saved, or submit under another job name."
                ) from error

    def restore_position(
        self, saved: SavedState, position: DataPosition[Any], *, rank: int, world_size: int, seek: bool
    ) -> None:
        """Go to the saved place in the data (if ``seek``), and then set the random states."""
        cpu = torch.device("cpu")
        if seek:
            place = decode(_section(saved, "position"), saved.load, cpu)
            position.seek(place, saved_world_size=saved.world_size, world_size=world_size)
        states = RandomStates.from_state(decode(_section(saved, "random"), saved.load, cpu))
        if (saved.rank, saved.world_size) == (rank, world_size):
            random_states.restore(states)
            return
        _log.warning(
            "rank %d of %d starts from the state of rank %d of %d: its random numbers are seeded anew from "
            "that state, the step and the rank",
            *(rank, world_size, saved.rank, saved.world_size),
        )
        random_states.reseed(states, step=saved.step, rank=rank, world_size=world_size)


def _section(saved: SavedState, name: str) -> Any:
    if name not in saved.tree:
        raise PermanentError(f"the checkpoint of step {saved.step} has no {name!r} in its tree")
    return saved.tree[name]
