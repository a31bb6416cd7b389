"""Where a checkpoint's tensors go: for each that is needed, a tensor of the shape and placement that it shall have now.

A model's own tensors are filled in place, so that reading them costs no memory and no second copy. An optimizer that
was just made has no state, so its state is made here: placed as the parameter that it belongs to, whether that is
whole or sharded, and however it was placed when it was saved. Whatever else is tracked gets whole tensors, or parts
where it holds a DTensor of that name now, or will most probably make one (siblings.py).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from dtrain.common.errors import PermanentError
from dtrain.storage.catalogs import Json, TensorLeaf, WholeTensor, leaves_below
from dtrain.storage.tensor_codes import CODE_OF_DTYPE, DTYPE_OF_CODE, is_sharded, why_not_storable
from dtrain.trainer.siblings import Siblings


class Targets:
    """Collects what one rank needs of a checkpoint."""

    def __init__(self, wholes: Mapping[str, WholeTensor], device: torch.device, items: Mapping[str, object]) -> None:
        """``items``: all that is tracked, by the names that it is stored under."""
        self._siblings = Siblings(
            lambda: (found for name, item in items.items() for found in _live_tensors(item, name))
        )
        self.tensors: dict[str, torch.Tensor] = {}
        self._wholes = wholes
        self._device = device

    def want(self, tree: Json) -> None:
        """Want every tensor of ``tree`` whole."""
        for leaf in leaves_below(tree):
            self.tensors[leaf.name] = self._whole(leaf)

    def want_object(self, tree: Json, name: str, item: object) -> None:
        """Want every tensor of the object ``item``, which is tracked as ``name``, as that object holds it."""
        leaves = list(leaves_below(tree))
        if isinstance(item, torch.optim.Optimizer):
            params = dict(enumerate(param for group in item.param_groups for param in group["params"]))
            for leaf in leaves:
                self.tensors[leaf.name] = self._like_param(leaf, _param_of(leaf.name, name, params))
            return
        live = dict(_live_tensors(item, name)) if leaves else {}
        for leaf in leaves:
            held = live.get(leaf.name)
            if held is None and leaf.sharded:
                self.tensors[leaf.name] = self._like_sibling(leaf, item)
            else:
                self.tensors[leaf.name] = self._like_live(leaf, held, in_place=_fills_in_place(item))

    def _whole(self, leaf: TensorLeaf) -> torch.Tensor:
        tensor = self._saved(leaf)
        device = self._device if leaf.device == self._device.type else torch.device("cpu")
        return torch.empty(tensor.shape, dtype=_dtype(leaf, tensor), device=device)

    def _saved(self, leaf: TensorLeaf) -> WholeTensor:
        found = self._wholes.get(leaf.name)
        if found is None:
            raise PermanentError(f"the checkpoint's tree names tensor {leaf.name!r}, which it does not hold")
        return found

    def _like_param(self, leaf: TensorLeaf, param: torch.Tensor | None) -> torch.Tensor:
        tensor = self._saved(leaf)
        if param is None or leaf.pairs or not is_sharded(param):
            return self._whole(leaf)
        from dtrain.trainer import dtensors

        if tuple(param.shape) == tensor.shape:
            return dtensors.empty_like(param, _dtype(leaf, tensor))
        return dtensors.empty_replica(tensor.shape, _dtype(leaf, tensor), param) if leaf.sharded else self._whole(leaf)

    def _like_sibling(self, leaf: TensorLeaf, item: object) -> torch.Tensor:
        tensor = self._saved(leaf)
        sibling = self._siblings.of(leaf.name, tensor.shape, item)
        if sibling is None or leaf.pairs:
            return self._whole(leaf)
        from dtrain.trainer import dtensors

        if tuple(sibling.shape) == tensor.shape:
            return dtensors.empty_like(sibling, _dtype(leaf, tensor))
        return dtensors.empty_replica(tensor.shape, _dtype(leaf, tensor), sibling)

    def _like_live(self, leaf: TensorLeaf, live: torch.Tensor | None, *, in_place: bool) -> torch.Tensor:
        tensor = self._saved(leaf)
        if live is None or leaf.pairs or is_lazy(live) or tuple(live.shape) != tensor.shape:
            return self._whole(leaf)
        if is_sharded(live):
            from dtrain.trainer import dtensors

            return live if in_place else dtensors.empty_like(live, _dtype(leaf, tensor))
        usable = live.dtype in CODE_OF_DTYPE and not why_not_storable(live) and not live.is_conj()
        return live if in_place and usable else self._whole(leaf)


def _dtype(leaf: TensorLeaf, tensor: WholeTensor) -> torch.dtype:
    if tensor.dtype not in DTYPE_OF_CODE:
        raise PermanentError(f"tensor {leaf.name!r} is of {tensor.dtype}, which this torch does not know")
    found: torch.dtype = DTYPE_OF_CODE[tensor.dtype]
    return found


def _param_of(tensor: str, name: str, params: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    """Return the parameter that ``<name>.state.<number>.<what>`` belongs to."""
    match tensor.removeprefix(f"{name}.").split("."):
        case ["state", number, *_] if number.isdigit():
            return params.get(int(number))
    return None


def _fills_in_place(item: object) -> bool:
    """Whether a state that the object tells is its own memory, and not a copy made for the asker."""
    return isinstance(item, torch.nn.Module) and type(item).state_dict is torch.nn.Module.state_dict


def _live_tensors(item: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that the object holds now, by the names that they are stored under."""
    # keep_vars: the very tensors, so that load_state_dict() sees that nothing is left to be copied
    state = item.state_dict(keep_vars=True) if _fills_in_place(item) else item.state_dict()
    yield from _tensors_below(state, name)


def _tensors_below(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_below(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _tensors_below(inner, f"{path}.{number}")
