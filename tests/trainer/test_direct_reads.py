"""What lies on this node is read in place, and nothing is taken for read that is not what its index says."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dtrain.storage import indexes, shards
from dtrain.storage.catalogs import TensorChunk
from dtrain.storage.indexes import IndexedShard, index_shard, open_index
from dtrain.storage.ranges import joined_spans
from dtrain.storage.restore_files import PartOfImage, Sources
from dtrain.storage.tensor_codes import CODE_OF_DTYPE, size_bytes
from dtrain.trainer.direct_reads import DirectReader
from dtrain.trainer.resharding import Move

KEY = "a/shard"
PIECE_BYTES = 4096


@dataclass(frozen=True)
class Saved:
    """A shard in a file, and what it holds."""

    path: Path
    shard: IndexedShard
    tensors: dict[str, torch.Tensor]

    def read(self, into: dict[str, torch.Tensor], sources: Sources) -> tuple[list[str], list[int]]:
        """Read; return the names that are left, and what was told."""
        told: list[int] = []
        reader = DirectReader([self.shard], sources, threads=3, told=told.append)
        left = reader.take([self.move(name, target) for name, target in into.items()])
        return [move.name for move in left], told

    def move(self, name: str, target: torch.Tensor) -> Move:
        span, start = self.shard.header.tensors[name], self.shard.header.data_start
        shape = tuple(self.tensors[name].shape)
        chunk = TensorChunk(
            shard=0, shape=shape, offsets=(0,) * len(shape), begin=start + span.begin, end=start + span.end
        )
        return Move(name=name, dtype=span.dtype, chunk=chunk, into=target)

    def position(self, name: str) -> int:
        """Where the tensor begins in the file."""
        return self.shard.header.data_start + self.shard.header.tensors[name].begin


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saved:
    monkeypatch.setattr(indexes, "PIECE_BYTES", PIECE_BYTES)  # so that a tensor of some KiB has several pieces
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "large": torch.rand(101, 113, generator=generator),
        "small": torch.rand(3, generator=generator).to(torch.bfloat16),
        "whole": torch.randint(0, 1 << 40, (40, 30), generator=generator),
    }
    entries = [
        shards.TensorEntry(
            name=name,
            dtype=CODE_OF_DTYPE[tensor.dtype],
            shape=tuple(tensor.shape),
            offsets_in_whole=(0,) * tensor.dim(),
            global_shape=tuple(tensor.shape),
            size_bytes=size_bytes(tensor),
        )
        for name, tensor in tensors.items()
    ]
    plan = shards.plan(entries, {})
    image = bytearray(plan.header.ljust(plan.total_bytes))
    for name, (begin, end) in plan.data_offsets.items():
        image[plan.data_start + begin : plan.data_start + end] = bytes(tensors[name].view(torch.uint8).numpy())
    data = bytes(image)
    path = tmp_path / "shard"
    path.write_bytes(data)
    index, _ = index_shard(memoryview(data))
    return Saved(path, open_index(index, key="index", shard_key=KEY), tensors)


def empties(saved: Saved) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in saved.tensors.items()}


@pytest.mark.parametrize("kind", ["image", "object"])
def test_every_bit_comes_to_its_place(saved: Saved, kind: str) -> None:
    sources = Sources(images={0: str(saved.path)}) if kind == "image" else Sources(objects={KEY: str(saved.path)})
    into = empties(saved)
    left, told = saved.read(into, sources)
    assert left == []
    assert all(torch.equal(into[name], tensor) for name, tensor in saved.tensors.items())
    assert sorted(told) == told and told[-1] == sum(map(size_bytes, saved.tensors.values()))


def test_of_a_part_only_what_is_there_is_read_and_the_rest_left_to_the_worker(saved: Saved) -> None:
    begin = saved.position("large")
    sizes = {name: size_bytes(saved.tensors[name]) for name in ("small", "whole")}
    there = [(saved.position(name), saved.position(name) + size) for name, size in sizes.items()]
    part = PartOfImage(path=str(saved.path), spans=joined_spans([(begin, begin + PIECE_BYTES), *there]))
    into = empties(saved)
    left, _ = saved.read(into, Sources(parts={0: part}))
    assert left == ["large"]
    assert torch.equal(into["whole"], saved.tensors["whole"]) and torch.equal(into["small"], saved.tensors["small"])
    assert not into["large"].any(), "nothing of it was read"
    elsewhere = Sources(parts={0: part}, objects={KEY: str(saved.path)})
    assert saved.read(into, elsewhere)[0] == [] and torch.equal(into["large"], saved.tensors["large"])


def test_a_target_that_lies_otherwise_is_converted(saved: Saved) -> None:
    strided = torch.zeros(113, 101).T
    wider = torch.zeros(3, dtype=torch.float64)
    left, _ = saved.read({"large": strided, "small": wider}, Sources(images={0: str(saved.path)}))
    assert left == []
    assert torch.equal(strided, saved.tensors["large"])
    assert torch.equal(wider, saved.tensors["small"].double())


@pytest.mark.parametrize("at", [0, PIECE_BYTES, 101 * 113 * 4 - 1])
def test_a_flipped_bit_leaves_its_tensor_to_the_worker_and_no_other(saved: Saved, at: int) -> None:
    with saved.path.open("r+b") as file:
        position = saved.position("large") + at
        file.seek(position)
        [byte] = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 4]))
    into = empties(saved)
    left, _ = saved.read(into, Sources(objects={KEY: str(saved.path)}))
    assert left == ["large"]
    assert torch.equal(into["whole"], saved.tensors["whole"]) and torch.equal(into["small"], saved.tensors["small"])


def test_a_flipped_bit_does_not_pass_a_conversion_either(saved: Saved) -> None:
    with saved.path.open("r+b") as file:
        file.seek(saved.position("small"))
        file.write(b"\xff\xff")
    left, _ = saved.read({"small": torch.zeros(3)}, Sources(objects={KEY: str(saved.path)}))
    assert left == ["small"]


def _remove(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [_remove, _cut, _link, _pipe, _folder])
def test_what_cannot_be_read_is_left_to_the_worker(saved: Saved, harm: Callable[[Path], None]) -> None:
    harm(saved.path)
    left, _ = saved.read(empties(saved), Sources(objects={KEY: str(saved.path)}))
    assert left == ([max(saved.tensors, key=saved.position)] if harm is _cut else list(saved.tensors))


def test_what_is_not_on_this_node_is_left_to_the_worker(saved: Saved) -> None:
    assert saved.read(empties(saved), Sources(objects={"another": str(saved.path)})) == (list(saved.tensors), [])


def test_no_file_stays_open(saved: Saved) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    saved.read(empties(saved), Sources(images={0: str(saved.path)}))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
