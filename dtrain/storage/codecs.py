"""Values that a checkpoint holds because a script said how: enums by their names, and any type it registered.

A checkpoint must load without running anybody's code, so nothing is ever imported or called because a checkpoint
names it. An enum is looked up among what the script has imported by itself, and a registered type is rebuilt by the
function that *this* run gave for it. What was stored is the plain data in between.
"""

import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dtrain.common.errors import UserError

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How values of one type are stored."""

    name: str  # what checkpoints call the type
    kind: type
    to_plain: Callable[[Any], object]
    from_plain: Callable[[Any], Any]


_BY_KIND: dict[type, Codec] = {}
_BY_NAME: dict[str, Codec] = {}


def storable(
    kind: type[Kind], *, to_plain: Callable[[Kind], object], from_plain: Callable[[Any], Kind], name: str = ""
) -> None:
    """Let checkpoints hold values of exactly the type ``kind``, wherever in a state they are.

    ``to_plain`` returns what is stored in a value's place: numbers, text, tensors, arrays, and containers of them.
    ``from_plain`` makes the value again. ``name`` is what checkpoints call the type, by default its module and name:
    give one that outlives a move of the class. Raises :class:`UserError` if the name is another type's.
    """
    called = name or f"{kind.__module__}.{kind.__qualname__}"
    known = _BY_NAME.get(called)
    if known is not None and known.kind is not kind:
        raise UserError(f"dtrain.storable(name={called!r}) names two types: give each type its own name.")
    _BY_KIND[kind] = _BY_NAME[called] = Codec(name=called, kind=kind, to_plain=to_plain, from_plain=from_plain)


def codec_for(kind: type) -> Codec | None:
    """Return how values of this very type are stored, if somebody said."""
    return _BY_KIND.get(kind)


def lookup() -> Callable[[type], Codec | None]:
    """Return :func:`codec_for` as it is called fastest, for who asks for thousands of values at once."""
    return _BY_KIND.get


def codec_named(name: str) -> Codec:
    """Return the codec that a checkpoint names. Raises :class:`UserError` if this run has none."""
    found = _BY_NAME.get(name)
    if found is None:
        raise UserError(
            f"the checkpoint holds a value of type {name}, and this run does not say how to read it: "
            f"call dtrain.storable(..., name={name!r}) before run.steps(), as the run that saved it did."
        )
    return found


def enum_place(value: enum.Enum) -> list[str] | None:
    """Return module and name of the enum's class; None for a class that cannot be found by them."""
    kind = type(value)
    place = [kind.__module__, kind.__qualname__]
    return place if _find(*place) is kind else None


def enum_member(module: str, name: str, *, member: str | None, value: object) -> enum.Enum:
    """Return the member of that name, or of that value if it has none. Raises :class:`UserError`."""
    kind = _find(module, name)
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise UserError(
            f"the checkpoint holds a member of the enum {module}.{name}, which this run does not have: "
            f"import {module} before run.steps(), with that enum in it."
        )
    try:
        return kind(value) if member is None else kind[member]
    except (KeyError, ValueError) as error:
        shown = repr(value) if member is None else member
        raise UserError(f"the enum {module}.{name} has no {shown}, which the checkpoint holds: add it.") from error


def _find(module: str, name: str) -> object:
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
