"""Values of a state tree: what was encoded (see ``dtrain.trainer.state_tree``) is made again; nobody's code is run.

And as torch.distributed.checkpoint names them: it flattens a state by rules of its own, and keeps what is no tensor
(learning rates, names, a scheduler's counts) pickled, each under its path. So the trees of a job's checkpoint can be
offered to its loader as if it had saved them.
"""

import base64
import io
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from dtrain.common.errors import PermanentError, UserError
from dtrain.storage.catalogs import Json, is_of_job
from dtrain.storage.codecs import codec_named, enum_member

FACTORIES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "int": int,
        "float": float,
        "str": str,
        "bool": bool,
        "list": list,
        "dict": dict,
        "set": set,
    }
)  # of defaultdicts
_MAPPINGS = ("dict", "ordered", "defaultdict", "counter")
_CPU = torch.device("cpu")


def decode(node: Json, load: Callable[[str], torch.Tensor], device: torch.device) -> Any:
    """Return the value that :meth:`Encoder.encode` was given.

    ``load`` returns a tensor by its name in the shard, owned by the caller, on the CPU. Tensors that were on an
    accelerator go to ``device`` if it is of the same type, and stay on the CPU otherwise.
    """
    if node is None or isinstance(node, bool | int | str):
        return node
    if isinstance(node, list):
        return [decode(item, load, device) for item in node]
    tag = next(iter(node))
    body: Any = node[tag]
    match tag:
        case "int":
            return int(body, 16)
        case "float":
            return _float_value(body)
        case "complex":
            return complex(_float_value(body[0]), _float_value(body[1]))
        case "bytes":
            return load(body["tensor"]).numpy().tobytes() if isinstance(body, dict) else base64.b64decode(body)
        case "tuple" | "size" | "set" | "frozenset":
            kinds: dict[str, Callable[[Any], Any]]
            kinds = {"tuple": tuple, "size": torch.Size, "set": set, "frozenset": frozenset}
            return kinds[tag](decode(item, load, device) for item in body)
        case "dict" | "ordered" | "defaultdict" | "counter":
            return _decode_mapping(tag, node, load, device)
        case "dtype":
            return getattr(torch, body)
        case "device":
            return torch.device(body)
        case "scalar":
            return np.frombuffer(base64.b64decode(body[1]), dtype=np.dtype(body[0]))[0]
        case "enum":
            value = None if "member" in node else decode(node["value"], load, device)
            member = str(node["member"]) if "member" in node else None
            return enum_member(str(body[0]), str(body[1]), member=member, value=value)
        case "coded":
            return codec_named(str(node["by"])).from_plain(decode(body, load, device))
        case "array":
            return decode(body, load, device).numpy().astype(np.dtype(str(node["dtype"])), copy=False)
        case "tensor":
            tensor = load(body)
            if node.get("pairs"):
                tensor = torch.view_as_complex(tensor)
            return tensor.to(device) if node.get("device") == device.type else tensor
    raise PermanentError(f"the checkpoint holds a value tagged {tag!r}, which this version of dtrain does not know")


def _decode_mapping(tag: str, node: dict[str, Json], load: Callable[[str], torch.Tensor], device: torch.device) -> Any:
    body: Any = node[tag]
    pairs = [(decode(key, load, device), decode(item, load, device)) for key, item in body]
    match tag:
        case "dict":
            return dict(pairs)
        case "counter":
            return Counter(dict(pairs))
        case "defaultdict":
            name = node["factory"]
            return defaultdict(None if name is None else FACTORIES[str(name)], pairs)
    ordered = OrderedDict(pairs)
    if "metadata" in node:
        ordered._metadata = decode(node["metadata"], load, device)  # type: ignore[attr-defined]
    return ordered


def _float_value(text: str) -> float:
    if text.startswith("nan:"):
        (value,) = struct.unpack(">d", bytes.fromhex(text.removeprefix("nan:")))
        return float(value)
    return float.fromhex(text)


def leaves_for_torch(trees: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """Return what is no tensor in the tracked objects of a job, by the names that torch's planner gives.

    Ranks track the same objects; where two differ, the first rank's is taken. A rank's own things are left out.
    """
    found: dict[str, Json] = {}
    seen: list[Json] = []
    for tree in trees:
        objects = tree.get("objects")
        if not is_of_job(tree) or not isinstance(objects, dict) or objects in seen:
            continue
        seen.append(objects)
        for name, node in objects.items():
            for path, leaf in _leaves(name, node):
                found.setdefault(path, leaf)
    return found


def pickled(node: Json, load: Callable[[str], torch.Tensor]) -> bytes:
    """Return a leaf as torch.distributed.checkpoint keeps one. ``load`` as for :func:`decode`."""
    into = io.BytesIO()
    torch.save(decode(node, load, _CPU), into)
    return into.getvalue()


def _leaves(path: str, node: Json) -> Iterator[tuple[str, Json]]:
    """Follow ``traverse_state_dict`` of torch: mappings always, lists if tensors or mappings are below."""
    if isinstance(node, dict) and _is_mapping(node):
        pairs: Any = next(iter(node.values()))
        for key, inner in pairs:
            name = _key_text(key)
            if name is not None:
                yield from _leaves(f"{path}.{name}", inner)
    elif isinstance(node, list) and not _is_terminal(node):
        for index, inner in enumerate(node):
            yield from _leaves(f"{path}.{index}", inner)
    elif not _is_tensor(node):
        yield path, node


def _is_terminal(node: Json) -> bool:
    if _is_mapping(node):
        return False
    return not isinstance(node, list) or all(not _is_tensor(item) and _is_terminal(item) for item in node)


def _is_mapping(node: Json) -> bool:
    return isinstance(node, dict) and next(iter(node)) in _MAPPINGS


def _is_tensor(node: Json) -> bool:
    return isinstance(node, dict) and next(iter(node)) == "tensor"


def _key_text(key: Json) -> str | None:
    """Return what torch calls a key; None for a member of an enum that this program does not have."""
    try:
        return str(decode(key, _no_tensor, _CPU))
    except UserError:
        return None


def _no_tensor(name: str) -> torch.Tensor:
    raise PermanentError(f"tensor {name!r} is part of a key")
