"""Every failpoint is struck in real processes, in every way there is, and the run ends as an undisturbed one.

One cluster for each way: all points are armed in all processes at once, and each fires once, at the first passing or
a later one. Steps are slow until all have fired, so that there are always more to come.
"""

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dtrain.common.failpoints import POINTS_VARIABLE, TRACE_VARIABLE, Action, Point
from tests.support.cluster import Cluster, cluster
from tests.support.facts import wait_for
from tests.survival.conftest import begin, check

STEPS = 600
STEP_MS = 150.0  # a minute and a half for all of them; once all points have fired, the rest is hurried
EVERY = 5  # steps; the points of a checkpoint come up so often
PASSINGS_MAX = 3  # a point fires at one of its first passings
ALL_FIRED_S = 150.0
MEND_PAUSE_S = 0.1


class Supervisor:
    """Starts services that ended again, and continues processes that a failpoint stopped."""

    def __init__(self, it: Cluster, trace: Path) -> None:
        self._it = it
        self._trace = trace
        self.restarts = 0
        self.over = threading.Event()

    def fired(self) -> dict[str, dict[str, int | str]]:
        """What the trace says, by point."""
        if not self._trace.exists():
            return {}
        lines = [json.loads(line) for line in self._trace.read_text().splitlines()]
        assert len({line["point"] for line in lines}) == len(lines), "a point fired twice"
        return {line["point"]: line for line in lines}

    def run(self) -> None:
        while not self.over.wait(MEND_PAUSE_S):
            self.mend()

    def mend(self) -> None:
        for service in (*self._it.coordinators, *self._it.workers):
            if service.process is not None and service.process.poll() is not None:
                self.restarts += 1
                service.start()
        for line in self.fired().values():
            if line["action"] == Action.PAUSE and _is_stopped(int(line["pid"])):
                os.kill(int(line["pid"]), signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except OSError:
        return False


@contextmanager
def supervised(it: Cluster, trace: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(it, trace)
    thread = threading.Thread(target=supervisor.run, name="supervisor")
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.over.set()
        thread.join()
    supervisor.mend()  # what ended at the very end


def orders(action: Action, rng: random.Random) -> str:
    """All points, each at one of its first passings."""
    how = f"{action}:0.3" if action is Action.DELAY else str(action)
    # A rank is spawned once a generation, and there may be only one.
    passings = {point: 1 if point.startswith("spawn") else rng.randint(1, PASSINGS_MAX) for point in Point}
    return ";".join(f"{point}={how}@{passing}" for point, passing in passings.items())


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "action", [Action.EXIT, Action.ERROR, *(pytest.param(each, marks=pytest.mark.slow) for each in ("pause", "delay"))]
)
def test_a_run_survives_every_failpoint(
    action: str, tmp_path: Path, rng: random.Random, undisturbed: Callable[[int], bytes]
) -> None:
    expected = undisturbed(STEPS)
    trace, hurry = tmp_path / "trace", tmp_path / "hurry"
    ordered = orders(Action(action), rng)
    print(ordered)
    with cluster(tmp_path / "cluster", coordinators=0, workers=0) as it:
        it.env |= {POINTS_VARIABLE: ordered, TRACE_VARIABLE: str(trace)}
        it.add_coordinator()
        it.add_worker()
        with supervised(it, trace) as supervisor:
            armed = ("--env", f"{POINTS_VARIABLE}={ordered}", "--env", f"{TRACE_VARIABLE}={trace}")
            script = ("--hurry", str(hurry), "--step-ms", str(STEP_MS))
            attack = begin(it, rng, steps=STEPS, more=("--every-steps", str(EVERY), *armed), script=script)
            try:
                wait_for("all points fired", lambda: len(supervisor.fired()) == len(Point), deadline_s=ALL_FIRED_S)
            except AssertionError:
                missing = sorted(set(Point) - supervisor.fired().keys())
                raise AssertionError(f"never fired: {missing}\n{it.logs()}") from None
            hurry.touch()
            assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        assert {line["action"] for line in supervisor.fired().values()} == {action}
        if action == Action.EXIT:
            # By process: two threads of one can each have reached a point before either ends it.
            told = {line["pid"] for point, line in supervisor.fired().items() if not point.startswith("stage")}
            assert supervisor.restarts == len(told), "a service ended without being told"
        check(attack, expected)
