"""Restoring under a worker: the trainer says which bytes it needs, the worker brings and verifies them.

What a rank needs depends on how its model is wrapped and sharded now, which only the script knows; bringing it is
the worker's. They meet in files, so that neither waits in the other's code and a restarted worker reads on:

1. the worker puts the manifest and the indexes, verified, into the generation's folder ``restore``; the manifest last;
   beside them, in ``sources.json``, where on this node some of the bytes probably lie as they are;
2. each trainer works out what it needs, reads of it what it can from there (direct_reads.py), and writes what is left
   into ``needs.json`` in its own folder;
3. the worker puts those bytes, verified, at their places into ``restore/rank-00000.safetensors`` (files with holes,
   shared by the ranks of the node), and sets the mailbox's restore word to READY;
4. each trainer copies them to where they belong. Every tensor it holds is its own: the files lie in memory that the
   worker takes back.

A trainer that read everything itself says so, and goes on without the word: nothing is left for it to wait for.
"""

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event

import torch

from dtrain.common.errors import PermanentError, ShardDamagedError
from dtrain.common.mailbox import Mailbox, RestoreState
from dtrain.common.names import Step
from dtrain.storage import shards
from dtrain.storage.catalogs import Catalog, catalog_of
from dtrain.storage.indexes import IndexedShard, open_index
from dtrain.storage.manifests import decode_manifest
from dtrain.storage.ranges import NeededRange
from dtrain.storage.restore_files import (
    INDEX_FILE,
    MANIFEST_FILE,
    NEEDS_FILE,
    RESTORE_FOLDER,
    SHARD_FILE,
    SOURCES_FILE,
    Sources,
    decode_sources,
    encode_needs,
)
from dtrain.trainer.direct_reads import DirectReader
from dtrain.trainer.resharding import Move, fill, has_moved
from dtrain.trainer.tracking import SavedState

POLL_FIRST_S = 0.0005  # what is already there costs nothing
POLL_MAX_S = 0.005  # what one look may cost a restart in delay

Plan = Callable[[SavedState], dict[str, torch.Tensor]]  # what of a checkpoint is to be read, and where to


def restore_from_worker(
    rank_dir: Path, mailbox: Mailbox, *, rank: int, world_size: int, cores: int, plan: Plan
) -> SavedState | None:
    """Return this rank's state of the checkpoint that the worker names, read; None to start from nothing.

    ``cores``: how many this rank may keep busy while nothing trains.
    There is no bound on the wait: storage may be away for hours and the worker goes on trying. A worker that is gone
    for good is noticed by this trainer's keeper, which ends the trainer. Signals interrupt the wait.
    """
    folder = rank_dir.parent / RESTORE_FOLDER
    wait_until(lambda: mailbox.restore is RestoreState.NOTHING or (folder / MANIFEST_FILE).exists())
    if mailbox.restore is RestoreState.NOTHING:
        return None
    catalog = catalog_of(_read_indexes(folder))
    saved = saved_state(catalog, rank)
    targets = plan(saved)

    def take(moves: Sequence[Move]) -> list[Move]:
        total_bytes = sum(move.chunk.end - move.chunk.begin for move in moves)
        reader = DirectReader(
            catalog.shards,
            _read_sources(folder),
            threads=cores,
            told=lambda done_bytes: mailbox.publish_reading(done_bytes, total_bytes),
        )
        left = reader.take(moves)
        mailbox.publish_reading(0, 0)  # over; what is left is the worker's
        return left

    def bring(needed: set[NeededRange]) -> Mapping[int, memoryview]:
        _write_whole(rank_dir / NEEDS_FILE, encode_needs(needed))
        if not needed:
            return {}
        wait_until(lambda: mailbox.restore is RestoreState.READY)
        return _map_shards(folder, needed)

    fill(targets, saved.wholes, bring, moved=has_moved(saved, targets, world_size), threads=cores, take=take)
    return replace(saved, tensors=targets)


def wait_until(fact: Callable[[], bool]) -> None:
    """Return once ``fact()`` holds."""
    pause, wait_s = Event(), POLL_FIRST_S  # an Event that nobody sets: a sleep that handlers can break
    while not fact():
        pause.wait(wait_s)
        wait_s = min(wait_s * 2, POLL_MAX_S)


def saved_state(catalog: Catalog, rank: int) -> SavedState:
    """Return the checkpoint as ``rank`` starts from it, its tensors not read yet.

    What is a rank's own (random states, data position) comes from the saved rank of its number; ranks that there were
    not before share those there were.
    """
    saved_rank = rank % len(catalog.shards)
    shard = catalog.shards[saved_rank]
    metadata = shard.header.metadata
    try:
        step, of_rank, world_size = (
            int(metadata[entry]) for entry in (shards.STEP_ENTRY, shards.RANK_ENTRY, shards.WORLD_SIZE_ENTRY)
        )
    except (KeyError, ValueError) as error:
        raise ShardDamagedError(shard.key, f"its metadata cannot be read: {error!r}") from error
    if step < 0 or (of_rank, world_size) != (saved_rank, len(catalog.shards)):
        raise ShardDamagedError(shard.key, f"its metadata is not valid: step {step}, rank {of_rank} of {world_size}")
    return SavedState(
        step=Step(step),
        rank=saved_rank,
        world_size=world_size,
        tree=catalog.trees[saved_rank],
        wholes=catalog.tensors,
    )


def _read_indexes(folder: Path) -> Sequence[IndexedShard]:
    """Return the indexes that the worker verified."""
    manifest = decode_manifest((folder / MANIFEST_FILE).read_bytes(), key=MANIFEST_FILE)
    return [
        open_index((folder / INDEX_FILE.format(entry.rank)).read_bytes(), key=entry.index_key, shard_key=entry.key)
        for entry in manifest.shards
    ]


def _read_sources(folder: Path) -> Sources:
    """Return what the worker says lies on this node."""
    try:
        return decode_sources((folder / SOURCES_FILE).read_bytes())
    except FileNotFoundError:  # a worker that points nothing out
        return Sources()


def _map_shards(folder: Path, needed: Iterable[NeededRange]) -> Mapping[int, memoryview]:
    """Map the files of those shards of which something is needed."""
    images: dict[int, memoryview] = {}
    for shard in {part.shard for part in needed}:
        try:
            with (folder / SHARD_FILE.format(shard)).open("rb") as file:
                # A private mapping: torch wants memory that could be written, the file stays as it is.
                images[shard] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except (OSError, ValueError) as error:
            raise PermanentError(f"the bytes that the worker brought cannot be read: {error}") from error
    return images


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)
