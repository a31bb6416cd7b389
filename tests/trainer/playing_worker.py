"""Plays the worker for one rank: the folder, the mailbox, the environment, the process, and its end."""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dtrain.common.digests import blob_digest
from dtrain.common.mailbox import MAILBOX_BYTES, Mailbox, RestoreState
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, Step, job_name
from dtrain.storage.indexes import index_shard
from dtrain.storage.keys import index_key, shard_key
from dtrain.storage.manifests import Manifest, ShardEntry, encode
from dtrain.storage.restore_files import (
    INDEX_FILE,
    MANIFEST_FILE,
    RESTORE_FOLDER,
    SHARD_FILE,
    SOURCES_FILE,
    Sources,
    encode_sources,
)
from tests.support.warm_scripts import WarmScript, WarmScripts

DEADLINE_S = 60.0  # longest wait for a fact; a run here takes a few seconds
ROOT = Path(__file__).parents[2]
_OURS = ("DTRAIN_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")


def clean_environment(**added: str) -> dict[str, str]:
    """Return this process's environment without any launcher's variables, and with ``added``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **added}


def wait_for(fact: Callable[[], bool], what: str) -> None:
    """Return when ``fact()`` holds; fail the test, saying ``what`` was awaited, after the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not fact():
        if time.monotonic() > end:
            raise AssertionError(f"waited {DEADLINE_S:.0f} s in vain for: {what}")
        time.sleep(0.005)


def offer(ranks: Sequence["RankFolder"], shards: Sequence[bytes], *, at_hand: bool = False) -> None:
    """Give the ranks of one folder a checkpoint of these shards to start from, as a worker would.

    ``at_hand``: it only points out where on this node they lie, and has not verified anything yet.
    """
    folder = ranks[0].path.parent / RESTORE_FOLDER
    folder.mkdir()
    images = {rank: str(folder / SHARD_FILE.format(rank)) for rank in range(len(shards))}
    if at_hand:
        (folder / SOURCES_FILE).write_bytes(encode_sources(Sources(images=images)))
    job, checkpoint, attempt = job_name("played"), CheckpointNumber(1), AttemptNumber(1)
    entries = []
    for rank, data in enumerate(shards):
        index, digest = index_shard(memoryview(data))
        (folder / INDEX_FILE.format(rank)).write_bytes(index)
        (folder / SHARD_FILE.format(rank)).write_bytes(data)
        entries.append(
            ShardEntry(
                rank=rank,
                key=shard_key(job, checkpoint, attempt, rank),
                size_bytes=len(data),
                digest=digest,
                index_key=index_key(job, checkpoint, attempt, rank),
                index_digest=blob_digest(index),
            )
        )
    manifest = Manifest(
        job=job,
        checkpoint=checkpoint,
        attempt=attempt,
        generation=Generation(1),
        step=Step(1),
        world_size=len(entries),
        shards=tuple(entries),
    )
    (folder / MANIFEST_FILE).write_bytes(encode(manifest))
    for of in ranks if not at_hand else ():
        of.mailbox.restore = RestoreState.READY


class RankFolder:
    """What a worker makes for one rank. Use in a ``with`` statement: leaving kills the process."""

    def __init__(self, generation_folder: Path, *, rank: int, world_size: int) -> None:
        self.path = generation_folder / f"rank{rank}"
        self.path.mkdir(parents=True)
        (self.path / "mailbox").write_bytes(bytes(MAILBOX_BYTES))
        with (self.path / "mailbox").open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), MAILBOX_BYTES)
        self.mailbox = Mailbox(self._map, create=True)
        self.process: subprocess.Popen[bytes] | WarmScript | None = None
        self.environment = clean_environment(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size),
            DTRAIN_JOB="played",
            DTRAIN_GENERATION="1",
            DTRAIN_RANK_DIR=str(self.path),
            DTRAIN_RENDEZVOUS=f"file://{generation_folder / 'rendezvous'}",
            TORCHELASTIC_ERROR_FILE=str(self.path / "error.json"),
        )

    def __enter__(self) -> "RankFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.mailbox.close()
        self._map.close()

    def start(self, script: Path, *arguments: str) -> None:
        """Start the script as this rank's trainer; what it prints goes to ``output``."""
        with (self.path / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *arguments], env=self.environment, stdout=output, stderr=output
            )

    def start_warm(self, scripts: WarmScripts, script: Path, *arguments: str) -> None:
        """The same, in a process that has imported torch already."""
        output = self.path / "output"
        self.process = scripts.start(script, *arguments, environment=self.environment, output=output)

    def kill(self) -> None:
        """End the process with SIGKILL, if it still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def wait_exit(self) -> int:
        """Return the exit code."""
        assert self.process is not None
        return self.process.wait(2 * DEADLINE_S)  # a whole run, of several ranks on few cores

    def wait_until(self, fact: Callable[[Mailbox], bool], what: str) -> None:
        """Wait until the mailbox shows ``fact``; fail at once, with the output, if the process ends before."""

        def holds() -> bool:
            if fact(self.mailbox):
                return True
            if self.process is not None and self.process.poll() is not None and not fact(self.mailbox):
                raise AssertionError(f"the trainer ended before {what}:\n{self.output()}")
            return False

        wait_for(holds, what)

    def output(self) -> str:
        """Return what the process printed so far."""
        return (self.path / "output").read_text()
