"""kill -9 of a rank: how long until both ranks have done a new step, and where that time goes."""

import itertools
import os
import signal
import time

from contenders import Contender, running

TURNS = 2  # of each side
SETTLED_S = 6.0  # of training before the first kill
BETWEEN_S = 3.0  # of training between two kills: more than a checkpoint takes, and dtrain's next trainers to fork
MOMENTS = ("first line", "imported", "joined", "built", "restored", "step")
DECISION = ("seen", "decided", "appended", "commanded")  # of dtrain only
PARTS = {
    "seen": "detect: the agent has seen the exit",
    "decided": "decide: reported, decided",
    "appended": "append: both events are in etcd",
    "commanded": "command: the worker has it",
    "first line": "spawn: old ranks ended, new ones at the script's first line",
    "imported": "imports",
    "joined": "process group",
    "built": "model, DDP, optimizer",
    "restored": "restore",
    "step": "first step",
}
TOTAL = "total"
Parts = dict[str, float]


def measure(sides: tuple[str, ...], kills: int) -> dict[str, list[Parts]]:
    """Return the parts of each recovery of each side, in seconds, and their sum."""
    found: dict[str, list[Parts]] = {name: [] for name in sides}
    for turn in range(TURNS):
        for name in sides:
            share = kills // TURNS + (turn < kills % TURNS)
            if share:
                with running(name) as it:
                    found[name] += kill_again_and_again(it, share)
    return found


def kill_again_and_again(it: Contender, kills: int) -> list[Parts]:
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
    if it.name == "dtrain":
        _add_decisions(it, found)
    return [_parts(moments) for moments in found]


def _add_decisions(it: Contender, found: list[Parts]) -> None:
    """Put in what dtrain's own logs say of each recovery."""
    decided = [event["time"] for event in it.events() if event["type"] == "GenerationFailed"]
    appended = it.said("coordinator", " GenerationFailed ")
    for number, moments in enumerate(found):
        at = moments["killed"]
        moments["seen"] = min(time for time in it.said("worker-0", " ended: ") if time >= at - 0.001)
        moments["decided"] = decided[number]
        moments["appended"] = appended[number]
        moments["commanded"] = min(time for time in it.said("worker-0", "/start") if time >= appended[number] - 0.001)


def _parts(moments: Parts) -> Parts:
    order = ["killed", *(moment for moment in DECISION if moment in moments), *MOMENTS]
    steps = {later: moments[later] - moments[before] for before, later in itertools.pairwise(order)}
    return {**steps, TOTAL: moments["step"] - moments["killed"]}
