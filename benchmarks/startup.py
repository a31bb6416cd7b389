"""How long from pressing Enter to the end of the first step: ``dtrain run`` against ``torchrun --standalone``.

Both run benchmarks/first_step.py with two ranks, by turns, so that whatever else the machine does hits both.
dtrain brings up etcd, a coordinator and a worker in a fresh data folder meanwhile; torchrun its agent and store.

    python benchmarks/startup.py [--rounds 7]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("first_step.py")
BIN = Path(sys.executable).parent
DEADLINE_S = 120.0


def commands(folder: Path) -> dict[str, list[str]]:
    """What is compared, by name."""
    return {
        "dtrain run": [
            *(str(BIN / "dtrain"), "run", "--nproc-per-node", "2", "--data-dir", str(folder / "data")),
            *("--every-seconds", "0", str(SCRIPT)),
        ],
        "torchrun --standalone": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(SCRIPT)],
    }


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Return seconds until the first step was done, and until the command had ended."""
    said = folder / "first-step"
    environment = {
        **os.environ,
        "FIRST_STEP_FILE": str(said),
        "OMP_NUM_THREADS": "1",
        # Without it, torch's store may wait 5 s for a name server. Both sides get it.
        "RES_OPTIONS": "timeout:1 attempts:1",
    }
    wall, began = time.time(), time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    ended_s = time.monotonic() - began
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return float(said.read_text()) - wall, ended_s


def measure_all(rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return, by command, the seconds until the first step and until the command had ended."""
    first_s: dict[str, list[float]] = {}
    whole_s: dict[str, list[float]] = {}
    for round_number in range(rounds + 1):
        for name in commands(Path()):
            folder = Path(tempfile.mkdtemp(prefix="dtrain-startup-"))
            try:
                first, whole = measure(commands(folder)[name], folder)
            finally:
                shutil.rmtree(folder)
            if round_number > 0:  # the first round warms the disk's cache
                first_s.setdefault(name, []).append(first)
                whole_s.setdefault(name, []).append(whole)
    return first_s, whole_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    first_s, whole_s = measure_all(rounds)
    print(f"{'median of ' + str(rounds):24} {'first step':>12} {'command ended':>15}   first steps")
    for name, values in first_s.items():
        spread = " ".join(f"{value:.2f}" for value in sorted(values))
        print(f"{name:24} {statistics.median(values):10.2f} s {statistics.median(whole_s[name]):13.2f} s   {spread}")
    ours, theirs = (statistics.median(first_s[name]) for name in commands(Path()))
    print(f"dtrain / torchrun: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
