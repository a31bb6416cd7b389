"""What all rows of the recovery benchmark share: the script's record, and one job of each side while it runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("recovering.py")
BIN = Path(sys.executable).parent
DEADLINE_S = 120.0
WARM = "trainers wait, forked in advance"  # said in the worker's log
EVERY_STEPS = 20
JOB = "killed"

Line = dict[str, Any]


class Record:
    """What the script's ranks said, one line a moment."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name  # of the side
        self.path = folder / "record"

    def lines(self) -> list[Line]:
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def wait_for_steps(self, *, not_of: set[int], seconds: float, ranks: Sequence[int] = (0, 1)) -> list[Line]:
        """Wait until all these ranks, in processes other than ``not_of``, have trained for so long."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            lines = [line for line in self.lines() if line["pid"] not in not_of]
            steps = [[line["at"] for line in lines if line["moment"] == "step" and line["rank"] == r] for r in ranks]
            if all(at and at[-1] - at[0] >= seconds for at in steps):
                return lines
            time.sleep(0.05)
        logs = "\n".join(f"-- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*log")))
        raise SystemExit(f"{self.name} made no steps within {DEADLINE_S:g} s:\n{logs}")

    def environment(self) -> dict[str, str]:
        """What the script and torchrun get; dtrain's own verbs get no settings but their options."""
        store = {"DTRAIN_LOCAL_STORE": f"file://{self.folder}/store", "DTRAIN_LOCAL_EVERY_STEPS": str(EVERY_STEPS)}
        return {
            **os.environ,
            "RECOVERY_RECORD": str(self.path),
            "OMP_NUM_THREADS": "1",
            "RES_OPTIONS": "timeout:1 attempts:1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **(store if self.name == "torchrun" else {}),
        }


class Contender(Record):
    """One side's job on this machine alone."""

    def command(self) -> list[str]:
        if self.name == "torchrun":
            return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--max-restarts", "99", str(SCRIPT)]
        return [
            *(str(BIN / "dtrain"), "run", "--name", JOB, "--data-dir", str(self.folder / "data")),
            *("--nproc-per-node", "2", "--every-steps", str(EVERY_STEPS), "--max-restarts", "99", str(SCRIPT)),
        ]

    def wait_until_warm(self) -> None:
        """Wait for dtrain's warm process: it begins to import when the ranks train, and gives way to them.

        Then it forks as many trainers as the node has slots.
        """
        deadline = time.monotonic() + DEADLINE_S
        while self.name == "dtrain" and time.monotonic() < deadline:
            if any(WARM in log.read_text() for log in (self.folder / "data").rglob("worker-0.log")):
                return
            time.sleep(0.1)

    def events(self) -> list[Line]:
        """dtrain's own log of the job."""
        asked = [str(BIN / "dtrain"), "history", JOB, "-o", "json", "--data-dir", str(self.folder / "data")]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
        return [json.loads(line) for line in told]

    def said(self, service: str, words: str) -> list[float]:
        """When a service of dtrain's said a line with these words in its log."""
        (log,) = (self.folder / "data").rglob(f"{service}.log")
        return [said_at(line) for line in log.read_text().splitlines() if words in line]


def said_at(line: str) -> float:
    """The time at the beginning of a service's log line, as unix time."""
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


@contextmanager
def running(name: str) -> Iterator[Contender]:
    folder = Path(tempfile.mkdtemp(prefix="dtrain-recovery-"))
    it = Contender(folder, name)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(it.command(), env=it.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield it
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(DEADLINE_S)
        finally:
            process.kill()
            shutil.rmtree(folder, ignore_errors=True)
