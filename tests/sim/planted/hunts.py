"""Hunts for one planted fault: a copy of the product with the fault in it, and schedules until one of them fails."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.sim.planted.faults import Planted

ROOT = Path(__file__).parents[3]
_TOTAL = re.compile(r"^(\d+) schedules from seed", re.MULTILINE)
_FINDING = re.compile(r"^  ([a-z ]+): (.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Caught:
    """What a hunt found."""

    seeds: int  # schedules until the first finding, or all that were run
    checker: str  # empty: nothing was found
    text: str


def plant(fault: Planted, folder: Path) -> None:
    """Copy the product into ``folder`` with the fault in it."""
    shutil.copytree(ROOT / "dtrain", folder / "dtrain", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "dtrain" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.name}: its place is there {text.count(fault.old)} times"
    path.write_text(text.replace(fault.old, fault.new))


def hunt(fault: Planted, *, seeds: int, first: int, timeout_s: float, within_s: float = float("inf")) -> Caught:
    """Run schedules over the planted copy until one fails, or ``within_s`` seconds have passed."""
    with tempfile.TemporaryDirectory(prefix="dtrain-planted-") as name:
        plant(fault, Path(name))
        environment = {**os.environ, "PYTHONPATH": f"{name}:{ROOT}"}
        command = [sys.executable, "-m", "tests.sim", "--seeds", str(seeds), "--first", str(first)]
        done = subprocess.run(
            [*command, "--jobs", "1", "--until-found", "--quiet", "--within-s", str(within_s)],
            cwd=name, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    total, finding = _TOTAL.search(done.stdout), _FINDING.search(done.stdout)
    assert total is not None, f"{fault.name}: the simulator did not run: {done.stdout[-500:]}{done.stderr[-1500:]}"
    if finding is None:
        return Caught(seeds=int(total[1]), checker="", text="")
    return Caught(seeds=int(total[1]), checker=finding[1], text=finding[2])
