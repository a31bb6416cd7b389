"""A shard as it grows in shared memory: as large as it was staged, with holes where nothing is needed.

Where this node staged that very attempt and still holds it, its bytes come from memory instead of from storage; they
are verified all the same, piece by piece, and whatever does not verify is read from storage.
"""

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from dtrain.common.mailbox import STAGE_SLOTS
from dtrain.storage.catalogs import Catalog, tensor_leaves
from dtrain.storage.indexes import IndexedShard, Piece, piece_is_sound
from dtrain.storage.objects import ObjectStore
from dtrain.storage.ranges import NeededRange, Run, read_header, read_run
from dtrain.worker.arenas import Kept

logger = logging.getLogger(__name__)


class ShardImage:
    """One shard's file. Its readers run in threads, each on bytes of its own."""

    def __init__(self, path: Path, shard: IndexedShard, *, slots: Sequence[Path], attempt: int) -> None:
        """``slots``: folders in which the shard's rank may have staged ``attempt``."""
        self.there: set[Piece] = set()  # verified and in place
        self._path = path
        self._shard = shard
        self._slots = slots
        self._attempt = attempt
        self._lock = threading.Lock()
        self._page: mmap.mmap | None = None  # unmapped with its last reader
        self._staged: mmap.mmap | None = None  # the slot that holds the same bytes, if there is one

    def begin(self, store: ObjectStore) -> None:
        """Make the file, with the shard's header."""
        if self._page is not None:
            return
        total_bytes, start = self._shard.header.total_bytes, self._shard.header.data_start
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, total_bytes)
            os.posix_fallocate(file, 0, start)
            page = mmap.mmap(file, total_bytes)
        finally:
            os.close(file)
        self._staged = _staged(self._slots, self._attempt, self._shard)
        if self._staged is None:
            read_header(store, self._shard)
        page[:start] = self._shard.header_bytes
        self._page = page

    def reader(self, run: Run) -> Callable[[ObjectStore], None]:
        """Return what brings the run."""

        def read(store: ObjectStore) -> None:
            assert self._page is not None
            with self._path.open("r+b") as file:
                # No room is an error here, and not the end of this process at the first touch.
                os.posix_fallocate(file.fileno(), run.begin, run.end - run.begin)
            with memoryview(self._page) as image:
                if not self._copy_staged(run, image):
                    read_run(store, run, image)
            with self._lock:
                self.there.update(run.pieces)

        return read

    def _copy_staged(self, run: Run, image: memoryview) -> bool:
        """Copy the run from the stage slot, if it is there and sound."""
        if self._staged is None:
            return False
        with memoryview(self._staged) as staged:
            image[run.begin : run.end] = staged[run.begin : run.end]
        for piece in run.pieces:
            if not piece_is_sound(piece, image[piece.begin : piece.end]):
                logger.warning("%s: %s is not in memory as it was staged: read again", self._shard.key, piece.tensor)
                return False
        return True


def _staged(folders: Iterable[Path], attempt: int, shard: IndexedShard) -> mmap.mmap | None:
    """Map the stage slot that holds this shard of this attempt; None if this node has none."""
    for folder in folders:
        for slot in range(STAGE_SLOTS):
            try:
                kept = msgspec.json.decode((folder / f"slot{slot}.json").read_bytes(), type=Kept)
                if (kept.attempt, kept.size_bytes) != (attempt, shard.header.total_bytes):
                    continue
                with (folder / f"slot{slot}").open("rb") as file:
                    return mmap.mmap(file.fileno(), kept.size_bytes, access=mmap.ACCESS_READ)
            except (OSError, ValueError, msgspec.DecodeError):
                continue  # gone, or too short for what its record says: storage has it
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
            own = catalog.shards[rank].header.tensors
            found.update(
                NeededRange(shard=rank, tensor=name, begin=0, end=own[name].end - own[name].begin)
                for name in sharded & own.keys()
            )
    return found
