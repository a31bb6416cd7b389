"""The shard format: a safetensors file, as arithmetic on bytes.

A trainer lays a shard out in shared memory and a worker uploads these bytes as they are, so both need to know
where each tensor goes before any byte is copied; and neither the worker nor the command line has torch. Hence
this file knows the header only: :func:`plan` makes it, :func:`parse_header` reads it.

The format (https://github.com/huggingface/safetensors): eight bytes, the header's length N, little-endian;
N bytes of JSON, padded with spaces; the tensors' bytes, dense, with no hole and no byte left over. We also keep

- the data start at a multiple of 64 bytes (a cache line), by the padding;
- tensors of wider elements before narrower ones, so that each lies at a multiple of its element's size
  without a hole (sub-byte types come last).

A shard comes from storage, so parsing trusts nothing: every bound is checked before it is used.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from dtrain.common.errors import ShardDamagedError

ALIGNMENT_BYTES = 64  # where the data starts: a cache line, and enough for any element
LENGTH_BYTES = 8  # the field before the header
HEADER_MAX_BYTES = 100_000_000  # the limit of the safetensors library itself
DIMENSIONS_MAX = 64  # torch's own limit; a bound for hostile headers
SHARD_VERSION = "1"

VERSION_ENTRY = "dtrain.version"
LAYOUT_ENTRY = "dtrain.layout"
STEP_ENTRY = "dtrain.step"
RANK_ENTRY = "dtrain.rank"
WORLD_SIZE_ENTRY = "dtrain.world_size"
TREE_ENTRY = "dtrain.tree"
FIRST_COUNTS_ENTRY = "dtrain.first_counts"  # JSON, if any: names of tensors of which the first rank's counts
_METADATA = "__metadata__"  # the format's own name; no tensor may have it

DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor that is to go into a shard, and which part of the whole tensor it is."""

    name: str  # unique in the shard
    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]  # of these bytes
    offsets_in_whole: tuple[int, ...]  # where this part starts in the whole tensor; one number a dimension
    global_shape: tuple[int, ...]  # of the whole tensor; offsets_in_whole + shape <= global_shape
    size_bytes: int  # == product of shape * element size


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """Where everything of a shard goes. The header comes first; then the data, from ``len(header)`` on."""

    header: bytes  # the length field, the JSON and its padding; a multiple of ALIGNMENT_BYTES
    data_offsets: dict[str, tuple[int, int]]  # name -> (begin, end), counted from the end of the header
    total_bytes: int  # of the whole shard

    @property
    def data_start(self) -> int:
        """Position in the file that ``data_offsets`` count from."""
        return len(self.header)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpan:
    """A tensor found in a shard's header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # counted from ShardHeader.data_start
    end: int  # begin <= end <= ShardHeader.data_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout:
    """Which part of a whole tensor a shard holds."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHeader:
    """A shard's header, checked: the spans cover the data without hole or overlap."""

    metadata: dict[str, str]
    tensors: dict[str, TensorSpan]  # in the order of the data
    data_start: int  # position in the file of the first tensor's first byte
    data_bytes: int

    @property
    def total_bytes(self) -> int:
        """Size of the whole shard."""
        return self.data_start + self.data_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """Where the tensors of a shard go, whatever its other metadata: made once for all shards of the same tensors."""

    data_offsets: dict[str, tuple[int, int]]  # name -> (begin, end), counted from the end of the header
    data_bytes: int
    layout_text: str  # value of LAYOUT_ENTRY, as JSON text in JSON
    tensors_text: str  # the tensors' part of the header: JSON pairs, with a comma before each

    def plan(self, metadata: Mapping[str, str], *, header_min_bytes: int = 0) -> ShardPlan:
        """Return the plan of one shard, whose header is padded to ``header_min_bytes`` at least."""
        if clash := {VERSION_ENTRY, LAYOUT_ENTRY} & metadata.keys():
            raise ValueError(f"metadata must not hold {sorted(clash)}: they are added here")
        values = {name: _compact(value) for name, value in metadata.items()}
        values[VERSION_ENTRY], values[LAYOUT_ENTRY] = _compact(SHARD_VERSION), self.layout_text
        pairs = ",".join(f"{_compact(name)}:{value}" for name, value in sorted(values.items()))
        text = f'{{"{_METADATA}":{{{pairs}}}{self.tensors_text}}}'.encode()
        needed = max(LENGTH_BYTES + len(text), header_min_bytes)
        padded = needed + -needed % ALIGNMENT_BYTES - LENGTH_BYTES
        if padded > HEADER_MAX_BYTES:
            raise ValueError(f"the shard's header would take {padded} bytes; the format allows {HEADER_MAX_BYTES}")
        header = padded.to_bytes(LENGTH_BYTES, "little") + text.ljust(padded)
        return ShardPlan(header=header, data_offsets=self.data_offsets, total_bytes=len(header) + self.data_bytes)


def lay_out(entries: Iterable[TensorEntry]) -> ShardLayout:
    """Say where these tensors go. Raises ValueError on nonsense. The order of ``entries`` changes nothing."""
    ordered = sorted(entries, key=lambda entry: (-DTYPE_BITS.get(entry.dtype, 0), entry.name))
    layout: dict[str, dict[str, list[int]]] = {}
    spans: dict[str, tuple[int, int]] = {}
    texts: list[str] = []
    position = 0
    for entry in ordered:
        _check_entry(entry)
        if entry.name in spans:
            raise ValueError(f"two tensors are named {entry.name!r}")
        span = (position, position + entry.size_bytes)
        position = span[1]
        spans[entry.name] = span
        tensor = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": list(span)}
        texts.append(f",{_compact(entry.name)}:{_compact(tensor)}")
        layout[entry.name] = {"global_shape": list(entry.global_shape), "offsets": list(entry.offsets_in_whole)}
    return ShardLayout(
        data_offsets=spans,
        data_bytes=position,
        layout_text=_compact(_compact(layout)),
        tensors_text="".join(texts),
    )


def plan(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> ShardPlan:
    """Lay out one shard. Adds ``dtrain.version`` and ``dtrain.layout`` to ``metadata``. Raises ValueError on nonsense.

    The same entries (in any order) and metadata give the same bytes.
    """
    return lay_out(entries).plan(metadata)


def header_bytes(prefix: bytes | memoryview, *, key: str = "shard") -> int:
    """Return how many bytes the header takes, its length field included, from the first 8 bytes of a shard."""
    if len(prefix) < LENGTH_BYTES:
        raise ShardDamagedError(key, f"has only {len(prefix)} bytes, too few for a shard")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if not 2 <= length <= HEADER_MAX_BYTES:
        raise ShardDamagedError(key, f"says that its header has {length} bytes; 2 to {HEADER_MAX_BYTES} are possible")
    return LENGTH_BYTES + length


def parse_header(prefix: bytes | memoryview, *, key: str = "shard", total_bytes: int | None = None) -> ShardHeader:
    """Read the header from a shard's first bytes (:func:`header_bytes` of them at least; more is fine).

    ``total_bytes``, where known, is the size of the whole shard, and must be exactly what the header says.
    Any safetensors file is accepted; :func:`layout_of` wants one of ours. Raises :class:`ShardDamagedError`
    naming ``key``.
    """
    data_start = header_bytes(prefix, key=key)
    if len(prefix) < data_start:
        raise ShardDamagedError(key, f"ends within its header ({len(prefix)} of {data_start} bytes)")
    text = bytes(prefix[LENGTH_BYTES:data_start])
    try:
        document = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(document.pop(_METADATA, msgspec.Raw(b"{}")), type=dict[str, str])
        raw = {name: msgspec.json.decode(value, type=_RawTensor) for name, value in document.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardDamagedError(key, f"has a header that cannot be read: {error}") from error
    tensors: dict[str, TensorSpan] = {}
    position = 0
    for name, item in sorted(raw.items(), key=lambda pair: pair[1].data_offsets):
        span = _checked_span(key, name, item)
        if span.begin != position:
            raise ShardDamagedError(key, f"has a hole or an overlap in its data before tensor {name!r}")
        position = span.end
        tensors[name] = span
    header = ShardHeader(metadata=metadata, tensors=tensors, data_start=data_start, data_bytes=position)
    if total_bytes is not None and total_bytes != header.total_bytes:
        raise ShardDamagedError(key, f"has {total_bytes} bytes; its header says {header.total_bytes}")
    return header


def layout_of(header: ShardHeader, *, key: str = "shard") -> dict[str, TensorLayout]:
    """Return which part of its whole each tensor is, by name; raise :class:`ShardDamagedError` if unclear."""
    version = header.metadata.get(VERSION_ENTRY)
    if version != SHARD_VERSION:
        raise ShardDamagedError(key, f"has shard version {version}; this dtrain reads version {SHARD_VERSION}")
    try:
        layout = msgspec.json.decode(header.metadata.get(LAYOUT_ENTRY, ""), type=dict[str, TensorLayout])
    except msgspec.DecodeError as error:
        raise ShardDamagedError(key, f"has a {LAYOUT_ENTRY} that cannot be read: {error}") from error
    if layout.keys() != header.tensors.keys():
        raise ShardDamagedError(key, f"names other tensors in {LAYOUT_ENTRY} than it holds")
    for name, part in layout.items():
        if why := _misfit(header.tensors[name].shape, part.offsets, part.global_shape):
            raise ShardDamagedError(key, f"tensor {name!r}: {why}")
    return layout


class _RawTensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _size_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Return the bytes that a tensor takes, or None if there is no such tensor."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None or len(shape) > DIMENSIONS_MAX or any(size < 0 for size in shape):
        return None
    total, rest = divmod(math.prod(shape) * bits, 8)
    return None if rest else total


def _checked_span(key: str, name: str, item: _RawTensor) -> TensorSpan:
    begin, end = item.data_offsets
    if not 0 <= begin <= end or _size_bytes(item.dtype, item.shape) != end - begin:
        raise ShardDamagedError(
            key, f"tensor {name!r} of dtype {item.dtype[:20]!r} does not fit its bytes {begin} to {end}"
        )
    return TensorSpan(dtype=item.dtype, shape=item.shape, begin=begin, end=end)


def _check_entry(entry: TensorEntry) -> None:
    if entry.name == _METADATA:
        raise ValueError(f"a tensor must not be named {_METADATA}")
    if entry.dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {entry.name!r}: safetensors has no dtype {entry.dtype!r}")
    if (expected := _size_bytes(entry.dtype, entry.shape)) != entry.size_bytes:
        raise ValueError(f"tensor {entry.name!r} takes {expected} bytes, not {entry.size_bytes}")
    if why := _misfit(entry.shape, entry.offsets_in_whole, entry.global_shape):
        raise ValueError(f"tensor {entry.name!r}: {why}")


def _misfit(shape: tuple[int, ...], offsets: tuple[int, ...], whole: tuple[int, ...]) -> str:
    """Return why a part of ``shape`` at ``offsets`` does not lie within ``whole``; empty if it does."""
    if not len(shape) == len(offsets) == len(whole):
        return f"shape {shape}, offsets {offsets} and global shape {whole} differ in their dimensions"
    if any(at < 0 or at + size > limit for size, at, limit in zip(shape, offsets, whole, strict=True)):
        return f"shape {shape} at {offsets} does not lie within {whole}"
    return ""
