"""Which tensors an object will most probably store, without asking it.

The stage slots are made before the first checkpoint, in another thread than the script's. An object's ``state_dict()``
may run collectives or change what it shows, so no code of the script is called: its tensors are looked for where they
lie. What is missed is found out at the first checkpoint, which then takes longer.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator

import torch

CONTAINERS_DEPTH = 2  # a list of optimizers, a dictionary of lists of averages
WRAPPERS_DEPTH = 1  # wrappers in a wrapper: an average of weights, an optimizer in a class, beside the model
CONTAINER_MAX = 100_000  # parts of one container that are looked at: a longer one is data, not state


def tensors_of(item: object, apart: Collection[object] = ()) -> Iterator[torch.Tensor]:
    """Yield the tensors of a module or an optimizer; of anything else those in its attributes, each once.

    Such an object is a wrapper around model and optimizer, or an average of weights. ``apart``: what is tracked by
    itself; who holds that too, as a scheduler its optimizer, does not store it again. A tensor of two names is stored
    twice, but seldom: it is given once. Raises RuntimeError if what is looked at is changed meanwhile.
    """
    if isinstance(item, torch.nn.Module | torch.optim.Optimizer):
        yield from _held_by(item)
        return
    if isinstance(item, torch.optim.lr_scheduler.LRScheduler):
        return
    yield from {id(tensor): tensor for part in parts_of(item, apart) for tensor in _held_by(part)}.values()


def parts_of(item: object, apart: Collection[object] = ()) -> Iterator[object]:
    """Yield what the attributes of ``item`` are or hold, but for ``apart``, and the same of wrappers among them."""
    yield from _parts_of(item, WRAPPERS_DEPTH, {id(other) for other in apart})


def _parts_of(item: object, depth: int, others: set[int]) -> Iterator[object]:
    with contextlib.suppress(AttributeError):
        attributes = object.__getattribute__(item, "__dict__")  # not getattr(): a class may answer that with code
        for part in _parts(attributes.values(), CONTAINERS_DEPTH):
            if id(part) in others:
                continue
            yield part
            if depth and _is_wrapper(type(part)):
                yield from _parts_of(part, depth - 1, others)


def _is_wrapper(kind: type) -> bool:
    """Return whether these have a state of their own to be stored. Data that a script keeps at hand have none."""
    if issubclass(kind, torch.nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler):
        return False
    names = {name for base in kind.__mro__ for name in vars(base)}
    return {"state_dict", "load_state_dict"} <= names


def _parts(values: Iterable[object], depth: int) -> Iterator[object]:
    """Yield the values, and instead of plain containers what they hold."""
    for value in list(values):
        if type(value) is list or type(value) is tuple or type(value) is dict:
            if depth and len(value) <= CONTAINER_MAX:
                yield from _parts(value.values() if type(value) is dict else value, depth - 1)
        else:
            yield value


def _held_by(item: object) -> Iterator[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, torch.nn.Module):
        for module in _modules_of(item):
            held = [*module._parameters.values(), *module._buffers.values()]
            yield from (tensor for tensor in held if tensor is not None)
    elif isinstance(item, torch.optim.Optimizer):
        for state in list(item.state.values()):
            values = list(state.values()) if isinstance(state, dict) else []
            yield from (value for value in values if isinstance(value, torch.Tensor))


def _modules_of(item: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the module and all in it, each once. Not by modules(), which a script may have a form of its own of."""
    found: dict[int, torch.nn.Module] = {}
    rest = [item]
    while rest:
        module = rest.pop()
        if id(module) not in found:
            found[id(module)] = module
            rest.extend(inner for inner in module._modules.values() if inner is not None)
    yield from found.values()
