"""How long from kill -9 of a rank to the first new step on all ranks: dtrain against torchrun at its best.

Both run benchmarks/recovering.py with two ranks, and one rank of it is killed again and again. They run by turns, a
few kills each, so that whatever else the machine does hits both. torchrun runs with settings without which it may
hang or wait for a name server (TORCH_DISABLE_SHARE_RDZV_TCP_STORE, RES_OPTIONS).

    python benchmarks/recovery.py [--kills 10]
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("recovering.py")
BIN = Path(sys.executable).parent
DEADLINE_S = 120.0
TURNS = 2  # of each side
SETTLED_S = 6.0  # of training before the first kill
WARM = "the warm process is ready"  # said in the worker's log
BETWEEN_S = 1.5  # of training between two kills: more than a checkpoint takes
EVERY_STEPS = 20
MOMENTS = ("born", "first line", "imported", "joined", "built", "restored", "step")
PARTS = {
    "decided": "exit seen, reported, decision made",
    "born": "decision appended, commanded, old ranks ended, new ones forked",
    "first line": "the script's first line",
    "imported": "imports",
    "joined": "process group",
    "built": "model, DDP, optimizer",
    "restored": "state restored",
    "step": "first step",
}

Line = dict[str, Any]


class Contender:
    """One side's job while it runs."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.record = folder / "record"

    def command(self) -> list[str]:
        if self.name == "torchrun":
            return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--max-restarts", "99", str(SCRIPT)]
        return [
            *(str(BIN / "dtrain"), "run", "--name", "killed", "--data-dir", str(self.folder / "data")),
            *("--nproc-per-node", "2", "--every-steps", str(EVERY_STEPS), "--max-restarts", "99", str(SCRIPT)),
        ]

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "RECOVERY_RECORD": str(self.record),
            "OMP_NUM_THREADS": "1",
            "RES_OPTIONS": "timeout:1 attempts:1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **(
                {"DTRAIN_LOCAL_STORE": f"file://{self.folder}/store", "DTRAIN_LOCAL_EVERY_STEPS": str(EVERY_STEPS)}
                if self.name == "torchrun"
                else {}
            ),
        }

    def lines(self) -> list[Line]:
        text = self.record.read_text() if self.record.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def wait_for_steps(self, *, not_of: set[int], seconds: float) -> list[Line]:
        """Wait until both ranks, in processes other than ``not_of``, have trained for so long."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            lines = [line for line in self.lines() if line["pid"] not in not_of]
            steps = [[line["at"] for line in lines if line["moment"] == "step" and line["rank"] == r] for r in (0, 1)]
            if all(at and at[-1] - at[0] >= seconds for at in steps):
                return lines
            time.sleep(0.05)
        raise SystemExit(f"{self.name} made no steps within {DEADLINE_S:g} s:\n{(self.folder / 'log').read_text()}")

    def wait_until_warm(self) -> None:
        """Wait for dtrain's warm process: it begins to import when the ranks train, and gives way to them."""
        deadline = time.monotonic() + DEADLINE_S
        while self.name == "dtrain" and time.monotonic() < deadline:
            if any(WARM in log.read_text() for log in (self.folder / "data").rglob("worker-0.log")):
                return
            time.sleep(0.1)

    def decided(self) -> list[float]:
        """When dtrain decided on each failure: the times in its log."""
        if self.name == "torchrun":
            return []
        asked = [str(BIN / "dtrain"), "history", "killed", "-o", "json", "--data-dir", str(self.folder / "data")]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
        events = [json.loads(line) for line in told]
        return [event["time"] for event in events if event["type"] == "GenerationFailed"]


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


def kill_again_and_again(it: Contender, kills: int) -> list[dict[str, float]]:
    """Return the parts of each recovery, in seconds, and their sum as ``total``."""
    old: set[int] = set()
    it.wait_for_steps(not_of=old, seconds=SETTLED_S)
    it.wait_until_warm()
    lines = it.lines()
    found = []
    for number in range(kills):
        victim = next(line["pid"] for line in reversed(lines) if line["rank"] == 1 - number % 2)
        old |= {line["pid"] for line in lines}
        at = time.time()
        os.kill(victim, signal.SIGKILL)
        lines = it.wait_for_steps(not_of=old, seconds=BETWEEN_S)
        # The later of the two ranks, at the first time that it came there.
        moments = {
            moment: max(
                min(line["at"] for line in lines if line["rank"] == rank and line["moment"] == moment)
                for rank in (0, 1)
            )
            for moment in MOMENTS
        }
        found.append({"killed": at, **moments})
    decided = it.decided()
    parts = []
    for number, moments in enumerate(found):
        order = ["killed", *(("decided",) if decided else ()), *MOMENTS]
        if decided:
            moments["decided"] = decided[number]
        steps = {later: moments[later] - moments[before] for before, later in itertools.pairwise(order)}
        parts.append({**steps, "total": moments["step"] - moments["killed"]})
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="of each side")
    parser.add_argument("--only", choices=("dtrain", "torchrun"), help="measure one side only")
    asked = parser.parse_args()
    sides = (asked.only,) if asked.only else ("dtrain", "torchrun")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(TURNS):
        for name in sides:
            with running(name) as it:
                kills = asked.kills // TURNS + (turn < asked.kills % TURNS)
                found[name] += kill_again_and_again(it, kills)
    print(f"{'seconds, median of ' + str(asked.kills):64}" + "".join(f"{name:>12}" for name in sides))
    for part, words in {**PARTS, "total": "kill -9 to the first new step on all ranks"}.items():
        values = [[row[part] for row in found[name] if part in row] for name in sides]
        print(f"{words:64}" + "".join(f"{statistics.median(v):12.3f}" if v else f"{'':>12}" for v in values))
    for name in sides:
        print(f"{name}, sorted: " + " ".join(f"{row:.2f}" for row in sorted(row["total"] for row in found[name])))
    if len(sides) == 2:
        ours, theirs = (statistics.median(row["total"] for row in found[name]) for name in sides)
        print(f"torchrun / dtrain: {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
