"""How long a checkpoint holds training up, and how long it takes to be safe on the disk.

One rank with 200 float32 tensors, staged and uploaded to a local folder by the agent's own parts, with one and two
threads; against one large memcpy of the same bytes in the same process, a bare sendfile + fsync of the same bytes
between the checkpoints, and torch's ways of saving, all in the same run on the same disk.

    python benchmarks/staging.py [--mib 1024] [--rounds 5] [--folder .]
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.common.mailbox import MAILBOX_BYTES, Mailbox, RestoreState, pack
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step
from dtrain.worker.arenas import Arenas
from dtrain.worker.core.actions import Upload
from dtrain.worker.core.inputs import MailboxSeen, UploadDone, UploadFailed
from dtrain.worker.core.states import CheckpointRequest, TrainersSpec
from dtrain.worker.environment import trainer_environment
from dtrain.worker.free_memory import Free, free_for
from dtrain.worker.mailboxes import Mailboxes
from dtrain.worker.rank_dirs import RankDirs, RankId, open_mailbox
from dtrain.worker.tasks import Tasks
from dtrain.worker.uploads import Uploads

HERE = Path(__file__).parent
TENSORS = 200
WARM_UP_S = 6.0  # between the first step and the first checkpoint: a job's first checkpoint is not asked for sooner
DEADLINE_S = 300.0
POLL_S = 0.002
PAUSE_S = 0.5  # between two checkpoints: steps without any upload
SEND_BYTES = 16 * 1024 * 1024
OF = RankId(job=JobName("bench"), generation=Generation(1), rank=0)


@dataclass
class Measured:
    """One way of ours, with one number of threads."""

    stalls_s: list[float] = field(default_factory=list)  # the first is the very first checkpoint
    durable_s: list[float] = field(default_factory=list)  # from the command to storage's word
    stored_s: list[float] = field(default_factory=list)  # from staged to storage's word
    bare_s: list[float] = field(default_factory=list)  # a bare sendfile + fsync of the same bytes
    uploads: list[tuple[float, float]] = field(default_factory=list)  # when each upload ran
    memcpy_s: list[float] = field(default_factory=list)
    step_ratio: float = 0.0  # a step while uploading / a step while not


class Bench:
    """The worker's part for one rank: its shells, without its core."""

    def __init__(self, folder: Path, *, in_files: bool) -> None:
        self.store = folder / "store"
        self.dirs = RankDirs(Path("/dev/shm"), folder, f"{os.getpid():08x}")
        self.rank_dir = self.dirs.rank_dir(OF)
        self.seen: MailboxSeen | None = None
        self.answer: UploadDone | UploadFailed | None = None
        self.slots: tuple[int, int] | None = None  # first slot and bytes, once they are allocated
        self.tasks = Tasks()
        none = Free(size_bytes=0, where="this benchmark")
        self.arenas = Arenas(
            self.dirs, self._provided, lambda *_: None, self.tasks.begin, (lambda _: none) if in_files else free_for
        )
        self.mailboxes = Mailboxes(self._see, progress_every_s=0.0, on_need=self.arenas.provide)
        self.uploads = Uploads(self._answered, self.mailboxes.slot_holds, self.arenas.keep, self.tasks.begin)

    def _see(self, seen: MailboxSeen) -> None:
        self.seen = seen

    def _answered(self, answer: UploadDone | UploadFailed) -> None:
        self.answer = answer

    def _provided(self, of: RankId, first: int, size_bytes: int) -> None:
        self.slots = (first, size_bytes)
        self.mailboxes.open_slots(of, first, size_bytes)

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Make the rank's folder and start its trainer."""
        self.rank_dir.mkdir(parents=True)
        page = bytearray(MAILBOX_BYTES)
        mailbox = Mailbox(page, create=True)
        mailbox.restore = RestoreState.NOTHING
        mailbox.close()
        (self.rank_dir / "mailbox").write_bytes(page)
        self.arenas.claim((OF,))
        self.mailboxes.watch(OF, self.rank_dir)
        spec = TrainersSpec(
            python=sys.executable,
            script=str(HERE / "staging_trainer.py"),
            args=arguments,
            cwd="/",
            env={},
            world_size=1,
            nnodes=1,
            node_rank=0,
            first_rank=0,
            nproc=1,
            master_address="127.0.0.1",
            master_port=0,
            restarts=0,
            max_restarts=0,
            store=self.store.as_uri(),
            restore=None,
        )
        environment = trainer_environment(os.environ, spec, OF, self.rank_dir, "bench")
        return subprocess.Popen([spec.python, spec.script, *spec.args], env=environment)

    async def until(self, fact: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not fact():
            if time.monotonic() > deadline:
                raise SystemExit(f"waited {DEADLINE_S:.0f} s in vain for {what}")
            self.mailboxes.poll(time.monotonic())
            await asyncio.sleep(POLL_S)

    def step(self) -> int:
        return self.seen.completed_step if self.seen is not None else 0

    async def checkpoint(self, number: int, measured: Measured) -> None:
        """Ask for one, upload it, and do the bare thing with the same bytes."""
        self.mailboxes.poll(time.monotonic())
        step = self.step() + 5
        word = pack(number, step)
        began = time.monotonic()
        self.mailboxes.ask_stage(OF, word, lambda: self.arenas.choose(OF, number - 1))
        await self.until(lambda: self.seen is not None and self.seen.staged == word, "the state to be staged")
        assert self.seen is not None
        staged = time.monotonic()
        request = CheckpointRequest(
            checkpoint=CheckpointNumber(number),
            attempt=AttemptNumber(number),
            step=Step(step),
            store=self.store.as_uri(),
        )
        slot, size_bytes = self.seen.staged_slot, self.seen.staged_bytes
        act = Upload(job=OF.job, generation=OF.generation, rank=0, request=request, slot=slot, size_bytes=size_bytes)
        self.answer = None
        self.uploads.start(act, self.rank_dir)
        await self.until(lambda: self.answer is not None, "the upload")
        done = time.monotonic()
        if not isinstance(self.answer, UploadDone):
            raise SystemExit(f"the upload failed: {self.answer}")
        with open_mailbox(self.rank_dir) as mailbox:
            measured.stalls_s.append(mailbox.stall_ns / 1e9)
        measured.durable_s.append(done - began)
        measured.stored_s.append(done - staged)
        measured.uploads.append((staged, done))
        shutil.rmtree(self.store)
        await asyncio.sleep(PAUSE_S)
        source, target = self.rank_dir / f"slot{slot}", self.store.with_name("bare")
        measured.bare_s.append(await asyncio.to_thread(bare_send, source, target, size_bytes))
        target.unlink()
        await asyncio.sleep(PAUSE_S)

    def close(self) -> None:
        self.uploads.close()
        self.mailboxes.close()
        self.arenas.remove_all()
        self.arenas.close()
        shutil.rmtree(self.dirs.root, ignore_errors=True)


def bare_send(source: Path, target: Path, size_bytes: int) -> float:
    """Seconds that the plainest durable copy takes."""
    began = time.perf_counter()
    with source.open("rb") as read, target.open("wb") as write:
        position = 0
        while position < size_bytes:
            length = min(SEND_BYTES, size_bytes - position)
            position += os.sendfile(write.fileno(), read.fileno(), position, length)
        os.fsync(write.fileno())
    return time.perf_counter() - began


async def measure(folder: Path, *, mib: int, threads: int, rounds: int, in_files: bool) -> Measured:
    """The first checkpoint and ``rounds`` more."""
    measured = Measured()
    end, result = folder / "end", folder / "result"
    bench = Bench(folder, in_files=in_files)
    trainer = bench.start(str(end), str(result), str(mib), str(TENSORS), str(threads))
    try:
        async with asyncio.TaskGroup() as group:
            bench.tasks.group = group
            await bench.until(lambda: bench.step() > 0 and bench.slots is not None, "the first steps")
            await asyncio.sleep(WARM_UP_S)
            for number in range(1, rounds + 2):
                await bench.checkpoint(number, measured)
            end.touch()
            await asyncio.to_thread(trainer.wait, DEADLINE_S)
    finally:
        trainer.kill()
        trainer.wait()
        bench.close()
    said = json.loads(result.read_text())
    measured.memcpy_s = said["memcpy_s"]
    during, apart = [], []
    for ended, took in said["steps"]:
        inside = any(began <= ended - took and ended <= done for began, done in measured.uploads)
        near = any(began - PAUSE_S / 2 <= ended and ended - took <= done for began, done in measured.uploads)
        if inside:
            during.append(took)
        elif not near:
            apart.append(took)
    measured.step_ratio = statistics.mean(during) / statistics.mean(apart)
    return measured


def rivals(folder: Path, *, mib: int, threads: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    arguments = [str(folder), str(mib), str(TENSORS), str(threads), str(rounds)]
    command = [sys.executable, str(HERE / "staging_rivals.py"), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=1800)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def in_folder(where: Path, work: Callable[[Path], object]) -> object:
    folder = Path(tempfile.mkdtemp(prefix="dtrain-staging-", dir=where))
    try:
        return work(folder)
    finally:
        shutil.rmtree(folder)


def report(name: str, stalls: list[float], durable: list[float], floor_s: float) -> None:
    warm = statistics.median(stalls[1:])
    safe_s = statistics.median(durable[1:])
    print(f"{name:38} {stalls[0] * 1e3:9.0f} {warm * 1e3:9.0f} {warm / floor_s:9.2f} {safe_s:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    given = parser.parse_args()
    for threads in given.threads:
        ours: dict[str, Measured] = {}
        for name, in_files in (("dtrain", False), ("dtrain, slots in files (fallback)", True)):

            def work(folder: Path, in_files: bool = in_files, threads: int = threads) -> Measured:
                return asyncio.run(
                    measure(folder, mib=given.mib, threads=threads, rounds=given.rounds, in_files=in_files)
                )

            ours[name] = in_folder(given.folder, work)  # type: ignore[assignment]
        theirs: dict[str, list[tuple[float, float]]] = in_folder(  # type: ignore[assignment]
            given.folder,
            lambda folder, threads=threads: rivals(folder, mib=given.mib, threads=threads, rounds=given.rounds),
        )
        first = ours["dtrain"]
        floor_s = statistics.median(first.memcpy_s[1:])
        print(f"\n{given.mib} MiB, {TENSORS} tensors, {threads} thread(s), medians of {given.rounds}")
        print(f"{'':38} {'first, ms':>9} {'stall, ms':>9} {'/ memcpy':>9} {'safe, s':>9}")
        print(f"{'one large memcpy':38} {'':9} {floor_s * 1e3:9.0f} {1:9.2f}")
        for name, measured in ours.items():
            report(name, measured.stalls_s, measured.durable_s, floor_s)
        for name, rounds in theirs.items():
            report(name, [stall for stall, _ in rounds], [durable for _, durable in rounds], floor_s)
        for name, measured in ours.items():
            bare, stored = statistics.median(measured.bare_s[1:]), statistics.median(measured.stored_s[1:])
            print(
                f"{name}: staged to stored {stored:.2f} s, a bare sendfile + fsync {bare:.2f} s: {bare / stored:.2f}; "
                f"a step while uploading / while not: {measured.step_ratio:.2f}"
            )


if __name__ == "__main__":
    main()
