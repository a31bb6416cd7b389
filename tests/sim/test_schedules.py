"""Schedules in every test run: new seeds each time, so that the runs of all days together are one long search.

A failure prints the seed, the commit and the command that repeats it. Longer runs: `make sim`.
"""

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.command import HASH_SEED

ROOT = Path(__file__).parents[2]
PARTS = 4  # so that processes of pytest can share them
SEEDS = 75  # in each
FIRST_SEED_MAX = 10**9
DEADLINE_S = 900.0  # a minute or two, but for a machine that is busy with other things


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.sim", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.parametrize("part", range(PARTS))
def test_fresh_schedules_hold_every_rule(part: int) -> None:
    first = secrets.randbelow(FIRST_SEED_MAX)
    print(f"part {part}: seeds from {first} on")
    done = simulate("--first", str(first), "--seeds", str(SEEDS), "--jobs", "1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    total = re.search(r"^(\d+) schedules from seed", done.stdout, re.MULTILINE)
    assert total is not None and int(total[1]) == SEEDS, done.stdout


def test_a_seed_gives_the_same_schedule_every_time() -> None:
    """Told line by line, with all faults and everything logged: in two processes, nothing differs."""
    one, other = simulate("--seed", "111", "--trace"), simulate("--seed", "111", "--trace")
    assert one.stdout.count("FAULT") > 5, "nothing befell it"
    assert one.stdout == other.stdout


def test_a_log_folds_into_the_same_states_in_another_process() -> None:
    """With another PYTHONHASHSEED, so that nothing in a state may lie in the order of a set."""
    done = simulate("--seeds", "2", "--first", "1", "--jobs", "1")
    assert "replay is the same everywhere" not in done.stdout, done.stdout
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "checkpoint named an older one's pack" in done.stdout.partition("never")[0], "nothing was packed"


def test_a_world_that_has_ended_is_freed() -> None:
    """One that a thread waits in for ever, too: else a long search spends its time collecting around it."""
    program = (
        "import gc, logging, sys; from tests.sim import schedules; from tests.sim.world import World\n"
        "sys.unraisablehook = lambda _: None; logging.disable(logging.CRITICAL)\n"
        "for seed in range(4): schedules.run(seed)\n"
        "gc.collect(); print(sum(isinstance(each, World) for each in gc.get_objects()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": HASH_SEED}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "0", done.stdout + done.stderr[-2000:]
