"""State trees: what ``state_dict()`` gives, as a JSON text and a flat dict of tensors. No pickle.

A checkpoint must load without running anybody's code and must give back exactly what was put in: the same types,
the same order, the same bits. So every kind of value has its own tag, and what has none is refused with the path to
it, instead of being stored as something like it.

    null, true, false, "text", 12, [...]     themselves (integers of more than 63 bits as {"int": "0x..."})
    {"float": "0x1.8p+1"}                     exact, by float.hex(); NaNs with their bits
    {"tuple": [...]} {"set": [...]} ...       containers by their exact type
    {"dict": [[key, value], ...]}             in order; keys may be text, numbers, bools, None, enums, tuples of these
    {"tensor": "model.weight"}                by its name in the checkpoint
    {"enum": ["module", "Class"], "member": "RED"}
    {"coded": ..., "by": "name"}              plain data that stands for a value of a registered type (codecs.py)

Two names for one tensor (tied weights) are stored twice, once under each name. Whoever loads gets tensors and arrays
of its own.
"""

import base64
import enum
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from dtrain.storage.catalogs import Json
from dtrain.storage.codecs import enum_place, lookup
from dtrain.storage.tensor_codes import CODE_OF_DTYPE, as_stored, is_sharded, why_not_storable
from dtrain.storage.tree_values import FACTORIES
from dtrain.trainer.parts import TensorPart

DEPTH_MAX = 64  # nesting deeper than this is a cycle, or will not be read back by common JSON parsers
BYTES_INLINE_MAX = 1024  # longer byte strings are stored like tensors: base64 in a header is slow and large
_INT_PLAIN_MAX = 2**63  # larger ones would lose bits in parsers that read numbers as 64 bits
_HOW = (
    "Give the object a state_dict() and load_state_dict() that use plain data, "
    "or say how this type is stored with dtrain.storable()."
)
_SCALARS = "?bBhHiIlLqQefdFD"  # numpy's codes of bools, integers and floats that every machine has alike


class Encoder:
    """Turns values into JSON and collects their tensors. One encoder per shard, so that names stay unique."""

    def __init__(self, own_prefix: str = "") -> None:
        """``own_prefix`` goes before the names of what belongs to this rank alone."""
        # name -> the tensor whose bytes are stored under it. These are views: copy them before the next step
        # changes what they show.
        self.tensors: dict[str, torch.Tensor] = {}
        self.sharded: dict[str, TensorPart] = {}  # of those: what is a part of a DTensor
        self.ranks: dict[str, frozenset[int]] = {}  # of those: which ranks hold a part
        self.own_prefix = own_prefix
        self._codec_for = lookup()
        self._text_is_plain = self._codec_for(str) is None
        self._number_is_plain = self._codec_for(int) is None
        self._tensor_is_plain = self._codec_for(torch.Tensor) is None

    def encode(self, value: object, path: str) -> Json:
        """Return ``value`` as JSON. Raises TypeError naming the path of what cannot be stored."""
        return self._encode(value, path, 0)

    def encode_own(self, value: object, path: str) -> Json:
        """Return ``value`` as JSON; its tensors get names that no other rank's have."""
        return self._encode(value, self.own_prefix + path, 0)

    def _encode(self, value: Any, path: str, depth: int) -> Json:
        if depth > DEPTH_MAX:
            raise TypeError(f"{path} is nested more than {DEPTH_MAX} levels deep, or contains itself. {_HOW}")
        kind = type(value)
        if (codec := self._codec_for(kind)) is not None:
            return {"coded": self._encode(codec.to_plain(value), path, depth + 1), "by": codec.name}
        if value is None or kind is bool or kind is str:
            return value  # type: ignore[no-any-return]
        if kind is int:
            return value if -_INT_PLAIN_MAX <= value < _INT_PLAIN_MAX else {"int": hex(value)}
        if kind is float:
            return {"float": _float_text(value)}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind is list:
            return self._items(value, path, depth)
        if kind in _SEQUENCES:
            return {_SEQUENCES[kind]: self._items(value, path, depth)}
        if kind in _MAPPINGS:
            return self._mapping(value, path, depth)
        if kind in (set, frozenset):
            items = self._items(value, path, depth)
            return {kind.__name__: sorted(items, key=json.dumps)}  # sets have no order; a shard's bytes do
        if kind is np.ndarray:
            return self._array(value, path)
        if isinstance(value, enum.Enum):
            return self._enum(value, path)
        return self._leaf(value, path)

    def _leaf(self, value: Any, path: str) -> Json:
        kind = type(value)
        if kind is complex:
            return {"complex": [_float_text(value.real), _float_text(value.imag)]}
        if kind is bytes:
            if len(value) > BYTES_INLINE_MAX:
                stored = torch.frombuffer(bytearray(value), dtype=torch.uint8)
                return {"bytes": {"tensor": self._name(stored, self._own(path))}}
            return {"bytes": base64.b64encode(value).decode()}
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        if isinstance(value, np.generic) and value.dtype.char in _SCALARS:
            native = value.astype(value.dtype.newbyteorder("="))
            return {"scalar": [native.dtype.str, base64.b64encode(native.tobytes()).decode()]}
        raise TypeError(f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold. {_HOW}")

    def _enum(self, value: enum.Enum, path: str) -> Json:
        kind = type(value)
        place: Any = enum_place(value)
        if place is None:
            raise TypeError(
                f"{path} is of the enum {kind.__module__}.{kind.__qualname__}, which cannot be found by that name: "
                "define it at the top of a module."
            )
        if kind.__members__.get(str(value.name)) is value:
            return {"enum": place, "member": value.name}
        return {"enum": place, "value": self._encode(value.value, path, 0)}  # flags joined: no member's name

    def _items(self, values: Iterable[object], path: str, depth: int) -> list[Json]:
        return [self._encode(value, f"{path}.{index}", depth + 1) for index, value in enumerate(values)]

    def _mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> Json:
        # A state of many small tensors is thousands of these pairs: what is plain in every way takes no detour.
        quick = torch.Tensor if self._tensor_is_plain and depth < DEPTH_MAX else None
        tensors, strided, text_is_plain = self.tensors, torch.strided, self._text_is_plain
        pairs: list[Json] = []
        for key, item in value.items():
            inner = f"{path}.{key}"
            shown = key if text_is_plain and type(key) is str else self._key(key, path)
            if (
                type(item) is quick
                and item.is_cpu
                and item.dtype in _PLAIN_DTYPES
                and item.layout is strided
                and not (item.requires_grad or item.is_nested or inner in tensors)
            ):
                tensors[inner] = item
                pairs.append([shown, {"tensor": inner}])
            else:
                pairs.append([shown, self._encode(item, inner, depth + 1)])
        if type(value) is dict:
            return {"dict": pairs}
        node: dict[str, Json] = {_MAPPINGS[type(value)]: pairs}
        if isinstance(value, defaultdict):
            factory = value.default_factory
            name = None if factory is None else getattr(factory, "__name__", "")
            if factory is not None and FACTORIES.get(str(name)) is not factory:
                raise TypeError(f"{path} is a defaultdict of {factory!r}, which a checkpoint cannot hold. {_HOW}")
            node["factory"] = name
        if hasattr(value, "_metadata"):  # torch's modules keep the versions of their state there
            node["metadata"] = self._encode(value._metadata, f"{path}._metadata", depth + 1)
        return node

    def _key(self, key: object, path: str) -> Json:
        if type(key) is int and self._number_is_plain and -_INT_PLAIN_MAX <= key < _INT_PLAIN_MAX:
            return key
        if key is None or type(key) in (str, int, bool, float):
            return self._encode(key, path, 0)
        if type(key) is tuple:
            return {"tuple": [self._key(part, path) for part in key]}
        if isinstance(key, enum.Enum):
            return self._enum(key, f"{path}.{key}")
        raise TypeError(
            f"{path} has a key of type {type(key).__module__}.{type(key).__qualname__}; "
            f"keys may be text, numbers, bools, None, enums and tuples of these. {_HOW}"
        )

    def _tensor(self, tensor: torch.Tensor, path: str) -> Json:
        if is_sharded(tensor):
            return self._sharded_tensor(tensor, path)
        if why := why_not_storable(tensor, may_be_coded=True):
            raise TypeError(f"{path} {why}.")
        node: dict[str, Json] = {"tensor": self._name(as_stored(tensor), path)}
        if tensor.dtype is torch.complex128:
            node["pairs"] = True
        if not tensor.is_cpu:
            node["device"] = tensor.device.type
        return node

    def _sharded_tensor(self, tensor: torch.Tensor, path: str) -> Json:
        from dtrain.trainer.dtensors import local_part, ranks_of  # imports DTensor, which is there already

        if self.own_prefix and path.startswith(self.own_prefix):
            raise TypeError(f"{path} is sharded over ranks, and so no rank's own: give it to run.track().")
        local, part = local_part(tensor, path)
        if why := why_not_storable(local):
            raise TypeError(f"{path} {why}.")
        if local.dtype is torch.complex128:  # stored as pairs, of which no DTensor could be made again
            raise TypeError(f"{path} is sharded and of complex128: hold it as torch.view_as_real() of it.")
        name = self._name(as_stored(local), path)
        self.sharded[name] = part
        self.ranks[name] = ranks_of(tensor)
        node: dict[str, Json] = {"tensor": name, "sharded": True}
        if local.device.type != "cpu":
            node["device"] = local.device.type
        return node

    def _array(self, array: np.ndarray[Any, Any], path: str) -> Json:
        try:
            native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")  # a copy: arrays may be read-only
            stored = torch.from_numpy(native)
        except TypeError as error:
            raise TypeError(
                f"{path} is a numpy array of {array.dtype}, which a checkpoint cannot hold. {_HOW}"
            ) from error
        return {"array": self._tensor(stored, self._own(path)), "dtype": array.dtype.str}

    def _own(self, path: str) -> str:
        """Name arrays and byte strings for this rank alone: unlike tensors nothing says that all ranks have the same.

        Random states of samplers are such.
        """
        return path if path.startswith(self.own_prefix) else self.own_prefix + path

    def _name(self, stored: torch.Tensor, path: str) -> str:
        name, copies = path, 1
        while name in self.tensors:  # {"a": {"b": t}} beside {"a.b": t}
            copies += 1
            name = f"{path}#{copies}"
        self.tensors[name] = stored
        return name


_PLAIN_DTYPES = frozenset(CODE_OF_DTYPE)  # stored as they are
_SEQUENCES: dict[type, str] = {tuple: "tuple", torch.Size: "size"}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", defaultdict: "defaultdict", Counter: "counter"}


def _float_text(value: float) -> str:
    if math.isnan(value):
        return "nan:" + struct.pack(">d", value).hex()
    return value.hex()
