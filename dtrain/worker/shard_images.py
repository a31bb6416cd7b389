"""A shard as it grows in shared memory: as large as it was staged, with holes where nothing is needed.

Where this node staged that very attempt and still holds it, nothing grows: the image is another name of the stage
slot's file, and its bytes are verified where they lie, piece by piece. If one of them is not what it should be, the
image becomes a file of its own, and everything is brought again: from the slot what is sound, then from what the node
fetched before (caches.py), from storage the rest.

Nobody writes into such a slot while it is read: it holds the newest committed checkpoint, so the next one is staged
into the other, and the one after that only when all ranks have stored the next, having restored this one.
"""

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from dtrain.common.mailbox import STAGE_SLOTS
from dtrain.storage.catalogs import Catalog, tensor_leaves
from dtrain.storage.indexes import IndexedShard, Piece, piece_is_sound
from dtrain.storage.objects import ObjectStore
from dtrain.storage.ranges import NeededRange, Run, read_header, read_run, runs_of
from dtrain.worker.arenas import Kept
from dtrain.worker.cache_files import Fetched

logger = logging.getLogger(__name__)

# Brings those of the pieces that it has to their places in the image; returns those that are sound there.
Copy: TypeAlias = Callable[[Iterable[Piece], memoryview], set[Piece]]


class ShardImage:
    """One shard's file. Its readers run in threads, each on bytes of its own.

    After a round of readers, what is still missing in ``there`` is to be brought by another round.
    """

    def __init__(
        self, path: Path, shard: IndexedShard, *, slots: Sequence[Path], attempt: int, cached: Copy | None = None
    ) -> None:
        """``slots``: folders in which the shard's rank may have staged ``attempt``.

        ``cached``: brings what the node fetched of the shard before; None if that is nothing.
        """
        self.there: set[Piece] = set()  # verified and in place
        self._fetched: set[Piece] = set()  # of these, what came from storage
        self._path = path
        self._shard = shard
        self._slots = slots
        self._attempt = attempt
        self._cached = cached
        self._lock = threading.Lock()
        self._page: mmap.mmap | None = None  # unmapped with its last reader
        self._staged: mmap.mmap | None = None  # the slot that holds the same bytes, if there is one
        self._is_slot = False  # the image is the slot itself

    def begin(self, store: ObjectStore) -> None:
        """Make the file, with the shard's header."""
        if self._page is not None:
            return
        slot = staged_slot(self._slots, self._attempt, self._shard)
        if slot is None or (staged := _mapped(slot, self._shard)) is None:
            if self._cached is None:
                read_header(store, self._shard)
            self._page = self._new_page()
            return
        self._staged = staged
        if _link(slot, self._path):
            self._page, self._is_slot = staged, True
        else:
            self._page = self._new_page()

    def reader(self, run: Run) -> Callable[[ObjectStore], None]:
        """Return what brings the run."""

        def read(store: ObjectStore) -> None:
            if self._is_slot:
                self._verify(run)
            else:
                self._bring(run, store)

        return read

    def fetched(self) -> Fetched | None:
        """Return what came from storage so far; None if nothing did."""
        with self._lock:
            if self._page is None or not self._fetched:
                return None
            return Fetched(page=self._page, pieces=frozenset(self._fetched))

    def _verify(self, run: Run) -> None:
        """Verify the run in the slot. If it is not sound, the slot serves no longer, and all is brought again."""
        assert self._staged is not None
        with memoryview(self._staged) as staged:
            damaged = next((p for p in run.pieces if not piece_is_sound(p, staged[p.begin : p.end])), None)
        with self._lock:
            if not self._is_slot:
                return  # meanwhile another run was not sound
            if damaged is None:
                self.there.update(run.pieces)
                return
            logger.warning("%s: %s is not in memory as it was staged", self._shard.key, damaged.tensor)
            self._page, self._is_slot = self._new_page(), False
            self.there.clear()

    def _bring(self, run: Run, store: ObjectStore) -> None:
        page = self._page
        assert page is not None
        with self._path.open("r+b") as file:
            # No room is an error here, and not the end of this process at the first touch.
            os.posix_fallocate(file.fileno(), run.begin, run.end - run.begin)
        left = set(run.pieces)
        with memoryview(page) as image:
            left -= self._copy_staged(run, image)
            if left and self._cached is not None:
                left -= self._cached(left, image)
            for rest in runs_of(run.shard, left):
                read_run(store, rest, image)
        with self._lock:
            self.there.update(run.pieces)
            self._fetched.update(left)

    def _copy_staged(self, run: Run, image: memoryview) -> set[Piece]:
        """Copy the run from the stage slot, if there is one; return the pieces that are sound."""
        if self._staged is None:
            return set()
        with memoryview(self._staged) as staged:
            image[run.begin : run.end] = staged[run.begin : run.end]
        return {piece for piece in run.pieces if piece_is_sound(piece, image[piece.begin : piece.end])}

    def _new_page(self) -> mmap.mmap:
        """Make the image a file of its own, with nothing but the header."""
        start = self._shard.header.data_start
        self._path.unlink(missing_ok=True)  # it may be another name of a slot
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, self._shard.header.total_bytes)
            os.posix_fallocate(file, 0, start)
            page = mmap.mmap(file, self._shard.header.total_bytes)
        finally:
            os.close(file)
        page[:start] = self._shard.header_bytes
        return page


def _link(slot: Path, image: Path) -> bool:
    """Give the slot's file the image's name too; False if it lies on another file system."""
    image.unlink(missing_ok=True)  # what an agent left that ended before
    try:
        image.hardlink_to(slot)
    except OSError:
        return False
    return True


def staged_slot(folders: Iterable[Path], attempt: int, shard: IndexedShard) -> Path | None:
    """Return the stage slot that holds this shard of this attempt, going by its record; None if this node has none."""
    for folder in folders:
        for number in range(STAGE_SLOTS):
            slot = folder / f"slot{number}"
            try:
                kept = msgspec.json.decode(slot.with_suffix(".json").read_bytes(), type=Kept)
                if (kept.attempt, kept.size_bytes) != (attempt, shard.header.total_bytes):
                    continue
                with slot.open("rb", buffering=0) as file:
                    if file.read(shard.header.data_start) == shard.header_bytes:
                        return slot
            except (OSError, ValueError, msgspec.DecodeError):
                continue  # gone, or not what its record says: storage has it
    return None


def _mapped(slot: Path, shard: IndexedShard) -> mmap.mmap | None:
    """Map the slot; None if it is gone, or too short for what its record says."""
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # all page tables at once, instead of fault by fault
    try:
        with slot.open("rb") as file:
            return mmap.mmap(file.fileno(), shard.header.total_bytes, flags=flags, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None


def probable_needs(catalog: Catalog, ranks: Iterable[int], world_size: int) -> set[NeededRange]:
    """Return what these ranks will most probably ask for, so that it comes while they start.

    Tensors that were whole on the saved ranks are needed whole. Of sharded ones a rank needs its own parts, if the
    world is as large as it was; otherwise that depends on how it shards them now, which only it can say.
    """
    saved_world = len(catalog.shards)
    found: set[NeededRange] = set()
    for rank in ranks:
        sharded = set()
        for leaf in tensor_leaves(catalog.trees[rank % saved_world]):
            if leaf.sharded:
                sharded.add(leaf.name)
                continue
            found.update(
                NeededRange(shard=chunk.shard, tensor=leaf.name, begin=0, end=chunk.end - chunk.begin)
                for chunk in catalog.tensors[leaf.name].chunks
            )
        if saved_world == world_size:
            own = catalog.shards[rank]
            boxes = {
                name: (own.layout[name].offsets, own.header.tensors[name].shape) for name in sharded & own.layout.keys()
            }
            found.update(  # of copies on several meshes only one is in the catalog
                NeededRange(shard=chunk.shard, tensor=name, begin=0, end=chunk.end - chunk.begin)
                for name, box in boxes.items()
                for chunk in catalog.tensors[name].chunks
                if (chunk.offsets, chunk.shape) == box
            )
    return found
