"""Tensors and their bytes: which torch dtype is which safetensors code, and which tensors can be stored at all.

A checkpoint must be readable for years, by tools that know no torch, so only plain dense tensors are stored. Every
other kind is refused with one sentence that says what to give instead; nothing is converted in silence.
"""

from functools import lru_cache
from types import MappingProxyType

import torch

# Codes of the safetensors format. What this torch does not know (older versions lack some) is left out.
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPE_OF_CODE = MappingProxyType({code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)})
CODE_OF_DTYPE = MappingProxyType({dtype: code for code, dtype in DTYPE_OF_CODE.items()})

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) if hasattr(torch.nn, "Buffer") else (torch.Tensor,)
SHARDED = "DTensor"  # by name: to import the type would cost every restart a quarter of a second


def why_not_storable(tensor: torch.Tensor, *, may_be_coded: bool = False) -> str:
    """Return why ``tensor`` cannot be stored and the mend, as the end of a sentence; empty if it can.

    ``may_be_coded``: whoever asks has looked for what dtrain.storable() says of the tensor's type.
    """
    kind = type(tensor)
    if kind.__name__ == "ShardedTensor":
        return "is a ShardedTensor, which torch has given up: shard with fully_shard, or use DTensor"
    is_plain = kind in _PLAIN or kind is torch.nn.Parameter
    coded = ", or say how this type is stored with dtrain.storable()" if may_be_coded and not is_plain else ""
    if tensor.is_nested:  # of any layout; a strided one is a plain Tensor by its type, and has no shape
        return f"is a nested tensor: give its dense parts (tensor.unbind(), or values and offsets){coded}"
    if not is_plain:
        # No word of as_subclass(): types that wrap other tensors, quantised ones among them, stay what they are.
        called = f"{kind.__module__}.{kind.__qualname__}"
        return f"is a {called}, a subclass of Tensor: give the plain tensors that it is made of{coded}"
    if tensor.layout is not torch.strided:
        return f"is a tensor of layout {tensor.layout}: give its dense parts (values and indices) instead"
    if tensor.is_meta:
        return "is a tensor on the meta device, which has no data: materialise it first"
    if tensor.dtype is not torch.complex128 and tensor.dtype not in CODE_OF_DTYPE:
        return f"is a tensor of {tensor.dtype}, which safetensors cannot hold: give tensor.view(torch.uint8)"
    return ""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    return _is_sharded_kind(type(tensor))


@lru_cache(maxsize=256)  # asked for each tensor at each checkpoint; there are a handful of types
def _is_sharded_kind(kind: type) -> bool:
    return any(base.__name__ == SHARDED for base in kind.__mro__)


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor whose bytes are stored: a view of ``tensor``, detached and without lazy conjugation."""
    plain = tensor.detach()
    if plain.dtype is torch.complex128:  # safetensors has no code for it: a last dimension of (real, imaginary)
        return torch.view_as_real(plain.resolve_conj())
    return plain


def size_bytes(tensor: torch.Tensor) -> int:
    """Return how many bytes a dense copy of ``tensor`` takes."""
    return tensor.numel() * tensor.element_size()


def view_bytes(buffer: memoryview, code: str, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    """Return a tensor that shares ``buffer``'s bytes from ``offset`` on. The buffer must be writable."""
    dtype = DTYPE_OF_CODE[code]
    count = 1
    for extent in shape:
        count *= extent
    if count == 0:  # frombuffer refuses to make an empty tensor
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape)
