"""What the simulator's command says of many schedules: storms that are too kind fail, once there were enough."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sim import command, replays
from tests.sim.schedules import ROOM, Verdict
from tests.sim.situations import EXPECTED
from tests.support.facts import wait_for

ROOT = Path(__file__).parents[2]


def simulate(monkeypatch: pytest.MonkeyPatch, schedules: int, met: tuple[str, ...]) -> int:
    """Exit code for so many schedules without a finding, of which each met the same."""
    seen = dict.fromkeys(met, 1)

    def verdicts(seeds: range, jobs: int) -> Iterator[Verdict]:
        return (Verdict(seed, [], 0.0, 0, 0, 0, seen, [], 0.0) for seed in seeds)

    monkeypatch.setattr(command, "_verdicts", verdicts)
    monkeypatch.setattr(replays, "elsewhere", lambda logs: [replays.digest(log) for log in logs])
    monkeypatch.setenv("PYTHONHASHSEED", command.HASH_SEED)
    return command.main(["--first", "1", "--seeds", str(schedules), "--quiet"])


@pytest.mark.parametrize(
    ("schedules", "met", "code"),
    [
        (command.MET_WITHIN, EXPECTED, 0),
        (command.MET_WITHIN, EXPECTED[1:], 1),
        (command.MET_WITHIN - 1, EXPECTED[1:], 0),
    ],
)
def test_many_schedules_that_never_met_something_fail(
    schedules: int, met: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(monkeypatch, schedules, met) == code
    assert (f"never met {EXPECTED[0]}" in capsys.readouterr().out) is bool(code)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_search_that_is_ended_says_what_it_met_until_then(number: signal.Signals, jobs: str) -> None:
    command_line = [sys.executable, "-m", "tests.sim", "--seeds", "100000", "--jobs", jobs]
    search = subprocess.Popen(command_line, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for("a schedule", lambda: any(folders_of(search.pid)), deadline_s=60.0)
        search.send_signal(number)
        said, _ = search.communicate(timeout=120.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(search.pid, signal.SIGKILL)
        search.wait()
    assert search.returncode == command.INTERRUPTED_CODE, said
    assert not list(folders_of(search.pid))
    assert re.fullmatch(r"[1-9]\d* schedules from seed \d+: 0 with findings.*", said.splitlines()[-1]), said


def folders_of(pid: int) -> Iterator[Path]:
    return ROOM.glob(f"dtrain-sim-{pid}-*")
