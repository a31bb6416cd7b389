"""kill -9 of the worker agent, or of the coordinator: what that costs a job that trains."""

import itertools
import os
import signal
import statistics
import time
from dataclasses import dataclass

import psutil
from contenders import Contender, Line, running

SETTLED_S = 6.0
WINDOW_S = 4.0  # of training after a kill that is looked at; the service is back long before its end


@dataclass(frozen=True)
class Cost:
    """What one kill cost."""

    steps_lost: int  # done again by another process, or done by nobody
    worst: float  # the longest time between two steps of a rank after the kill, in medians
    before: float  # the same for as long before the kill: what the machine does by itself


def measure(verb: str, kills: int) -> list[Cost]:
    """Kill the service of this verb (worker, coordinator) so often while one job trains."""
    with running("dtrain") as it:
        it.wait_for_steps(not_of=set(), seconds=SETTLED_S)
        it.wait_until_warm()
        return [_kill_once(it, verb) for _ in range(kills)]


def _kill_once(it: Contender, verb: str) -> Cost:
    _train_for(it, WINDOW_S)
    before = it.lines()
    pids = {line["rank"]: line["pid"] for line in before}
    at = time.time()
    os.kill(_service(it, verb), signal.SIGKILL)
    _train_for(it, WINDOW_S)
    lines = [line for line in it.lines() if line["moment"] == "step"]
    median = statistics.median(_gaps(lines, at - WINDOW_S, at))
    return Cost(
        steps_lost=_lost(lines, pids, at),
        worst=max(_gaps(lines, at, at + WINDOW_S)) / median,
        before=max(_gaps(lines, at - WINDOW_S, at)) / median,
    )


def _train_for(it: Contender, seconds: float) -> None:
    """Wait until both ranks have done a step so long after now."""
    end = time.time() + seconds
    while True:
        lines = it.lines()
        last = [max((line["at"] for line in lines if line["rank"] == rank), default=0.0) for rank in (0, 1)]
        if min(last) >= end:
            return
        time.sleep(0.1)


def _service(it: Contender, verb: str) -> int:
    folder = str(it.folder)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "-m" in words and verb in words and "dtrain" in words and folder in process.environ().get(_MARK, ""):
            return int(process.pid)
    raise SystemExit(f"no {verb} runs in {folder}")


_MARK = "_DTRAIN_DATA_FOLDER"  # what dtrain run gives its services


def _gaps(lines: list[Line], begin: float, end: float) -> list[float]:
    found = []
    for rank in (0, 1):
        times = [line["at"] for line in lines if line["rank"] == rank and begin <= line["at"] <= end]
        found += [later - sooner for sooner, later in itertools.pairwise(times)]
    return found


def _lost(lines: list[Line], pids: dict[int, int], at: float) -> int:
    """Steps since the kill that were not done exactly once, by the process that ran before it."""
    lost = 0
    for rank, pid in pids.items():
        steps = [line["step"] for line in lines if line["rank"] == rank and line["at"] >= at]
        done = {line["step"] for line in lines if line["rank"] == rank and line["at"] >= at and line["pid"] == pid}
        lost += len(steps) - len(done) + (max(done, default=0) - min(done, default=1) + 1 - len(done))
    return lost
