"""dtrain's side of the benchmark: the worker's own parts around real trainers, without the decisions in between.

A checkpoint is asked for in the mailboxes and is safe when storage has confirmed all that its commit needs: every
rank's shard and index, the manifest, and the marker. What the coordinator adds to that (two transactions in etcd and
the way there) is some milliseconds, and the lead that it gives a step is a choice, so neither belongs to a figure
about bandwidth.
"""

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.bare import bare_send
from dtrain.common.digests import blob_digest
from dtrain.common.mailbox import MAILBOX_BYTES, Mailbox, RestoreState, pack
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step
from dtrain.storage.free_memory import Free, free_for
from dtrain.storage.keys import manifest_key, marker_key
from dtrain.storage.manifests import CommitMarker, Manifest, ShardEntry, encode
from dtrain.storage.uris import open_store
from dtrain.worker.arenas import Arenas
from dtrain.worker.bandwidth import BandwidthCap
from dtrain.worker.caches import Caches
from dtrain.worker.core.actions import Upload
from dtrain.worker.core.inputs import MailboxSeen, RestoreDamaged, RestoreReady, UploadDone, UploadFailed
from dtrain.worker.core.states import CheckpointRequest, RestoreSource, TrainersSpec
from dtrain.worker.environment import trainer_environment
from dtrain.worker.mailboxes import Mailboxes
from dtrain.worker.rank_dirs import RankDirs, RankId, open_mailbox
from dtrain.worker.restores import Restores
from dtrain.worker.tasks import Tasks
from dtrain.worker.uploads import Uploads

JOB = JobName("bench")
Said = dict[str, Any]  # what a trainer writes at its end: see trainer.py
Span = tuple[float, float]  # when something began and ended (monotonic)
SCRIPT = Path(__file__).with_name("trainer.py")
WARM_UP_S = 6.0  # between the first step and the first checkpoint: a job's first checkpoint is not asked for sooner
DEADLINE_S = 300.0
POLL_S = 0.001
PAUSE_S = 0.7  # between two checkpoints: steps without any upload
AHEAD_STEPS = 3  # from the request to the step that it asks for


@dataclass
class Checkpoints:
    """What was measured of some checkpoints."""

    stalls_s: list[float] = field(default_factory=list)  # of the slowest rank; the first is the very first checkpoint
    durable_s: list[float] = field(default_factory=list)  # from the command to storage's last word
    stored_s: list[float] = field(default_factory=list)  # from staged to storage's last word
    bare_s: list[float] = field(default_factory=list)  # the same bytes sent in the plainest way, in between
    uploads: list[Span] = field(default_factory=list)  # when each upload ran
    bares: list[Span] = field(default_factory=list)  # and each plain sending
    memcpy_s: list[float] = field(default_factory=list)
    step_ratio: float = 0.0  # a step while uploading / a step while nothing is sent
    bare_step_ratio: float = 0.0  # a step while the same bytes are sent in the plainest way / the same
    above_state_bytes: int = 0  # private memory of a trainer at its peak, above what it had before its checkpoints
    state_bytes: int = 0  # a rank


class Node:
    """The worker's part for all ranks of one generation: its shells, without its core."""

    def __init__(self, folder: Path, store: str, *, ranks: int, threads: int, in_files: bool = False) -> None:
        self.folder = folder
        self.store_uri = store
        self.threads = threads
        self.dirs = RankDirs(Path("/dev/shm"), folder, f"{os.getpid():08x}")
        self.ranks = ranks
        self.seen: dict[int, MailboxSeen] = {}
        self.answers: dict[int, UploadDone | UploadFailed] = {}
        self.restored: list[RestoreReady | RestoreDamaged] = []
        self.provided: set[int] = set()
        self.tasks = Tasks()
        self.generation = Generation(0)
        self.manifest: tuple[Manifest, str] | None = None  # the newest, and its digest
        none = Free(size_bytes=0, where="this benchmark")
        self.arenas = Arenas(
            self.dirs, self._provided, lambda *_: None, self.tasks.begin, (lambda _: none) if in_files else free_for
        )
        self.caches = Caches(self.dirs)
        self.mailboxes = Mailboxes(self._see, progress_every_s=0.0, on_need=self.arenas.provide)
        self.uploads = Uploads(
            self._answered,
            self.mailboxes.slot_holds,
            self.arenas.keep,
            self.arenas.mapped,
            self.tasks.begin,
            BandwidthCap(None),
        )
        self.restores = Restores(self.restored.append, self.dirs, self.tasks.begin, self.caches)

    def _see(self, seen: MailboxSeen) -> None:
        self.seen[seen.rank] = seen

    def _answered(self, answer: UploadDone | UploadFailed) -> None:
        self.answers[answer.rank] = answer

    def _provided(self, of: RankId, first: int, size_bytes: int) -> None:
        self.provided.add(of.rank)
        self.mailboxes.open_slots(of, first, size_bytes)

    def rank_ids(self) -> list[RankId]:
        return [RankId(job=JOB, generation=self.generation, rank=rank) for rank in range(self.ranks)]

    def start(self, *, restore: RestoreSource | None = None, **said: int) -> list["subprocess.Popen[bytes]"]:
        """Make the folders of a new generation and start its trainers. ``said``: mib, tensors, copies."""
        self.generation = Generation(self.generation + 1)
        self.seen.clear()
        self.provided.clear()
        arguments = (said["mib"], said["tensors"], self.threads, said["copies"])
        self.spec = TrainersSpec(
            python=sys.executable,
            script=str(SCRIPT),
            args=(str(self.folder / "end"), str(self.folder), *map(str, arguments)),
            cwd="/",
            env={},
            world_size=self.ranks,
            nnodes=1,
            node_rank=0,
            first_rank=0,
            nproc=self.ranks,
            master_address="127.0.0.1",
            master_port=0,
            restarts=0,
            max_restarts=0,
            store=self.store_uri,
            restore=restore,
        )
        ids = self.rank_ids()
        trainers = []
        for of in ids:
            rank_dir = self.dirs.rank_dir(of)
            rank_dir.mkdir(parents=True)
            page = bytearray(MAILBOX_BYTES)
            mailbox = Mailbox(page, create=True)
            mailbox.restore = RestoreState.NOTHING if restore is None else RestoreState.PENDING
            mailbox.close()
            (rank_dir / "mailbox").write_bytes(page)
        self.arenas.claim(tuple(ids))
        for of in ids:
            rank_dir = self.dirs.rank_dir(of)
            self.mailboxes.watch(of, rank_dir)
            environment = trainer_environment(os.environ, self.spec, of, rank_dir, "bench")
            trainers.append(subprocess.Popen([sys.executable, str(SCRIPT), *self.spec.args], env=environment))
        return trainers

    async def until(self, fact: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not fact():
            if time.monotonic() > deadline:
                raise SystemExit(f"waited {DEADLINE_S:.0f} s in vain for {what}")
            self.mailboxes.poll(time.monotonic())
            await asyncio.sleep(POLL_S)

    def furthest(self) -> int:
        return max((seen.completed_step for seen in self.seen.values()), default=0)

    def trains(self) -> bool:
        """Every rank has done a step and has its slots."""
        return len(self.seen) == self.ranks == len(self.provided) and all(s.completed_step for s in self.seen.values())

    async def checkpoint(self, number: int, measured: Checkpoints, bare: Callable[[Path, int], float]) -> None:
        """Ask for one, upload it, finish it; then send the same bytes in the plainest way."""
        self.mailboxes.poll(time.monotonic())
        step = self.furthest() + AHEAD_STEPS
        word = pack(number, step)
        ids = self.rank_ids()
        self.answers.clear()
        began = time.monotonic()
        for of in ids:
            self.mailboxes.ask_stage(of, word, partial(self.arenas.choose, of, number - 1))
        request = CheckpointRequest(
            checkpoint=CheckpointNumber(number),
            attempt=AttemptNumber(number),
            step=Step(step),
            store=self.store_uri,
        )
        sent: set[int] = set()
        staged_s = 0.0
        while len(self.answers) < self.ranks:
            await self.until(
                lambda: (
                    len(self.answers) == self.ranks
                    or any(seen.staged == word and rank not in sent for rank, seen in self.seen.items())
                ),
                "the shards",
            )
            for of in ids:
                seen = self.seen[of.rank]
                if seen.staged == word and of.rank not in sent:
                    sent.add(of.rank)
                    staged_s = time.monotonic()
                    act = Upload(
                        job=JOB,
                        generation=self.generation,
                        rank=of.rank,
                        request=request,
                        slot=seen.staged_slot,
                        size_bytes=seen.staged_bytes,
                    )
                    self.uploads.start(act, self.dirs.rank_dir(of))
        done = [answer for _, answer in sorted(self.answers.items()) if isinstance(answer, UploadDone)]
        if len(done) < self.ranks:
            raise SystemExit(f"an upload failed: {self.answers}")
        await asyncio.to_thread(self._finish, request, done)
        ended = time.monotonic()
        stalls = []
        for of in ids:
            with open_mailbox(self.dirs.rank_dir(of)) as mailbox:
                stalls.append(mailbox.stall_ns / 1e9)
        measured.stalls_s.append(max(stalls))
        measured.durable_s.append(ended - began)
        measured.stored_s.append(ended - staged_s)
        measured.uploads.append((staged_s, ended))
        await asyncio.sleep(PAUSE_S)
        slots = [self.dirs.rank_dir(of) / f"slot{self.seen[of.rank].staged_slot}" for of in ids]
        sizes = [self.seen[of.rank].staged_bytes for of in ids]
        together = time.monotonic()
        await asyncio.gather(*(asyncio.to_thread(bare, slot, size) for slot, size in zip(slots, sizes, strict=True)))
        measured.bares.append((together, time.monotonic()))
        measured.bare_s.append(measured.bares[-1][1] - together)
        await asyncio.sleep(PAUSE_S)

    def _finish(self, request: CheckpointRequest, done: list[UploadDone]) -> None:
        """What a commit needs beside the shards: the manifest and the marker."""
        entries = tuple(
            ShardEntry(
                rank=rank,
                key=answer.key,
                size_bytes=answer.size_bytes,
                digest=answer.digest,
                index_key=answer.index_key,
                index_digest=answer.index_digest,
            )
            for rank, answer in enumerate(done)
        )
        manifest = Manifest(
            job=JOB,
            checkpoint=request.checkpoint,
            attempt=request.attempt,
            generation=self.generation,
            step=request.step,
            world_size=self.ranks,
            shards=entries,
        )
        data, store = encode(manifest), open_store(self.store_uri)
        key = manifest_key(JOB, request.checkpoint, request.attempt)
        store.put(key, data)
        marker = CommitMarker(
            job=JOB,
            checkpoint=request.checkpoint,
            attempt=request.attempt,
            step=request.step,
            manifest_key=key,
            manifest_digest=blob_digest(data),
            position_seq=1,
            position_digest="0" * 64,
        )
        store.put(marker_key(JOB, request.checkpoint), encode(marker))
        self.manifest = manifest, blob_digest(data)

    async def run(self, during: Awaitable[None], trainers: list["subprocess.Popen[bytes]"]) -> list[Said]:
        """Do ``during`` while the trainers train; then end them and return what they saw."""
        try:
            await during
            (self.folder / "end").touch()
            for trainer in trainers:
                await asyncio.to_thread(trainer.wait, DEADLINE_S)
        finally:
            for trainer in trainers:
                trainer.kill()
                trainer.wait()
            (self.folder / "end").unlink(missing_ok=True)
        files = [self.folder / f"rank{rank}.json" for rank in range(self.ranks)]
        return [json.loads(file.read_text()) for file in files]

    def close(self) -> None:
        self.restores.close()
        self.uploads.close()
        self.mailboxes.close()
        self.arenas.remove_all()
        self.arenas.close()
        self.caches.close()
        shutil.rmtree(self.dirs.root, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is saved, and how often."""

    mib: int  # a rank
    tensors: int
    rounds: int


def measure_checkpoints(
    folder: Path,
    sizes: Sizes,
    *,
    store: str = "",
    ranks: int = 1,
    threads: int = 1,
    in_files: bool = False,
    bare: Callable[[Path, int], float] | None = None,
) -> Checkpoints:
    """The first checkpoint and ``rounds`` more. ``store``: URI; a local folder unless given."""
    uri = store or (folder / "store").as_uri()
    node = Node(folder, uri, ranks=ranks, threads=threads, in_files=in_files)
    measured = Checkpoints()

    async def checkpoints() -> None:
        await node.until(node.trains, "the first steps")
        await asyncio.sleep(WARM_UP_S)
        for number in range(1, sizes.rounds + 2):
            await node.checkpoint(number, measured, bare or bare_send)
            shutil.rmtree(folder / "store", ignore_errors=True)

    async def whole() -> list[Said]:
        async with asyncio.TaskGroup() as group:
            node.tasks.group = group
            trainers = node.start(mib=sizes.mib, tensors=sizes.tensors, copies=int(not store))
            return await node.run(checkpoints(), trainers)

    try:
        said = asyncio.run(whole())
    finally:
        node.close()
    _take_in(measured, said)
    return measured


def _take_in(measured: Checkpoints, said: list[Said]) -> None:
    """Add what the trainers saw."""
    by_round = zip(*(rank["memcpy_s"] for rank in said), strict=False)
    measured.memcpy_s = [max(copies) for copies in by_round]
    measured.state_bytes = said[0]["state_bytes"]
    measured.above_state_bytes = max(rank["peak_bytes"] - rank["before_bytes"] for rank in said)
    steps = [(ended - took, ended) for rank in said for ended, took in rank["steps"]]
    apart = [step for step in steps if not _is_near(step, measured.uploads) and not _is_near(step, measured.bares)]
    measured.step_ratio = _mean_s(_inside(steps, measured.uploads)) / _mean_s(apart)
    measured.bare_step_ratio = _mean_s(_inside(steps, measured.bares)) / _mean_s(apart)


def _inside(steps: list[Span], spans: list[Span]) -> list[Span]:
    return [step for step in steps if any(began <= step[0] and step[1] <= ended for began, ended in spans)]


def _is_near(step: Span, spans: list[Span]) -> bool:
    return any(began - PAUSE_S / 2 <= step[1] and step[0] <= ended for began, ended in spans)


def _mean_s(steps: list[Span]) -> float:
    return statistics.mean(ended - began for began, ended in steps)
