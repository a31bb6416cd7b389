"""The shard format, held against the safetensors library, and against damage."""

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.common.errors import ShardDamagedError
from dtrain.storage import shards
from dtrain.storage.shards import TensorEntry, TensorLayout, layout_of, parse_header, plan

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "U8": torch.uint8,
}

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


def entry(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    count = 1
    for size in shape:
        count *= size
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=shape,
        offsets_in_whole=(0,) * len(shape),
        global_shape=shape,
        size_bytes=count * shards.DTYPE_BITS[dtype] // 8,
    )


def blob_of(entries: list[TensorEntry], metadata: dict[str, str]) -> bytes:
    """Lay the shard out and fill it with a pattern."""
    made = plan(entries, metadata)
    data_bytes = made.total_bytes - made.data_start
    return made.header + bytes(index % 2 for index in range(data_bytes))


def test_the_library_reads_every_dtype_as_we_laid_it_out(tmp_path: Path) -> None:
    tensors = {f"t.{code}": torch.arange(6).to(dtype).reshape(2, 3) for code, dtype in TORCH_DTYPES.items()}
    made = plan([entry(f"t.{code}", code, (2, 3)) for code in TORCH_DTYPES], {"dtrain.step": "7"})
    blob = bytearray(made.total_bytes)
    blob[: made.data_start] = made.header
    for name, (begin, end) in made.data_offsets.items():
        raw = tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        blob[made.data_start + begin : made.data_start + end] = raw
    path = tmp_path / "shard.safetensors"
    path.write_bytes(blob)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata()["dtrain.step"] == "7"


def test_we_read_every_dtype_as_the_library_wrote_it() -> None:
    tensors = {f"t.{code}": torch.arange(6).to(dtype).reshape(3, 2) for code, dtype in TORCH_DTYPES.items()}
    blob = safetensors.torch.save(tensors, {"who": "the library"})
    header = parse_header(blob, total_bytes=len(blob))
    assert header.metadata == {"who": "the library"}
    assert header.tensors.keys() == tensors.keys()
    for code in TORCH_DTYPES:
        span = header.tensors[f"t.{code}"]
        assert (span.dtype, span.shape) == (code, (3, 2))
        raw = tensors[f"t.{code}"].flatten().view(torch.uint8).numpy().tobytes()
        assert blob[header.data_start + span.begin : header.data_start + span.end] == raw


@given(
    items=st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
        max_size=12,
    ),
    metadata=st.dictionaries(TEXT, TEXT),
)
def test_any_plan_is_read_back_the_same_by_us_and_by_the_library(
    items: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    entries = [entry(name, dtype, shape) for name, (dtype, shape) in items.items()]
    made = plan(entries, metadata)
    assert plan(entries[::-1], metadata) == made
    assert made.data_start % shards.ALIGNMENT_BYTES == 0
    blob = blob_of(entries, metadata)
    header = parse_header(memoryview(blob), total_bytes=made.total_bytes)
    assert (header.data_start, header.total_bytes) == (made.data_start, made.total_bytes)
    assert metadata.items() <= header.metadata.items()
    for each in entries:
        span = header.tensors[each.name]
        assert (span.dtype, span.shape, (span.begin, span.end)) == (
            each.dtype,
            each.shape,
            made.data_offsets[each.name],
        )
        assert (made.data_start + span.begin) % (shards.DTYPE_BITS[each.dtype] // 8) == 0
    assert layout_of(header) == {
        each.name: TensorLayout(global_shape=each.shape, offsets=(0,) * len(each.shape)) for each in entries
    }
    assert {name: tuple(tensor.shape) for name, tensor in safetensors.torch.load(blob).items()} == {
        name: shape for name, (_, shape) in items.items()
    }


def test_a_part_of_a_tensor_says_which_part_it_is() -> None:
    part = TensorEntry(name="w", dtype="F32", shape=(2, 4), offsets_in_whole=(6, 0), global_shape=(8, 4), size_bytes=32)
    header = parse_header(blob_of([part], {}))
    assert layout_of(header) == {"w": TensorLayout(global_shape=(8, 4), offsets=(6, 0))}


@pytest.mark.parametrize(
    ("entries", "metadata", "why"),
    [
        ([entry("a", "F32", (1,)), entry("a", "F32", (2,))], {}, "two tensors"),
        ([entry("__metadata__", "F32", (1,))], {}, "must not be named"),
        ([], {"dtrain.layout": "{}"}, "must not hold"),
        (
            [TensorEntry(name="a", dtype="F31", shape=(), offsets_in_whole=(), global_shape=(), size_bytes=4)],
            {},
            "no dtype",
        ),
        (
            [TensorEntry(name="a", dtype="F32", shape=(2,), offsets_in_whole=(0,), global_shape=(2,), size_bytes=4)],
            {},
            "takes 8 bytes",
        ),
        (
            [TensorEntry(name="a", dtype="F32", shape=(2,), offsets_in_whole=(7,), global_shape=(8,), size_bytes=8)],
            {},
            "does not lie within",
        ),
        (
            [TensorEntry(name="a", dtype="F32", shape=(2,), offsets_in_whole=(), global_shape=(8,), size_bytes=8)],
            {},
            "differ in their dimensions",
        ),
    ],
)
def test_nonsense_is_not_planned(entries: list[TensorEntry], metadata: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        plan(entries, metadata)


def raw(document: object) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(begin: int, end: int, **change: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **change}


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (b"", "too few"),
        (bytes(8), "0 bytes"),
        (b"\xff" * 8 + b"{}", "bytes; 2 to"),
        ((100).to_bytes(8, "little") + b"{}", "ends within its header"),
        (raw(b"\xff\xff\xff"), "cannot be read"),
        (raw(b"[]"), "cannot be read"),
        (raw({"__metadata__": {"a": 1}}), "cannot be read"),
        (raw({"t": {"dtype": "U8"}}), "cannot be read"),
        (raw({"t": tensor(0, 4, extra=1)}), "cannot be read"),
        (raw({"t": tensor(0, 4, dtype="X9")}), "does not fit"),
        (raw({"t": tensor(0, 4, shape=[5])}), "does not fit"),
        (raw({"t": tensor(0, 4, shape=[-4])}), "does not fit"),
        (raw({"t": tensor(0, 4, shape=[1] * 65)}), "does not fit"),
        (raw({"t": tensor(0, 1, dtype="F4", shape=[1])}), "does not fit"),
        (raw({"t": tensor(0, 4, data_offsets=[4, 0])}), "does not fit"),
        (raw({"t": tensor(0, 4, data_offsets=[-4, 0])}), "does not fit"),
        (raw({"t": tensor(4, 8)}), "hole or an overlap"),
        (raw({"a": tensor(0, 4), "b": tensor(2, 6)}), "hole or an overlap"),
        (raw({"a": tensor(0, 4), "b": tensor(5, 6)}), "hole or an overlap"),
    ],
)
def test_a_hostile_header_is_refused_by_name(blob: bytes, why: str) -> None:
    with pytest.raises(ShardDamagedError, match=why) as caught:
        parse_header(blob, key="rank-00001.safetensors")
    assert caught.value.key == "rank-00001.safetensors"


def test_a_shard_of_another_size_than_its_header_says_is_refused() -> None:
    blob = blob_of([entry("a", "F32", (4,))], {})
    with pytest.raises(ShardDamagedError, match=f"has {len(blob) - 1} bytes"):
        parse_header(blob, total_bytes=len(blob) - 1)


def test_a_file_of_the_library_is_no_shard_of_ours() -> None:
    blob = safetensors.torch.save({"a": torch.zeros(2)})
    with pytest.raises(ShardDamagedError, match="shard version None"):
        layout_of(parse_header(blob))


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ("", "cannot be read"),
        ("{}", "other tensors"),
        ('{"a":{"global_shape":[4],"offsets":[1]}}', "does not lie within"),
        ('{"a":{"global_shape":[4,1],"offsets":[0,0]}}', "differ in their dimensions"),
    ],
)
def test_a_layout_that_does_not_fit_the_tensors_is_refused(layout: str, why: str) -> None:
    metadata = {"dtrain.version": "1", "dtrain.layout": layout}
    header = parse_header(raw({"__metadata__": metadata, "a": tensor(0, 4)}))
    with pytest.raises(ShardDamagedError, match=why):
        layout_of(header)


@given(blob=st.binary(max_size=200), cut=st.integers(0, 300), flip=st.integers(0, 2_000))
def test_damage_never_gives_anything_but_a_clear_error(blob: bytes, cut: int, flip: int) -> None:
    whole = bytearray(blob_of([entry("a", "F32", (2, 2)), entry("b", "I8", (3,))], {"dtrain.step": "1"}))
    whole[flip // 8 % len(whole)] ^= 1 << flip % 8
    for data in (blob, bytes(whole[:cut]), bytes(whole)):
        try:
            layout_of(parse_header(data, total_bytes=len(data)))
        except ShardDamagedError:
            continue
