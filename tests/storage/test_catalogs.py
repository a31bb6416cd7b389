"""Parts of tensors make wholes, or the checkpoint is refused and the tensor named."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pytest

from dtrain.common.errors import ShardDamagedError
from dtrain.storage import indexes
from dtrain.storage.catalogs import Catalog, IncompleteCheckpoint, catalog_of, contiguous_range
from dtrain.storage.indexes import IndexedShard, index_shard, open_index
from dtrain.storage.ranges import NeededRange, pieces_of, read_needed, runs_of
from dtrain.storage.shards import (
    FIRST_COUNTS_ENTRY,
    RANK_ENTRY,
    STEP_ENTRY,
    TREE_ENTRY,
    WORLD_SIZE_ENTRY,
    TensorEntry,
    plan,
)
from tests.support.memory_store import MemoryStore


@dataclass(frozen=True)
class Part:
    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: str = "U8"


def shard(
    rank: int,
    *parts: Part,
    names: list[str] | None = None,
    fill: int | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """A shard of these parts, filled with its rank or ``fill``; its tree names them, or ``names``."""
    tensors = [
        TensorEntry(
            name=part.name,
            dtype=part.dtype,
            shape=part.shape,
            offsets_in_whole=part.offsets,
            global_shape=part.whole,
            size_bytes=math.prod(part.shape) * (4 if part.dtype == "F32" else 1),
        )
        for part in parts
    ]
    told = names if names is not None else [part.name for part in parts]
    tree = {"objects": {"model": {"dict": [[name, {"tensor": name}] for name in told]}}, "local": {}}
    entries = {
        STEP_ENTRY: "1", RANK_ENTRY: str(rank), WORLD_SIZE_ENTRY: "2", TREE_ENTRY: json.dumps(tree), **metadata,
    }  # fmt: skip
    laid = plan(tensors, entries)
    return laid.header + bytes([rank + 1 if fill is None else fill]) * (laid.total_bytes - laid.data_start)


def indexed(data: bytes, key: str = "shard") -> IndexedShard:
    return open_index(index_shard(memoryview(data))[0], key="index", shard_key=key)


def joined(*shards: bytes) -> Catalog:
    return catalog_of([indexed(data, f"shard-{rank}") for rank, data in enumerate(shards)])


def rows(start: int, stop: int, of: int = 10, name: str = "w", dtype: str = "U8") -> Part:
    return Part(name, (stop - start, 3), (start, 0), (of, 3), dtype)


@pytest.mark.parametrize(
    "parts",
    [
        [[rows(0, 10)], []],
        [[rows(0, 4)], [rows(4, 10)]],
        [[rows(4, 10)], [rows(0, 4)]],
        [[rows(0, 10)], [Part("w", (0, 3), (10, 0), (10, 3))]],
        [[Part("w", (), (), ())], []],
        [[Part("w", (0, 3), (0, 0), (0, 3))], []],
        [[Part("w", (2, 1), (0, 0), (2, 3))], [Part("w", (2, 2), (0, 1), (2, 3))]],
    ],
    ids=["one whole", "two rows", "in any order", "one empty", "a number", "nothing", "columns"],
)
def test_parts_that_cover_a_tensor_make_it_whole(parts: list[list[Part]]) -> None:
    catalog = joined(*(shard(rank, *own, names=["w"]) for rank, own in enumerate(parts)))
    assert catalog.tensors["w"].shape == parts[0][0].whole


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([[rows(0, 4)], [rows(5, 10)]], "'w' of shape .* hold 27 of 30"),
        ([[rows(0, 6)], [rows(5, 10)]], "'w' of shape .* ranks 0 and 1 overlap"),
        ([[rows(0, 10)], [rows(0, 10)]], "'w': ranks 0 and 1 hold different values"),
        ([[rows(0, 5)], [rows(5, 12, of=12)]], "'w': rank 1 says shape"),
        ([[rows(0, 5)], [rows(5, 10, dtype="F32")]], "'w': rank 1 has F32, others U8"),
        ([[Part("w", (), (), ())], [Part("w", (), (), ())]], "'w': ranks 0 and 1 hold different values"),
        (
            [[Part("w", (2, 2), (0, 0), (3, 3))], [Part("w", (2, 2), (1, 1), (3, 3))]],
            "'w' .* overlap",
        ),
    ],
    ids=["a hole", "an overlap", "stored twice", "other shape", "other type", "two numbers", "corners"],
)
def test_parts_that_do_not_are_refused_and_the_tensor_is_named(parts: list[list[Part]], why: str) -> None:
    with pytest.raises(IncompleteCheckpoint, match=why):
        joined(*(shard(rank, *own) for rank, own in enumerate(parts)))


def test_equal_copies_of_one_part_are_one_part_and_the_first_ranks_is_kept() -> None:
    halves = rows(0, 5), rows(5, 10)
    found = joined(shard(0, halves[0]), shard(1, halves[1]), shard(2, halves[0], fill=1), shard(3, halves[1], fill=2))
    assert [(chunk.shard, chunk.offsets) for chunk in found.tensors["w"].chunks] == [(0, (0, 0)), (1, (5, 0))]


def test_copies_that_differ_are_refused_unless_the_first_ranks_counts() -> None:
    with pytest.raises(IncompleteCheckpoint, match=r"'w': ranks 0 and 2 hold different .* a name of its own"):
        joined(shard(0, rows(0, 5)), shard(1, rows(5, 10)), shard(2, rows(0, 5)))
    with pytest.raises(IncompleteCheckpoint, match=r"'w' .* ranks 0 and 1 overlap"):
        joined(shard(0, rows(0, 10), fill=1), shard(1, rows(0, 5), fill=1))
    told = {FIRST_COUNTS_ENTRY: '["w"]'}
    found = joined(*(shard(rank, rows(0, 10), metadata=told) for rank in (0, 1)))
    assert [chunk.shard for chunk in found.tensors["w"].chunks] == [0]
    with pytest.raises(IncompleteCheckpoint, match="first_counts cannot be read"):
        joined(shard(0, rows(0, 10), metadata={FIRST_COUNTS_ENTRY: "{"}))


def test_a_tensor_that_a_tree_names_and_no_rank_stored_is_refused() -> None:
    with pytest.raises(IncompleteCheckpoint, match="'lost': rank 1 has it, and no rank stored it"):
        joined(shard(0, rows(0, 10)), shard(1, names=["w", "lost"]))


@pytest.mark.parametrize(
    ("chunk", "offsets", "shape", "expected"),
    [
        ((10, 3), (0, 0), (10, 3), (0, 30)),
        ((10, 3), (2, 0), (3, 3), (6, 15)),
        ((10, 3), (2, 1), (2, 1), (7, 11)),
        ((5,), (1,), (2,), (1, 3)),
        ((), (), (), (0, 1)),
    ],
)
def test_a_boxs_bytes_lie_between_its_first_and_its_last_element(
    chunk: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    catalog = joined(shard(0, Part("w", chunk, tuple(0 for _ in chunk), chunk)))
    assert contiguous_range(catalog.tensors["w"].chunks[0], offsets, shape) == expected


def test_only_the_pieces_that_are_needed_are_read_and_those_side_by_side_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(indexes, "PIECE_BYTES", 10)
    parts = [Part(name, (25,), (0,), (25,)) for name in ("a", "b", "c")]
    data = shard(0, *parts)
    found = indexed(data)
    assert [len(found.index.digests[name]) for name in "abc"] == [3, 3, 3]
    needed = [
        NeededRange(shard=0, tensor="a", begin=20, end=25),
        NeededRange(shard=0, tensor="b", begin=0, end=1),
        NeededRange(shard=0, tensor="c", begin=12, end=13),
    ]
    runs = runs_of(0, pieces_of([found], needed)[0])
    start = found.header.data_start
    assert [(run.begin - start, run.end - start) for run in runs] == [(20, 35), (60, 70)]
    store = MemoryStore()
    store.put("shard", data)
    image = read_needed(store, [found], needed)[0]
    assert image[start + 20 : start + 35] == data[start + 20 : start + 35]
    assert bytes(image[start : start + 20]) == bytes(20), "not needed, not read"
    assert [call for call in store.calls if call[0] == "read_into"] == [("read_into", "shard")] * 3


@pytest.mark.parametrize(("byte", "named"), [(-1, "tensor 'c'"), (-26, "tensor 'b'"), (20, "header")])
def test_a_flipped_bit_names_its_tensor(byte: int, named: str) -> None:
    data = shard(0, *(Part(name, (25,), (0,), (25,)) for name in ("a", "b", "c")))
    found = indexed(data)
    store = MemoryStore()
    store.put("shard", data)
    store.flip_bit("shard", byte=byte)
    needed = [NeededRange(shard=0, tensor=name, begin=0, end=25) for name in "abc"]
    with pytest.raises(ShardDamagedError, match=named):
        read_needed(store, [found], needed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text.replace(b'"version":2', b'"version":9'),
        lambda text: text.replace(b'"data_start":', b'"data_start":1'),
        lambda text: text.replace(b'"size_bytes":', b'"size_bytes":1'),
        lambda text: text.replace(b'"digests":{"w"', b'"digests":{"x"'),
        lambda text: text.replace(b'"piece_bytes":67108864', b'"piece_bytes":1'),
        lambda text: text.replace(b'"piece_bytes":67108864', b'"piece_bytes":0'),
    ],
    ids=["cut", "version", "start", "size", "names", "pieces", "no pieces"],
)
def test_an_index_that_does_not_fit_its_shard_is_refused_by_name(damage: object) -> None:
    text, _ = index_shard(memoryview(shard(0, rows(0, 10))))
    assert callable(damage)
    changed = damage(text)
    assert changed != text
    with pytest.raises(ShardDamagedError, match=r"^index: "):
        open_index(changed, key="index", shard_key="shard")
