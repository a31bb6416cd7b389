"""What a checkpoint of one rank holds, taken and put back: tracked objects, data position, random states.

All of it is of the same step. Putting back has an order that matters: first the objects, then the data position
(whose replay draws random numbers), the random states last.

Names are the same however a model is wrapped: of DDP and of torch.compile the model inside is kept. So a checkpoint
of a DDP run can be read into a model sharded by FSDP2, and the other way round.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from dtrain.common.errors import PermanentError, UserError
from dtrain.common.names import Step
from dtrain.storage.catalogs import OWN_PREFIX, Json, WholeTensor
from dtrain.storage.tensor_codes import is_sharded, size_bytes
from dtrain.storage.tree_values import decode
from dtrain.trainer import random_states
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.partition import Partition
from dtrain.trainer.parts import TensorPart
from dtrain.trainer.random_states import RandomStates
from dtrain.trainer.state_size import tensors_of
from dtrain.trainer.state_tree import Encoder
from dtrain.trainer.targets import Targets

_log = logging.getLogger("dtrain")


@runtime_checkable
class Stateful(Protocol):
    """Anything that can tell its state as plain data and take it back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedState:
    """A rank's share of the state at the end of one step, before its bytes are copied."""

    step: Step
    tree: dict[str, Json]  # "objects": {name: tree}, "local": {name: tree}, "position": tree, "random": tree
    tensors: dict[str, torch.Tensor]  # views of the live state: what this rank stores
    parts: dict[str, TensorPart] = field(default_factory=dict)  # of those that are not whole
    first_counts: tuple[str, ...] = ()  # of those which other ranks may store with other values: the first rank counts


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A checkpoint, as one rank starts from it."""

    step: Step
    rank: int  # whose tree this is; not always the rank that restores it
    world_size: int  # of the run that saved it
    tree: Mapping[str, Any]
    wholes: Mapping[str, WholeTensor]  # every tensor of the checkpoint
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)  # once read: those that were asked for

    def load(self, name: str) -> torch.Tensor:
        """Return a tensor that was read."""
        return self.tensors[name]


class TrackedState:
    """The objects that the script asked to keep, by name."""

    def __init__(self, *, rank: int = 0, world_size: int = 1) -> None:
        self._objects: dict[str, Stateful] = {}  # the same on every rank, or sharded over the ranks
        self._local: dict[str, Stateful] = {}  # different on each rank
        self._sources: dict[str, object] = {}  # tracked data loaders without a state of their own
        self._rank = rank
        self._world_size = world_size
        self._partition = Partition(rank=rank, world_size=world_size)

    def __bool__(self) -> bool:
        return bool(self._objects or self._local or self._sources)

    def add(self, name: str, item: object) -> None:
        """Track ``item``. Raises :class:`UserError` if the name is taken or the item cannot be tracked."""
        self._check_name(name)
        item = _tellable(item)
        if isinstance(item, Stateful):
            self._objects[name] = item
        elif hasattr(item, "__iter__"):
            self._sources[name] = item
        else:
            raise UserError(_cannot_keep("track", name, item))

    def add_local(self, name: str, item: object) -> None:
        """Track ``item``, which is this rank's own. Raises :class:`UserError` as :meth:`add` does."""
        self._check_name(name)
        item = _tellable(item)
        if not isinstance(item, Stateful):
            raise UserError(_cannot_keep("track_local", name, item))
        self._local[name] = item

    def _check_name(self, name: str) -> None:
        if name in self._objects or name in self._local or name in self._sources:
            raise UserError(f"run.track({name}=...) was called twice: give each object its own name, once.")
        if name.startswith("_"):
            raise UserError(f"run.track({name}=...): a name must not start with an underscore.")

    def bind_loader(self, loader: object) -> None:
        """Say which loader the steps take their batches from: its state is the data position."""
        self._objects = {name: item for name, item in self._objects.items() if item is not loader}
        self._local = {name: item for name, item in self._local.items() if item is not loader}
        for name, item in self._sources.items():
            if item is not loader:
                raise UserError(
                    f"run.track({name}=...) got a {type(item).__name__} without state_dict(), and it is not the loader "
                    "given to run.steps(): only that one's position can be followed. For anything else, wrap it in an "
                    "object that has state_dict() and load_state_dict()."
                )

    # ---- taking ------------------------------------------------------------------------------------------

    def capture(self, step: Step, position: DataPosition[Any]) -> CapturedState:
        """Return this rank's share of the state at the end of ``step``. Raises TypeError naming what cannot be stored.

        Talks to no other rank.
        """
        encoder = Encoder(f"{OWN_PREFIX}.{self._rank}.")
        spread: set[str] = set()
        apart: dict[str, bool] = {}
        objects: dict[str, Json] = {}
        for name, item in self._objects.items():
            before = len(encoder.tensors)
            objects[name] = encoder.encode(unwrapped(item).state_dict(), name)
            names = list(encoder.tensors)[before:]
            spread.update(_equal_on_every_rank(name, item, names))
            apart.update(self._held_apart(encoder, names))
        tree: dict[str, Json] = {
            "objects": objects,
            "local": {name: encoder.encode_own(item.state_dict(), name) for name, item in self._local.items()},
            "position": encoder.encode_own(position.capture(), "dtrain.position"),
            "random": encoder.encode_own(random_states.capture().to_state(), "dtrain.random"),
        }
        own = [name for name in encoder.tensors if name.startswith(encoder.own_prefix)]
        share = self._partition.share(encoder.tensors, spread=spread, own=own, sharded=encoder.sharded, apart=apart)
        first_counts = tuple(name for name, is_mine in apart.items() if is_mine and name not in spread)
        return CapturedState(step=step, tree=tree, tensors=share.tensors, parts=share.parts, first_counts=first_counts)

    def _held_apart(self, encoder: Encoder, names: list[str]) -> dict[str, bool]:
        """Return an object's plain tensors, and whether this rank stores them, if not all ranks may have the object.

        Its DTensors tell: a stage of a pipeline lies on a mesh of that stage's ranks. What is plain beside them (the
        steps that an optimizer counts, buffers) is stored by the first of these ranks.
        """
        if not encoder.ranks:
            return {}
        ranks = frozenset[int]().union(*{encoder.ranks[name] for name in names if name in encoder.ranks})
        if not ranks or len(ranks) >= self._world_size:
            return {}
        is_mine = min(ranks) == self._rank
        return {
            name: is_mine for name in names if name not in encoder.sharded and not name.startswith(encoder.own_prefix)
        }

    def estimate_bytes(self) -> int:
        """Return about how many bytes the tensors of this rank's share take.

        Safe in any thread at any time, for it calls no code of the script: an object's state_dict() may run
        collectives, or change what it shows. So what an object of the script's keeps elsewhere than in its attributes
        is not counted.
        Raises RuntimeError if an object is changed meanwhile.
        """
        shared_bytes = own_bytes = 0
        tracked = (*self._objects.values(), *self._local.values())
        apart = [form for item in tracked for form in (item, unwrapped(item))]
        for item in self._objects.values():
            for tensor in tensors_of(item, apart):
                if is_sharded(tensor):
                    from dtrain.trainer.dtensors import local_of

                    own_bytes += size_bytes(local_of(tensor))
                else:
                    shared_bytes += size_bytes(tensor)
        own_bytes += sum(size_bytes(tensor) for item in self._local.values() for tensor in tensors_of(item, apart))
        return own_bytes + shared_bytes // self._world_size

    # ---- putting back ------------------------------------------------------------------------------------

    def targets(self, saved: SavedState, device: torch.device, *, seek: bool = True) -> dict[str, torch.Tensor]:
        """Return what is to be read of ``saved``: tensors to be filled, by name, empty or the live ones themselves.

        Raises :class:`UserError` if an object is not in the checkpoint.
        """
        live = {name: unwrapped(item) for name, item in self._objects.items()}
        targets = Targets(saved.wholes, device, live)
        for name in self._objects:
            targets.want_object(_tree_of(saved, "objects", name, self._objects), name, live[name])
        for name, item in self._local.items():
            own = f"{OWN_PREFIX}.{saved.rank}.{name}"
            targets.want_object(_tree_of(saved, "local", name, self._local), own, item)
        if seek:
            targets.want(_section(saved, "position"))
        targets.want(_section(saved, "random"))
        return targets.tensors

    def restore_objects(self, saved: SavedState, device: torch.device) -> None:
        """Load every tracked object. Raises :class:`UserError` naming the object that does not fit."""
        for section, items in (("objects", self._objects), ("local", self._local)):
            for name in _section(saved, section).keys() - items.keys():
                _log.warning("the checkpoint of step %d holds %r, which is not tracked now: left out", saved.step, name)
            for name, item in items.items():
                value = decode(_tree_of(saved, section, name, items), saved.load, device)
                try:
                    unwrapped(item).load_state_dict(value)
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


def _tellable(item: object) -> object:
    """Return ``item``, or for a random generator something that tells its state."""
    return random_states.TrackedGenerator(item) if isinstance(item, random_states.GENERATORS) else item


def unwrapped(item: Any) -> Any:
    """Return the model inside of DDP's and torch.compile's wrappers; anything else as it is."""
    while isinstance(item, torch.nn.Module):
        if isinstance(item, torch.nn.parallel.DistributedDataParallel):
            item = item.module
        elif type(item).__name__ == "OptimizedModule" and hasattr(item, "_orig_mod"):
            item = item._orig_mod
        else:
            break
    return item


def _equal_on_every_rank(name: str, item: object, tensors: list[str]) -> Iterator[str]:
    """Yield those of an object's tensors that training keeps equal: parameters, and the state of optimizers."""
    if isinstance(item, torch.optim.Optimizer):
        yield from tensors
    elif isinstance(item, torch.nn.Module):
        wanted = {f"{name}.{key}" for key, _ in unwrapped(item).named_parameters(remove_duplicate=False)}
        yield from (tensor for tensor in tensors if tensor in wanted)


def _cannot_keep(verb: str, name: str, item: object) -> str:
    return (
        f"run.{verb}({name}=...) cannot keep a {type(item).__module__}.{type(item).__qualname__}: "
        "give it state_dict() and load_state_dict(), or track something that has them."
    )


def _section(saved: SavedState, name: str) -> Any:
    if name not in saved.tree:
        raise PermanentError(f"the checkpoint of step {saved.step} has no {name!r} in its tree")
    return saved.tree[name]


def _tree_of(saved: SavedState, section: str, name: str, tracked: Mapping[str, object]) -> Any:
    """Return the tree of one tracked object. Raises :class:`UserError` naming every one that is missing."""
    trees = _section(saved, section)
    if missing := sorted(tracked.keys() - trees.keys()):
        raise UserError(
            f"the checkpoint of step {saved.step} holds no {', '.join(missing)} (it holds {', '.join(trees)}): "
            "track the objects under the names they were saved with, or submit under another job name."
        )
    return trees[name]
