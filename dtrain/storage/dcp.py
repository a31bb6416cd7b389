"""torch.distributed.checkpoint on any of dtrain's stores, for programs that do not run under dtrain.

    from dtrain.storage.dcp import StoreReader, StoreWriter      # dtrain.dcp for short

    dcp.save(state, storage_writer=StoreWriter("s3://bucket/runs", job="mine", checkpoint=7))
    dcp.load(state, storage_reader=StoreReader("s3://bucket/runs", job="mine"))

The reader reads the checkpoints of dtrain's own jobs too: ``{"model": model.state_dict()}`` finds what was tracked as
``model``, and ``{"optimizer": optimizer}`` the learning rates as well. What is written has the same layout, digests and
order as a job's checkpoint: shards, indexes, manifest, commit marker. So nothing half written is ever read, and every
byte is verified.

torch's planner decides who writes what, and pickles what is no tensor before it gets here; dtrain's own jobs need
neither. All ranks of the program call save() and load() together, as torch wants it.
"""

import io
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dtrain.common.digests import blob_digest, chain_digest
from dtrain.common.errors import UserError
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, Step, job_name
from dtrain.storage import shards
from dtrain.storage.catalogs import OWN_PREFIX, Catalog, Json, catalog_of, tensor_leaves
from dtrain.storage.claims import check_free, claim_attempt
from dtrain.storage.indexes import index_shard
from dtrain.storage.keys import CHECKPOINT_MAX, MARKER_NAME, index_key, job_prefix, manifest_key, marker_key, shard_key
from dtrain.storage.manifests import CommitMarker, Manifest, ShardEntry, encode
from dtrain.storage.objects import AlreadyExists, ObjectStore
from dtrain.storage.patient import PatientStore
from dtrain.storage.planned_reads import RangeReader, read_whole
from dtrain.storage.ranges import NeededRange, read_needed
from dtrain.storage.retrying import read_again_if_damaged, with_retries
from dtrain.storage.shards import TensorEntry
from dtrain.storage.tensor_codes import CODE_OF_DTYPE, as_stored, size_bytes, view_bytes, why_not_storable
from dtrain.storage.tree_values import leaves_for_torch, pickled
from dtrain.storage.uris import open_store
from dtrain.storage.verify import read_index, read_manifest, read_marker

DEADLINE_S = 300.0  # for one object, all tries together


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Which shard a rank writes. Ranks that have nothing to write have none."""

    attempt: AttemptNumber  # claimed by the coordinating rank for this save
    number: int  # 0 <= number < count
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """What a rank put."""

    attempt: AttemptNumber
    entry: ShardEntry


class StoreWriter(StorageWriter):
    """Writes one checkpoint, which must not be there yet. ``store``: a folder, file:// or s3://."""

    def __init__(self, store: str, *, job: str, checkpoint: int, step: int = 0) -> None:
        self._store: ObjectStore = open_store(store)
        self._job = job_name(job)
        self._checkpoint = _number(checkpoint)
        self._step = Step(step)
        check_free(self._store, self._job, self._checkpoint, deadline_s=DEADLINE_S)

    def __getstate__(self) -> dict[str, object]:
        """Return what another process needs to save: async_save may send this to one. Connections stay here."""
        return {**vars(self), "_store": self._store.uri}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _store=open_store(state["_store"]))

    def reset(self, checkpoint_id: object = None) -> None:
        """Begin: nothing is kept between two saves."""

    def set_up_storage_writer(
        self, is_coordinator: bool, *args: Any, use_collectives: bool = True, **kwargs: Any
    ) -> None:
        """Nothing to prepare: stores make what they need. Raises UserError if ranks are to save without each other."""
        if not use_collectives:  # each would commit what it has alone
            raise UserError("a StoreWriter commits what all ranks have together: leave use_collectives=True.")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On one rank: claim an attempt, and number the ranks that have something to write. Each becomes a shard."""
        writing = [number for number, plan in enumerate(plans) if plan.items]
        if not writing:
            raise UserError("there is nothing in the state to save.")
        attempt = claim_attempt(self._store, self._job, self._checkpoint, deadline_s=DEADLINE_S)
        places = {
            rank: _Place(attempt=attempt, number=number, count=len(writing)) for number, rank in enumerate(writing)
        }
        return [replace(plan, storage_data=places.get(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Lay out this rank's shard, put it and its index. Each result names the shard."""
        results: list[WriteResult] = []
        if plan.items:
            entry = self._put_shard(plan.storage_data, {item.index.fqn: item for item in plan.items}, planner)
            written = _Written(attempt=plan.storage_data.attempt, entry=entry)
            results = [WriteResult(index=item.index, size_in_bytes=0, storage_data=written) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On one rank, when all shards are durable: check that they make a whole, and commit."""
        written: list[_Written] = [result.storage_data for found in results for result in found]
        entries = {one.entry.rank: one.entry for one in written}
        ordered = tuple(entries[rank] for rank in sorted(entries))
        attempt = written[0].attempt
        _whole(PatientStore(self._store, deadline_s=DEADLINE_S), ordered)
        manifest = encode(
            Manifest(
                job=self._job,
                checkpoint=self._checkpoint,
                attempt=attempt,
                generation=Generation(1),
                step=self._step,
                world_size=len(ordered),
                shards=ordered,
            )
        )
        key = manifest_key(self._job, self._checkpoint, attempt)
        marker = CommitMarker(
            job=self._job,
            checkpoint=self._checkpoint,
            attempt=attempt,
            step=self._step,
            manifest_key=key,
            manifest_digest=blob_digest(manifest),
            position_seq=self._checkpoint,
            position_digest=chain_digest(manifest),
        )
        self._put_once(key, manifest)
        self._put_once(marker_key(self._job, self._checkpoint), encode(marker))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Where to write is said when this is made, never by an id."""
        return False

    def _put_shard(self, place: _Place, items: dict[str, WriteItem], planner: SavePlanner) -> ShardEntry:
        tensors: dict[str, torch.Tensor] = {}
        entries: list[TensorEntry] = []
        pairs: list[Json] = []
        for name, item in items.items():
            tensors[name], entry = _stored(name, item, planner)
            entries.append(entry)
            leaf: dict[str, Json] = {"tensor": name}
            if item.tensor_data is not None and item.tensor_data.properties.dtype is torch.complex128:
                leaf["pairs"] = True
            pairs.append([name, {"bytes": leaf} if item.type is WriteItemType.BYTE_IO else leaf])
        tree: dict[str, Json] = {"objects": {"state": {"dict": pairs}}, "local": {}}
        metadata = {
            shards.STEP_ENTRY: str(self._step),
            shards.RANK_ENTRY: str(place.number),
            shards.WORLD_SIZE_ENTRY: str(place.count),
            shards.TREE_ENTRY: json.dumps(tree, separators=(",", ":")),
        }
        plan = shards.plan(entries, metadata)
        image = memoryview(mmap.mmap(-1, plan.total_bytes))
        image[: plan.data_start] = plan.header
        for name, tensor in tensors.items():
            start = plan.data_start + plan.data_offsets[name][0]
            view_bytes(image, CODE_OF_DTYPE[tensor.dtype], tuple(tensor.shape), start).copy_(tensor)
        key = shard_key(self._job, self._checkpoint, place.attempt, place.number)
        beside = index_key(self._job, self._checkpoint, place.attempt, place.number)
        index, digest = index_shard(image, key=key)
        self._put(key, image)
        self._put(beside, index)
        return ShardEntry(
            rank=place.number,
            key=key,
            size_bytes=plan.total_bytes,
            digest=digest,
            index_key=beside,
            index_digest=blob_digest(index),
        )

    def _put_once(self, key: str, data: bytes) -> None:
        """Put what must never be replaced. One's own earlier try, whose answer was lost, is there and is the same."""
        try:
            with_retries(lambda: self._store.put(key, data, if_absent=True), deadline_s=DEADLINE_S)
        except AlreadyExists as error:
            if with_retries(lambda: self._store.get(key), deadline_s=DEADLINE_S) != data:
                raise UserError(
                    f"checkpoint {self._checkpoint} of {self._job} was committed by another save meanwhile, and is "
                    "as that one wrote it: give each run its own job name, and each save its own number."
                ) from error

    def _put(self, key: str, data: bytes | memoryview) -> None:
        with_retries(lambda: self._store.put(key, data), deadline_s=DEADLINE_S)


class StoreReader(RangeReader):
    """Reads a committed checkpoint: that of this number, or the newest."""

    def __init__(self, store: str, *, job: str, checkpoint: int | None = None) -> None:
        self._store: ObjectStore = PatientStore(open_store(store), deadline_s=DEADLINE_S)
        self._job = job_name(job)
        self._checkpoint = None if checkpoint is None else _number(checkpoint)
        self._catalog: Catalog | None = None
        self._leaves: dict[str, Json] = {}  # of a job's checkpoint: what is no tensor, by torch's name for it
        super().__init__(self._bring_from_store, {})

    def reset(self, checkpoint_id: object = None) -> None:
        """Begin: the next read looks for the checkpoint anew."""
        self._catalog = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the checkpoint holds, as torch's planner wants it."""
        manifest = read_again_if_damaged(self._manifest)
        self._catalog = catalog = _whole(self._store, manifest.shards)
        self._opaque = {name for tree in catalog.trees for name in _byte_names(tree)}
        self._pairs = {leaf.name for tree in catalog.trees for leaf in tensor_leaves(tree) if leaf.pairs}
        self._tensors = {
            name: whole for name, whole in catalog.tensors.items() if not name.startswith(f"{OWN_PREFIX}.")
        }
        self._leaves = {
            name: node for name, node in leaves_for_torch(catalog.trees).items() if name not in self._tensors
        }
        metadata = super().read_metadata()
        metadata.state_dict_metadata.update(dict.fromkeys(self._leaves, BytesStorageMetadata()))
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Read the indexes on ranks that were handed the metadata by another."""
        if self._catalog is None:
            self.read_metadata()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Make of the trees what is no tensor; bring and copy the rest."""
        stored: list[ReadItem] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if name in self._leaves:
                planner.load_bytes(item, io.BytesIO(pickled(self._leaves[name], self._read_stored)))
            else:
                stored.append(item)
        return super().read_data(replace(plan, items=stored), planner)

    def _read_stored(self, name: str) -> torch.Tensor:
        assert self._catalog is not None
        return read_whole(name, self._catalog.tensors, self._bring_from_store)

    def _bring_from_store(self, needed: set[NeededRange]) -> Mapping[int, memoryview]:
        assert self._catalog is not None
        return read_needed(self._store, self._catalog.shards, needed)

    def _manifest(self) -> Manifest:
        if self._checkpoint is not None:
            key = marker_key(self._job, self._checkpoint)
        else:
            prefix = job_prefix(self._job)
            markers = [info.key for info in self._store.list(prefix) if info.key.endswith("/" + MARKER_NAME)]
            if not markers:
                raise UserError(f"{self._store.uri} holds no committed checkpoint of {self._job}: look at the name.")
            key = markers[-1]
        marker = read_marker(self._store, key)
        return read_manifest(self._store, marker.manifest_key, marker.manifest_digest)


def _number(checkpoint: int) -> CheckpointNumber:
    """Return ``checkpoint`` if it can be one's number. Raises :class:`UserError`."""
    if not 1 <= checkpoint <= CHECKPOINT_MAX:
        raise UserError(
            f"checkpoint={checkpoint} is out of range: checkpoints are numbered from 1 to {CHECKPOINT_MAX}. "
            "Count them, and say the step with step=."
        )
    return CheckpointNumber(checkpoint)


def _whole(store: ObjectStore, entries: Sequence[ShardEntry]) -> Catalog:
    """Return what these shards hold together. Raises IncompleteCheckpoint, or ShardDamagedError."""
    return catalog_of([read_again_if_damaged(partial(read_index, store, entry))[0] for entry in entries])


def _stored(name: str, item: WriteItem, planner: SavePlanner) -> tuple[torch.Tensor, TensorEntry]:
    """Return what is stored of one item, and its entry. Raises TypeError naming what cannot be stored."""
    data = planner.resolve_data(item)
    if isinstance(data, torch.Tensor):
        plain = data.detach()
        if why := why_not_storable(plain):
            raise TypeError(f"{name} {why}.")
        tensor = as_stored(plain)
        assert item.tensor_data is not None
        offsets, whole = tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.size)
        if tensor.dim() > plain.dim():  # pairs
            offsets, whole = (*offsets, 0), (*whole, 2)
    else:
        tensor = torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)
        offsets, whole = (0,), tuple(tensor.shape)
    entry = TensorEntry(
        name=name,
        dtype=CODE_OF_DTYPE[tensor.dtype],
        shape=tuple(tensor.shape),
        offsets_in_whole=offsets,
        global_shape=whole,
        size_bytes=size_bytes(tensor),
    )
    return tensor, entry


def _byte_names(tree: dict[str, Json]) -> Sequence[str]:
    """Return the names of what is no tensor, in a tree that :class:`StoreWriter` wrote."""
    objects: Any = tree.get("objects")
    state = objects.get("state") if isinstance(objects, dict) else None
    pairs = state.get("dict", []) if isinstance(state, dict) else []
    return [name for name, node in pairs if isinstance(node, dict) and isinstance(node.get("bytes"), dict)]
