"""Local mode: the script without a worker, under torchrun or started by hand.

Without a store there are no checkpoints, and nothing here costs anything. With one, the ranks do among themselves
what coordinator and workers would do, with the same keys, the same bytes and the same order: every rank puts its
shard; when all are durable rank 0 puts the manifest, and then the commit marker. A restart goes on from the newest
checkpoint whose marker is there and of which every rank's shard verifies.

What it does not do: training waits while a checkpoint is written, and nobody restarts a rank. There is no event log,
so a marker names, in place of an event, the checkpoint's number and a digest of its manifest.

All ranks call load() and boundary() at the same steps: both talk to the peers.
"""

import contextlib
import logging
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch.distributed as dist

from dtrain.common.digests import blob_digest, chain_digest
from dtrain.common.errors import DtrainError, PermanentError, ShardDamagedError, UserError
from dtrain.common.names import AttemptNumber, CheckpointNumber, Step
from dtrain.storage.catalogs import IncompleteCheckpoint, catalog_of
from dtrain.storage.indexes import index_shard
from dtrain.storage.keys import MARKER_NAME, index_key, job_prefix, manifest_key, marker_key, shard_key
from dtrain.storage.manifests import CommitMarker, Manifest, ShardEntry, encode
from dtrain.storage.objects import ObjectStore
from dtrain.storage.ranges import read_needed
from dtrain.storage.retrying import read_again_if_damaged, with_retries
from dtrain.storage.uris import open_store, probe
from dtrain.storage.verify import read_index, read_manifest, read_marker
from dtrain.trainer.copying import Copier
from dtrain.trainer.cores import cores_of_rank
from dtrain.trainer.failures import one_line
from dtrain.trainer.resharding import fill, has_moved
from dtrain.trainer.restoring import Plan, saved_state
from dtrain.trainer.staging import ShardLayouts
from dtrain.trainer.surroundings import Surroundings
from dtrain.trainer.tracking import CapturedState, SavedState

_log = logging.getLogger("dtrain")

EVERY_STEPS_DEFAULT = 100  # when a store is named and nothing else
STORE_DEADLINE_S = 30.0  # training stands still while the store is tried again

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What rank 0 found in the store."""

    checkpoint: int  # highest number in use; 0 for none
    attempt: int  # highest number in use; 0 for none
    markers: tuple[str, ...]  # keys of the commit markers, the newest first
    error: str  # why the store cannot be used; empty if it can


class LocalStation:
    """Keeps checkpoints in a store of its own, or none."""

    def __init__(self, surroundings: Surroundings, *, store_uri: str, every_steps: int) -> None:
        self._surroundings = surroundings
        self._store = open_store(store_uri) if store_uri else None
        self._every_steps = every_steps or EVERY_STEPS_DEFAULT
        if every_steps and not store_uri and surroundings.rank == 0:
            _log.warning("every_steps=%d keeps nothing without a store: give join(store=...) too", every_steps)
        self._checkpoint = 0  # highest number used
        self._attempt = 0  # highest number used; never used twice, so that no shard is ever overwritten
        self._until = Step(0)
        self._capture: Callable[[Step], CapturedState] | None = None  # set by begin() if something is tracked
        self._tracking = False
        self._layouts = ShardLayouts(rank=surroundings.rank, world_size=surroundings.world_size)
        self._cores = cores_of_rank(surroundings.local_world_size)
        self._copier = Copier(self._cores)
        self._memory: mmap.mmap | None = None  # where shards are laid out, kept between checkpoints

    def track(self) -> None:
        """Say that there is something to keep."""
        self._tracking = True

    def load(self, plan: Plan) -> SavedState | None:
        """Read the newest checkpoint that is whole into what ``plan`` names, and return it; None for none."""
        if self._store is None or not self._tracking:
            return None
        found = self._from_rank_0(lambda store: _look(store, self._surroundings), self._store)
        if found.error:
            raise UserError(found.error)
        self._checkpoint, self._attempt = found.checkpoint, found.attempt
        for key in found.markers:
            saved, damage, obstacle = self._try_load(self._store, key, plan)
            answers = self._from_all((damage, obstacle))
            if obstacles := [text for _, text in answers if text]:  # going further back would lose work for nothing
                raise UserError(f"cannot restore from {key} in {self._store.uri}: {obstacles[0]}")
            damages = dict.fromkeys(text for text, _ in answers if text)
            if not damages:
                if self._surroundings.rank == 0:
                    job = self._surroundings.job
                    _log.warning(
                        "goes on from step %d of job %s in %s", saved.step if saved else 0, job, self._store.uri
                    )
                return saved
            for text in damages:
                _log.warning("not restoring from %s: %s; trying the checkpoint before it", key, text)
        if found.markers:
            raise UserError(
                f"no checkpoint of job {self._surroundings.job} in {self._store.uri} is whole: "
                "repair the shards named above, or choose another store or DTRAIN_JOB to start from step 0."
            )
        return None

    def begin(
        self,
        *,
        step: Step,
        until: Step,
        capture: Callable[[Step], CapturedState],
        estimate_bytes: Callable[[], int] | None = None,
    ) -> None:
        """The steps begin: ``step`` is done, ``until`` will be the last. Nothing is prepared: training waits anyway."""
        self._until = until
        self._capture = capture if self._store is not None and self._tracking else None

    def stop(self, until: Step) -> None:
        """The step that is under way is the last one."""
        self._until = until

    def boundary(self, step: Step) -> None:
        """The body of ``step`` has run: keep a checkpoint if it is time for one, and after the last step."""
        if self._capture is None or (step % self._every_steps and step != self._until):
            return
        if self._store is None:
            raise AssertionError("a checkpoint without a store")
        self._checkpoint += 1
        self._attempt += 1
        try:
            entry, problem = self._put_shard(self._store, self._capture(step)), ""
        except Exception as error:  # whatever a script's state_dict() may raise: no checkpoint stops training
            _log.warning("the state of step %d could not be kept", step, exc_info=True)
            entry, problem = None, one_line(error)
        answers = self._from_all((entry, problem))  # also the barrier: all shards are durable, or one is not
        if self._surroundings.rank != 0:
            return
        entries = tuple(entry for entry, _ in answers if entry is not None)
        if len(entries) < len(answers):
            _log.warning("no checkpoint at step %d: %s", step, next(problem for _, problem in answers if problem))
            return
        try:
            self._commit(self._store, step, entries)
        except DtrainError as error:
            _log.warning("no checkpoint at step %d: %s", step, error)

    def leave(self) -> None:
        """No step will follow, whatever the reason."""

    def go_on(self) -> None:
        """Steps will follow after all."""

    def finish(self) -> None:
        """No step will follow."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Nobody takes this process for stuck."""
        return contextlib.nullcontext()

    def report(self, metrics: dict[str, float | str]) -> None:
        """Nobody watches."""

    def fail(self, text: str) -> None:
        """Nobody asks: the traceback says it."""

    def close(self) -> None:
        """Let go of the memory for shards, and of the threads that fill it."""
        self._copier.close()
        self._free()

    def _free(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _put_shard(self, store: ObjectStore, state: CapturedState) -> ShardEntry:
        here = self._surroundings
        image = self._layouts.lay_out(state)
        needed_bytes = image.plan.total_bytes
        if self._memory is None or len(self._memory) < needed_bytes:
            self._free()
            self._memory = mmap.mmap(-1, needed_bytes)
        image.copy_into(memoryview(self._memory), self._copier)
        data = memoryview(self._memory)[:needed_bytes]
        key = shard_key(here.job, CheckpointNumber(self._checkpoint), AttemptNumber(self._attempt), here.rank)
        with_retries(lambda: store.put(key, data), deadline_s=STORE_DEADLINE_S)
        index, digest = index_shard(data, key=key)
        beside = index_key(here.job, CheckpointNumber(self._checkpoint), AttemptNumber(self._attempt), here.rank)
        with_retries(lambda: store.put(beside, index), deadline_s=STORE_DEADLINE_S)
        return ShardEntry(
            rank=here.rank,
            key=key,
            size_bytes=needed_bytes,
            digest=digest,
            index_key=beside,
            index_digest=blob_digest(index),
        )

    def _commit(self, store: ObjectStore, step: Step, entries: tuple[ShardEntry, ...]) -> None:
        here = self._surroundings
        indexes = [read_again_if_damaged(partial(read_index, store, entry)) for entry in entries]
        catalog_of([shard for shard, _ in indexes])  # refuses what is not whole
        checkpoint, attempt = CheckpointNumber(self._checkpoint), AttemptNumber(self._attempt)
        manifest = encode(
            Manifest(
                job=here.job,
                checkpoint=checkpoint,
                attempt=attempt,
                generation=here.generation,
                step=step,
                world_size=here.world_size,
                shards=entries,
            )
        )
        key = manifest_key(here.job, checkpoint, attempt)
        marker = encode(
            CommitMarker(
                job=here.job,
                checkpoint=checkpoint,
                attempt=attempt,
                step=step,
                manifest_key=key,
                manifest_digest=blob_digest(manifest),
                position_seq=checkpoint,
                position_digest=chain_digest(manifest),
            )
        )
        with_retries(lambda: store.put(key, manifest), deadline_s=STORE_DEADLINE_S)
        with_retries(lambda: store.put(marker_key(here.job, checkpoint), marker), deadline_s=STORE_DEADLINE_S)

    def _try_load(self, store: ObjectStore, key: str, plan: Plan) -> tuple[SavedState | None, str, str]:
        """Return (state, what is damaged, what else stands in the way); one of the three."""
        try:
            read = partial(read_again_if_damaged, partial(self._read, store, key, plan))
            return with_retries(read, deadline_s=STORE_DEADLINE_S), "", ""
        except (ShardDamagedError, IncompleteCheckpoint) as error:
            return None, str(error), ""
        except DtrainError as error:
            return None, "", str(error)

    def _read(self, store: ObjectStore, key: str, plan: Plan) -> SavedState:
        marker = read_marker(store, key)
        manifest = read_manifest(store, marker.manifest_key, marker.manifest_digest)
        catalog = catalog_of([read_index(store, entry)[0] for entry in manifest.shards])
        saved = saved_state(catalog, self._surroundings.rank)
        targets = plan(saved)
        fill(
            targets,
            saved.wholes,
            lambda needed: read_needed(store, catalog.shards, needed),
            moved=has_moved(saved, targets, self._surroundings.world_size),
            threads=self._cores,
        )
        return replace(saved, tensors=targets)

    def _from_all(self, answer: _T) -> list[_T]:
        """Return every rank's ``answer``, in the order of ranks."""
        answers: list[_T] = [answer] * self._surroundings.world_size
        dist.all_gather_object(answers, answer)
        return answers

    def _from_rank_0(self, look: Callable[[ObjectStore], _Found], store: ObjectStore) -> _Found:
        found = [look(store) if self._surroundings.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            raise PermanentError("rank 0 did not say what is in the store")
        return found[0]


def _look(store: ObjectStore, here: Surroundings) -> _Found:
    """Find the numbers in use and the commit markers. Errors are part of the answer: the peers wait for one."""
    prefix = job_prefix(here.job) + "checkpoints/"
    checkpoint, attempt = 0, 0
    markers: list[str] = []
    try:
        probe(store)
        for info in with_retries(lambda: list(store.list(prefix)), deadline_s=STORE_DEADLINE_S):
            match info.key.removeprefix(prefix).split("/"):
                case [number, name] if name == MARKER_NAME:
                    markers.append(info.key)
                    checkpoint = max(checkpoint, int(number))
                case [number, folder, _]:
                    checkpoint = max(checkpoint, int(number))
                    attempt = max(attempt, int(folder.removeprefix("attempt-")))
    except (DtrainError, ValueError) as error:
        return _Found(checkpoint=0, attempt=0, markers=(), error=str(error))
    return _Found(checkpoint=checkpoint, attempt=attempt, markers=tuple(reversed(markers)), error="")
