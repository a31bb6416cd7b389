"""The folders that an agent shares with its keepers and trainers, in shared memory.

``<shared memory>/dtrain-<journal>/<job>.g<generation>/rank<rank>/``, and beside them the stage slots of each job, in
``arenas/<job>/rank<rank>/``, which outlive its generations. The journal's identity keeps two agents of
one machine apart. The folders are only ever worth something together with the journal: what a restarted agent
finds there without a living generation in its journal is swept away.

Rule: preparing a folder twice changes nothing that a keeper or trainer may already use.
"""

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from dtrain.common.mailbox import MAILBOX_BYTES, Mailbox, RestoreState
from dtrain.common.names import Generation, JobName
from dtrain.worker.core.states import ExitFact

JOURNAL_CHARS = 8  # of its identity: enough to keep the agents of one machine apart
OWNER_FILE = "owner"  # at the root: the data folder of the agent that made it
CACHE = "cache"  # in the data folder: what was fetched from storage, by job
ARENAS = "arenas"  # the stage slots of all jobs; no generation's folder is named so: those end with a number


@dataclass(frozen=True, slots=True, kw_only=True)
class RankId:
    """One rank of one generation: what every shell of the agent calls it."""

    job: JobName
    generation: Generation
    rank: int


class Started(msgspec.Struct, frozen=True):
    """``started.json``: who keeps and who trains. A trainer pid of 0: the keeper is about to fork."""

    keeper_pid: int
    keeper_start: int  # with the pid, the identity of a process
    trainer_pid: int
    trainer_start: int


# What the monotonic clock's zero was on the wall clock when this agent began. Exits are timed by the clock that only
# grows, and told as wall time by one rule, so that those of one node stay in order whoever sets its clock.
_MONOTONIC_ZERO_UNIX_S = time.time() - time.monotonic()


class Exited(msgspec.Struct, frozen=True):
    """``exited.json``: how the trainer ended, as its keeper saw it."""

    code: int | None
    at_unix_s: float
    error: str
    at_mono_s: float = 0.0  # on this boot's monotonic clock; 0: written by who did not see it
    traceback: str = ""
    out_of_memory: str = ""
    ended_for: str = ""

    def fact(self) -> ExitFact:
        at_unix_s = _MONOTONIC_ZERO_UNIX_S + self.at_mono_s if self.at_mono_s else self.at_unix_s
        return ExitFact(
            code=self.code,
            at_unix_s=at_unix_s,
            error=self.error,
            traceback=self.traceback,
            out_of_memory=self.out_of_memory,
            ended_for=self.ended_for,
        )


class KeeperPlan(msgspec.Struct, frozen=True, kw_only=True):
    """``keeper.json``: what the keeper runs."""

    argv: list[str]
    cwd: str
    env: dict[str, str]
    log: str
    error_file: str
    grace_s: float  # longest time between SIGTERM and SIGKILL
    agent_lock: str
    orphan_after_s: float
    kills_file: str = ""  # where the kernel counts whom it kills for want of memory; empty: it does not say
    memory_bound: str = ""  # on what the trainer may hold, in words


class RankDirs:
    """The folders of one agent."""

    def __init__(self, shared_memory: Path, data_dir: Path, journal_id: str) -> None:
        self._base = shared_memory if os.access(shared_memory, os.W_OK | os.X_OK) else data_dir
        self._data_dir = data_dir
        self.root = self._base / f"dtrain-{journal_id[:JOURNAL_CHARS]}"
        self._held: BinaryIO | None = None  # the owner file, locked: an agent lives that uses the root

    def generation_dir(self, job: JobName, generation: Generation) -> Path:
        return self.root / f"{job}.g{generation}"

    def rank_dir(self, of: RankId) -> Path:
        return self.generation_dir(of.job, of.generation) / f"rank{of.rank}"

    def arena(self, job: JobName) -> Path:
        """Where the job's stage slots lie in shared memory: one folder a rank, whatever its generation."""
        return self.root / ARENAS / job

    def arena_in_files(self, job: JobName) -> Path:
        """Where they lie if there is too little memory."""
        return self._data_dir / ARENAS / job

    def cache(self, job: JobName) -> Path:
        """What this node fetched of the checkpoint that the job started from."""
        return self._data_dir / CACHE / job

    def prepare(self, of: RankId, plan: KeeperPlan, restore: RestoreState) -> None:
        """Make the rank's folder, mailbox and keeper file. Raises OSError."""
        folder = self.rank_dir(of)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.root / OWNER_FILE).exists():
            write_whole(self.root / OWNER_FILE, str(self._data_dir).encode())
            self._held = None
        self._hold()
        Path(plan.log).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "keeper.json", msgspec.json.encode(plan))  # holds an environment: for the owner only
        if not (folder / "mailbox").exists():
            page = bytearray(MAILBOX_BYTES)
            mailbox = Mailbox(page, create=True)
            mailbox.restore = restore
            mailbox.close()
            write_whole(folder / "mailbox", bytes(page))

    def remove(self, job: JobName, generation: Generation) -> None:
        shutil.rmtree(self.generation_dir(job, generation), ignore_errors=True)

    def sweep(self, keep: Iterable[tuple[JobName, Generation]]) -> None:
        """Remove every generation's folder but these, and the stage slots and the cache of every other job."""
        self._hold()
        known = list(keep)
        wanted = {self.root / ARENAS, *(self.generation_dir(job, generation) for job, generation in known)}
        wanted |= {path for job, _ in known for path in (self.arena(job), self.arena_in_files(job), self.cache(job))}
        for parent in (self.root, self.root / ARENAS, self._data_dir / ARENAS, self._data_dir / CACHE):
            for folder in parent.iterdir() if parent.is_dir() else ():
                if folder not in wanted and folder.is_dir():
                    shutil.rmtree(folder, ignore_errors=True)

    def sweep_abandoned(self) -> list[Path]:
        """Remove what agents left whose data folder is gone: no journal will ever ask for it. Return it.

        One that lives is spared, whatever is seen of its data folder here: it may be in another container.
        """
        removed = []
        for root in self._base.glob("dtrain-" + "?" * JOURNAL_CHARS):
            try:
                owner = Path((root / OWNER_FILE).read_text())
            except (OSError, UnicodeDecodeError):
                continue  # not ours to judge
            if root != self.root and not owner.exists() and not _is_held(root) and not _is_kept(root):
                shutil.rmtree(root, ignore_errors=True)
                removed.append(root)
        return removed

    def _hold(self) -> None:
        """Show other agents that this one lives."""
        if self._held is None:
            with contextlib.suppress(OSError):  # nothing to be held yet
                owner = (self.root / OWNER_FILE).open("rb")
                fcntl.flock(owner, fcntl.LOCK_SH)  # another agent's look takes microseconds
                self._held = owner

    def remove_root(self) -> None:
        """Remove the root if nothing is left in it."""
        if self.root.is_dir() and not any(entry.is_dir() for entry in self.root.iterdir()):
            shutil.rmtree(self.root, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write the file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.agent")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.rename(path)


def read_started(folder: Path) -> Started | None:
    try:
        return msgspec.json.decode((folder / "started.json").read_bytes(), type=Started)
    except FileNotFoundError:
        return None


def read_exited(folder: Path) -> ExitFact | None:
    try:
        return msgspec.json.decode((folder / "exited.json").read_bytes(), type=Exited).fact()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def keeper_lock(folder: Path) -> Iterator[bool]:
    """Yield whether no keeper lives; while it is True none can begin either."""
    lock = os.open(folder / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)


def _is_held(root: Path) -> bool:
    """Whether an agent lives that uses ``root``."""
    try:
        with (root / OWNER_FILE).open("rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _is_kept(root: Path) -> bool:
    """Whether some keeper still lives under ``root``."""
    for folder in root.glob("*/rank*"):
        with contextlib.suppress(OSError), keeper_lock(folder) as free:
            if not free:
                return True
    return False


def forbid(folder: Path, reason: str) -> ExitFact | None:
    """Make sure that this rank is never started. None: too late, a keeper lives or has lived."""
    with keeper_lock(folder) as free:
        if not free or (folder / "started.json").exists():
            return None
        fact = ExitFact(code=None, at_unix_s=time.time(), error=reason)
        write_whole(
            folder / "exited.json", json.dumps({"code": None, "at_unix_s": fact.at_unix_s, "error": reason}).encode()
        )
        return fact


@contextlib.contextmanager
def open_mailbox(folder: Path) -> Iterator[Mailbox]:
    """Map the rank's mailbox for a moment. Raises FileNotFoundError."""
    with (folder / "mailbox").open("r+b") as file, mmap.mmap(file.fileno(), MAILBOX_BYTES) as page:
        mailbox = Mailbox(page)
        try:
            yield mailbox
        finally:
            mailbox.close()
