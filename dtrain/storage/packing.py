"""Which tensors of a staged shard are sent, and which lie in storage already.

Frozen weights do not change from checkpoint to checkpoint, and sending them again is most of the bytes of a fine-tuning
run. The worker digests every tensor anyway; one whose digests equal those in the index of an earlier, committed
checkpoint (the *base*) is there already. Rules:

- what the base holds in a pack is referred to there; what it holds in its own shard is written once more, into a
  fresh pack, so that no checkpoint ever needs a shard of another, which goes with its checkpoint;
- a pack of which less than half is still wanted is left: what is wanted is packed anew, so that storage never holds
  more than twice what somebody needs;
- what is small stays in the shard: a request of its own costs more than its bytes.

The same image and the same base give the same objects, so an upload that is repeated changes nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import xxhash

from dtrain.common.digests import BLOB_ALGORITHM
from dtrain.common.packs import PACKS_MAX, Pack
from dtrain.storage import shards
from dtrain.storage.indexes import HASH_BYTES, PIECE_BYTES, IndexedShard, digest_image, encode_index
from dtrain.storage.shards import ShardHeader, TensorEntry, TensorLayout

TENSOR_MIN_BYTES = 64 * 1024  # smaller ones are always in the shard: their entry in the index is no cheaper
PACK_MIN_BYTES = 1024 * 1024  # less is sent again each time: a request to S3 costs as much as this many bytes

Ranges = tuple[tuple[int, int], ...]  # begin and end, positions in the image


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """What is put for one image, in this order: the fresh pack, the shard, the index."""

    fresh: Pack | None  # None: nothing is packed that was not before
    fresh_ranges: Ranges  # of the image, what the fresh pack holds
    head: bytes  # of the shard, before the ranges; empty if it is the image itself
    ranges: Ranges
    size_bytes: int  # of the shard
    digest: str  # of the shard
    packs: tuple[Pack, ...]  # all that the index names, the fresh one included; by key
    index: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Which tensors lie elsewhere than in the shard."""

    kept: dict[str, tuple[Pack, int]]  # in a pack of the base, and where there
    fresh: tuple[str, ...]  # to be packed now, in the order of the image

    @property
    def elsewhere(self) -> frozenset[str]:
        return frozenset(self.kept) | frozenset(self.fresh)


def store_image(
    image: memoryview, *, pack_key: Callable[[str], str], base: IndexedShard | None = None, key: str = "shard"
) -> StoredShard:
    """Say what is to be put for ``image``; ``pack_key`` names a pack by the hex digits of its digest.

    Raises :class:`ShardDamagedError` naming ``key`` if the image is no shard.
    """
    header = shards.parse_header(image, key=key, total_bytes=len(image))
    layout = shards.layout_of(header, key=key)
    # Most probably what was packed is so again. A right guess spares a second look at what is in the shard.
    guess = frozenset() if base is None else frozenset(base.index.places) & header.tensors.keys()
    stored_header = _stored_header(image, header, layout, guess)
    if stored_header is None:
        guess, stored_header = frozenset(), bytes(image[: header.data_start])
    digests, digest = digest_image(image, header, stored_header, elsewhere=guess)
    choice = _choose(header, digests, base)
    if choice.elsewhere != guess:
        stored_header = _stored_header(image, header, layout, choice.elsewhere)
        if stored_header is None:
            choice, stored_header = _Choice(kept={}, fresh=()), bytes(image[: header.data_start])
        parts = (image[begin:end] for begin, end in _ranges(header, header.tensors.keys() - choice.elsewhere))
        digest = _digest((memoryview(stored_header), *parts))
    if not choice.elsewhere:
        return StoredShard(
            fresh=None,
            fresh_ranges=(),
            head=b"",
            ranges=((0, len(image)),),
            size_bytes=len(image),
            digest=digest,
            packs=(),
            index=encode_index(image, header, digests),
        )
    return _with_packs(image, header, digests, digest, stored_header, choice, pack_key)


def _with_packs(
    image: memoryview,
    header: ShardHeader,
    digests: dict[str, tuple[str, ...]],
    digest: str,
    stored_header: bytes,
    choice: _Choice,
    pack_key: Callable[[str], str],
) -> StoredShard:
    places = dict(choice.kept)
    fresh, fresh_ranges = None, _ranges(header, choice.fresh)
    if fresh_ranges:
        fresh_digest = _digest(image[begin:end] for begin, end in fresh_ranges)
        size_bytes = _size(fresh_ranges)
        fresh = Pack(key=pack_key(fresh_digest.rpartition(":")[2]), size_bytes=size_bytes, digest=fresh_digest)
        position = 0
        for name in choice.fresh:
            places[name] = fresh, position
            position += header.tensors[name].end - header.tensors[name].begin
    packs = tuple(sorted({pack for pack, _ in places.values()}))
    ranges = _ranges(header, header.tensors.keys() - places.keys())
    return StoredShard(
        fresh=fresh,
        fresh_ranges=fresh_ranges,
        head=stored_header,
        ranges=ranges,
        size_bytes=len(stored_header) + _size(ranges),
        digest=digest,
        packs=packs,
        index=encode_index(
            image,
            header,
            digests,
            packs=packs,
            places={name: (packs.index(pack), begin) for name, (pack, begin) in places.items()},
            stored_header=stored_header,
        ),
    )


def _choose(header: ShardHeader, digests: dict[str, tuple[str, ...]], base: IndexedShard | None) -> _Choice:
    """Keep what packs still serve; pack anew what else did not change."""
    sizes = {name: span.end - span.begin for name, span in header.tensors.items()}
    if base is None or base.index.piece_bytes != PIECE_BYTES:
        return _Choice(kept={}, fresh=())
    before = {name: span.end - span.begin for name, span in base.header.tensors.items()}
    unchanged = [
        name
        for name, size_bytes in sizes.items()
        if size_bytes >= TENSOR_MIN_BYTES
        and before.get(name) == size_bytes
        and base.index.digests[name] == digests[name]
    ]
    used_bytes = [0] * len(base.index.packs)
    for name in unchanged:
        if name in base.index.places:
            used_bytes[base.index.places[name][0]] += sizes[name]
    serving = [number for number, pack in enumerate(base.index.packs) if 2 * used_bytes[number] >= pack.size_bytes]
    serving.sort(key=lambda number: -used_bytes[number])
    del serving[PACKS_MAX - 1 :]  # one more may become of the rest
    kept = {}
    for name in unchanged:
        number, begin = base.index.places.get(name, (-1, 0))
        if number in serving:
            kept[name] = base.index.packs[number], begin
    rest = tuple(name for name in unchanged if name not in kept)
    return _Choice(kept=kept, fresh=rest if sum(sizes[name] for name in rest) >= PACK_MIN_BYTES else ())


def _stored_header(
    image: memoryview, header: ShardHeader, layout: dict[str, TensorLayout], elsewhere: frozenset[str]
) -> bytes | None:
    """Return the header of a shard that holds all tensors but those; None if they would not stand in this order."""
    if not elsewhere:
        return bytes(image[: header.data_start])
    entries = [
        TensorEntry(
            name=name,
            dtype=span.dtype,
            shape=span.shape,
            offsets_in_whole=layout[name].offsets,
            global_shape=layout[name].global_shape,
            size_bytes=span.end - span.begin,
        )
        for name, span in header.tensors.items()
        if name not in elsewhere
    ]
    added = (shards.VERSION_ENTRY, shards.LAYOUT_ENTRY)
    plan = shards.plan(entries, {name: text for name, text in header.metadata.items() if name not in added})
    # dtrain lays out every image in the order of plan(); whoever did not has it stored whole.
    return plan.header if list(plan.data_offsets) == [entry.name for entry in entries] else None


def _ranges(header: ShardHeader, names: Iterable[str]) -> Ranges:
    """Return where these tensors lie in the image, in its order, joined where they touch."""
    found: list[tuple[int, int]] = []
    wanted = frozenset(names)
    for name, span in header.tensors.items():
        if name not in wanted or span.begin == span.end:
            continue
        begin, end = header.data_start + span.begin, header.data_start + span.end
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, end))
    return tuple(found)


def _size(ranges: Ranges) -> int:
    return sum(end - begin for begin, end in ranges)


def _digest(parts: Iterable[memoryview]) -> str:
    hasher = xxhash.xxh3_128()
    for part in parts:
        for begin in range(0, len(part), HASH_BYTES):
            hasher.update(part[begin : begin + HASH_BYTES])
    return f"{BLOB_ALGORITHM}:{hasher.hexdigest()}"
