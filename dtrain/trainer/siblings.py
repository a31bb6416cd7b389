"""How a sharded tensor is placed that an object does not hold yet: as what it belongs to.

An optimizer's state or an average of the weights is often made at the first step only, and an object of the script's
own may hold either. A whole tensor in the place of a DTensor would be taken without a word, and end the next step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

import torch

from dtrain.common.errors import UserError
from dtrain.storage.tensor_codes import is_sharded
from dtrain.trainer.state_size import parts_of


class Siblings:
    """The sharded tensors that the tracked objects hold. Looked for when the first is asked for."""

    def __init__(self, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> None:
        """``tensors``: what all tracked objects hold, by the names that it is stored under."""
        self._tensors = tensors

    @cached_property
    def _sharded(self) -> Mapping[str, torch.Tensor]:
        return {name: tensor for name, tensor in self._tensors() if is_sharded(tensor)}

    def of(self, name: str, shape: tuple[int, ...], item: object) -> torch.Tensor | None:
        """Return the DTensor beside which the tensor ``name`` of ``item`` lies; None if nothing is sharded here.

        That is, of those that come first here, the one: the parameter of its number in an optimizer that the object
        has; what has its shape and the end of its name; what has its shape; whatever there is. Raises UserError
        if these are not placed alike.
        """
        rivals = [
            [param for param in _params_of(name, item) if is_sharded(param) and tuple(param.shape) == shape],
            [t for other, t in self._sharded.items() if tuple(t.shape) == shape and _end(other) == _end(name)],
            [tensor for tensor in self._sharded.values() if tuple(tensor.shape) == shape],
            list(self._sharded.values()),
        ]
        found = next((found for found in rivals if found), [])
        if not found:
            return None
        from dtrain.trainer.dtensors import placed

        if len(set(map(placed, found))) > 1:
            raise UserError(
                f"tensor {name!r} was sharded when it was saved, and nothing says how it shall be now: have the object "
                "make it before the loop of steps, or track what it belongs to (an optimizer, a module) by itself."
            )
        return found[0]


def _end(name: str) -> str:
    """The tensor's own name in its module."""
    return ".".join(name.split(".")[-2:])


def _params_of(name: str, item: object) -> Iterator[torch.Tensor]:
    """Yield the parameters that ``...state.<number>.<what>`` may belong to, one of each optimizer of the object."""
    path = name.split(".")
    if len(path) < 3 or path[-3] != "state" or not path[-2].isdigit():
        return
    for part in parts_of(item):
        if isinstance(part, torch.optim.Optimizer):
            params = [param for group in part.param_groups for param in group["params"]]
            if int(path[-2]) < len(params):
                yield params[int(path[-2])]
