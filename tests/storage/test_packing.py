"""What is sent of a shard whose tensors partly did not change, and that every byte of it is found again."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from dtrain.common.digests import blob_digest
from dtrain.common.errors import ShardDamagedError
from dtrain.common.names import AttemptNumber, JobName
from dtrain.common.packs import PACKS_MAX
from dtrain.storage import shards
from dtrain.storage.indexes import IndexedShard, index_shard, open_index
from dtrain.storage.keys import pack_key
from dtrain.storage.packing import PACK_MIN_BYTES, TENSOR_MIN_BYTES, StoredShard, store_image
from dtrain.storage.parts import FileParts
from dtrain.storage.ranges import NeededRange, read_needed
from tests.support.memory_store import MemoryStore

MIB = 1024 * 1024
FROZEN = os.urandom(2 * MIB)


def image_of(tensors: dict[str, bytes]) -> bytes:
    entries = [
        shards.TensorEntry(
            name=name,
            dtype="U8",
            shape=(len(data),),
            offsets_in_whole=(0,),
            global_shape=(len(data),),
            size_bytes=len(data),
        )
        for name, data in tensors.items()
    ]
    plan = shards.plan(entries, {shards.TREE_ENTRY: json.dumps({"objects": {}, "local": {}}), "other": "ü\n"})
    return plan.header + b"".join(tensors[name] for name in plan.data_offsets)


class Saved:
    """A store to which images are saved one after another, each upon the one before."""

    def __init__(self, folder: Path) -> None:
        self.store = MemoryStore()
        self.attempt = 0
        self.base: IndexedShard | None = None
        self.slot = folder / "slot"

    def save(self, tensors: dict[str, bytes], *, base: bool = True) -> StoredShard:
        """Save and read everything back from the store."""
        self.attempt += 1
        image = image_of(tensors)
        key = f"attempt-{self.attempt}"

        def name(digest: str) -> str:
            return pack_key(JobName("tuned"), AttemptNumber(self.attempt), 0, digest)

        made = store_image(memoryview(image), pack_key=name, base=self.base if base else None)
        self.slot.write_bytes(image)
        with self.slot.open("rb") as file:
            if made.fresh is not None:
                self.store.put_file(made.fresh.key, FileParts(file=file.fileno(), ranges=made.fresh_ranges))
            self.store.put_file(key, FileParts(file=file.fileno(), ranges=made.ranges, head=made.head))
        stored = self.store.get(key)
        assert (len(stored), blob_digest(stored)) == (made.size_bytes, made.digest)
        held = shards.parse_header(stored, total_bytes=len(stored))  # whatever is left out, it is a shard
        shards.layout_of(held)
        for pack in made.packs:
            data = self.store.get(pack.key)
            assert (len(data), blob_digest(data)) == (pack.size_bytes, pack.digest)
            assert pack.key.endswith(f"-{pack.digest.rpartition(':')[2]}.bin")
        shard = open_index(made.index, key="index", shard_key=key)
        assert shard.stored_bytes == made.size_bytes
        assert shard.index.packs == made.packs
        needed = [NeededRange(shard=0, tensor=name, begin=0, end=len(data)) for name, data in tensors.items()]
        assert read_needed(self.store, [shard], needed)[0] == image
        assert set(held.tensors) == {name for name, (place, _) in shard.places.items() if place == key}
        self.base = shard
        return made


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def changing(size_bytes: int = 3 * MIB) -> bytes:
    return os.urandom(size_bytes)


def test_the_second_time_unchanged_tensors_are_packed_and_from_the_third_on_they_are_not_sent(saved: Saved) -> None:
    first = saved.save({"frozen": FROZEN, "head": changing(), "small": b"s"})
    assert (first.packs, first.head, first.fresh) == ((), b"", None)
    second = saved.save({"frozen": FROZEN, "head": changing(), "small": b"s"})
    assert second.fresh is not None and second.packs == (second.fresh,)
    assert second.fresh.size_bytes == len(FROZEN)
    for _ in range(3):
        later = saved.save({"frozen": FROZEN, "head": changing(), "small": b"s"})
        assert later.fresh is None and later.packs == second.packs
        assert 3 * MIB < later.size_bytes < 3 * MIB + 2048


def test_a_shard_of_which_nothing_changed_is_a_header(saved: Saved) -> None:
    for _ in range(3):
        made = saved.save({"frozen": FROZEN})
    assert made.ranges == () and made.size_bytes == len(made.head)


def test_without_a_base_all_is_sent_and_the_index_says_what_it_said_before_there_were_packs(saved: Saved) -> None:
    for _ in range(2):
        made = saved.save({"frozen": FROZEN, "head": changing()}, base=False)
        assert made.packs == () and made.head == b""
    image = image_of({"frozen": FROZEN})
    made = store_image(memoryview(image), pack_key=str)
    assert (made.index, made.digest) == index_shard(memoryview(image))


def test_what_thaws_is_sent_again_and_what_freezes_is_packed_beside(saved: Saved) -> None:
    layers = {f"layer{number}": changing(2 * MIB) for number in range(3)}
    saved.save({**layers, "head": changing()})
    packed = saved.save({**layers, "head": changing()})
    layers["layer0"] = changing(2 * MIB)
    thawed = saved.save({**layers, "head": changing()})
    assert thawed.packs == packed.packs and thawed.fresh is None
    frozen = saved.save({**layers, "head": changing()})
    assert frozen.fresh is not None and len(frozen.packs) == 2
    assert frozen.fresh.size_bytes == 2 * MIB


def test_a_pack_of_which_less_than_half_is_wanted_is_left_and_the_rest_packed_anew(saved: Saved) -> None:
    layers = {f"layer{number}": changing(2 * MIB) for number in range(4)}
    saved.save(dict(layers))
    [old] = saved.save(dict(layers)).packs
    layers |= {name: changing(2 * MIB) for name in ("layer0", "layer1")}
    assert saved.save(dict(layers)).packs == (old,), "half of it is still worth it"
    layers |= {name: changing(2 * MIB) for name in ("layer0", "layer1", "layer2")}
    made = saved.save(dict(layers))
    assert made.fresh is not None and made.packs == (made.fresh,)
    assert made.fresh.size_bytes == 2 * MIB


def test_there_are_never_more_packs_than_a_restore_can_bear(saved: Saved) -> None:
    layers: dict[str, bytes] = {}
    for number in range(PACKS_MAX + 4):
        layers[f"layer{number:02d}"] = os.urandom(PACK_MIN_BYTES)
        saved.save(dict(layers))
        made = saved.save(dict(layers))
        assert len(made.packs) <= PACKS_MAX
    assert made.size_bytes < TENSOR_MIN_BYTES


@pytest.mark.parametrize(
    "sizes",
    [{"a": TENSOR_MIN_BYTES - 1}, {"a": TENSOR_MIN_BYTES, "b": TENSOR_MIN_BYTES}, {"a": 0, "b": PACK_MIN_BYTES - 1}],
    ids=["small", "few", "empty"],
)
def test_what_is_not_worth_a_request_stays_in_the_shard(saved: Saved, sizes: dict[str, int]) -> None:
    same = {name: bytes(size) for name, size in sizes.items()}
    for _ in range(3):
        assert saved.save(dict(same)).packs == ()


def test_an_upload_that_is_repeated_sends_the_same_bytes(saved: Saved) -> None:
    tensors = {"frozen": FROZEN, "head": changing()}
    saved.save(tensors)
    image = memoryview(image_of({**tensors, "head": changing()}))
    assert store_image(image, pack_key=str, base=saved.base) == store_image(image, pack_key=str, base=saved.base)


def test_a_tensor_of_another_length_or_type_name_is_not_taken_for_the_old_one(saved: Saved) -> None:
    saved.save({"frozen": bytes(2 * MIB), "other": changing()})
    made = saved.save({"frozen": bytes(2 * MIB - 1), "other": changing()})
    assert made.packs == ()


@pytest.mark.parametrize("victim", ["pack", "shard"])
def test_damage_is_named_by_the_object_that_has_it(saved: Saved, victim: str) -> None:
    for _ in range(2):
        made = saved.save({"frozen": FROZEN, "head": changing()})
    assert saved.base is not None
    key = made.packs[0].key if victim == "pack" else f"attempt-{saved.attempt}"
    saved.store.flip_bit(key)
    needed = [NeededRange(shard=0, tensor=name, begin=5, end=6) for name in ("frozen", "head")]
    with pytest.raises(ShardDamagedError, match="frozen" if victim == "pack" else "head") as caught:
        read_needed(saved.store, [saved.base], needed)
    assert caught.value.key == key


def test_a_stored_header_that_was_changed_is_noticed(saved: Saved) -> None:
    for _ in range(2):
        saved.save({"frozen": FROZEN, "head": changing()})
    assert saved.base is not None
    saved.store.flip_bit(saved.base.key, byte=20)
    with pytest.raises(ShardDamagedError, match="header"):
        read_needed(saved.store, [saved.base], [NeededRange(shard=0, tensor="head", begin=0, end=1)])


@pytest.mark.parametrize(
    "change",
    [
        {"places": {"frozen": [1, 0]}},
        {"places": {"frozen": [0, 1]}},
        {"places": {"frozen": [0, -1]}},
        {"places": {"nobody": [0, 0]}},
        {"places": {}},
        {"packs": []},
        {"shard_start": 0},
        {"version": 1},
        {"version": 3},
    ],
    ids=str,
)
def test_an_index_whose_places_cannot_be_is_refused(saved: Saved, change: dict[str, object]) -> None:
    for _ in range(2):
        made = saved.save({"frozen": FROZEN, "head": changing()})
    document = {**msgspec.json.decode(made.index), **change}
    with pytest.raises(ShardDamagedError):
        open_index(json.dumps(document).encode(), key="index", shard_key="shard")


def test_an_index_from_before_there_were_packs_is_read() -> None:
    image = image_of({"a": b"abc"})
    document = msgspec.json.decode(index_shard(memoryview(image))[0])
    for field in ("packs", "places", "shard_start", "shard_header_digest"):
        del document[field]
    document["version"] = 1
    shard = open_index(json.dumps(document).encode(), key="index", shard_key="shard")
    store = MemoryStore()
    store.put("shard", image)
    assert read_needed(store, [shard], [NeededRange(shard=0, tensor="a", begin=0, end=3)])[0] == image
