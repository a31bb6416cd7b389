"""What the simulator's command says of many schedules: storms that are too kind fail, once there were enough."""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.sim import command, replays
from tests.sim.schedules import Verdict
from tests.sim.situations import EXPECTED


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
def test_a_run_that_is_ended_says_what_it_met_until_then(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {"leader killed": 1}

    def verdicts(seeds: range, jobs: int) -> Iterator[Verdict]:
        for seed in seeds:
            if seed == 3:
                os.kill(os.getpid(), number)
            yield Verdict(seed, [], 0.0, 0, 0, 0, seen, [], 0.0)

    monkeypatch.setattr(command, "_verdicts", verdicts)
    monkeypatch.setattr(replays, "elsewhere", lambda logs: [replays.digest(log) for log in logs])
    monkeypatch.setenv("PYTHONHASHSEED", command.HASH_SEED)
    before = signal.getsignal(number)
    assert command.main(["--first", "1", "--seeds", "9"]) == command.INTERRUPTED_CODE
    said = capsys.readouterr().out
    assert "3  leader killed" in said
    assert said.splitlines()[-1].startswith("3 schedules from seed 1: 0 with findings")
    assert signal.getsignal(number) is before
