"""kill -9 of the agent at random moments around every step of a generation's life: nothing happens twice."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.proto import agent_pb2 as wire
from tests.support.facts import wait_for
from tests.worker.nodes import Node

KILL_WITHIN_S = 0.25  # a generation is spawned about 0.1 s after its command


def _deaths_around(node: Node, dice: random.Random, say: Callable[[], str], *, deaths: int) -> str:
    """Say the command, kill the agent within a moment, say it again to the next agent; return its last id."""
    for _ in range(deaths):
        say()
        until = time.monotonic() + dice.uniform(0.0, KILL_WITHIN_S)
        wait_for("the moment has come", lambda until=until: time.monotonic() >= until, deadline_s=5)  # type: ignore[misc]
        node.kill()
        node.start()
    return say()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))], ids=lambda seed: f"seed{seed}"
)
def test_no_rank_is_started_twice_and_no_ack_or_exit_is_lost(node: Node, seed: int) -> None:
    dice = random.Random(seed)
    script = node.folder / "once.py"
    script.write_text(
        "import os, sys\n"
        "open(os.path.join(sys.argv[3], 'born'), 'a').write(os.environ['RANK'] + '\\n')\n"
        "from tests.worker.scripts.mailbox_trainer import main\nmain()\n"
    )
    node.start()
    arguments = [str(node.end_file), "0.01", str(node.folder)]

    def start() -> str:
        return node.start_trainers(
            id="start", script=str(script), args=arguments, env={"PYTHONPATH": str(Path(__file__).parents[2])}
        )

    _deaths_around(node, dice, start, deaths=3)
    pids = node.wait_training()
    assert sorted((node.folder / "born").read_text().split()) == ["0", "1"]

    step = max(node.steps().values()) + 200
    stage = wire.StageCheckpoint(checkpoint=1, attempt=1, step=step, store=node.store)
    _deaths_around(node, dice, lambda: node.command(id="stage", stage_checkpoint=stage), deaths=2)
    node.wait("both shards are acknowledged", lambda s: _states(s) == [wire.DURABLE, wire.DURABLE])
    assert node.wait_training() == pids

    stop = wire.StopTrainers(grace_s=5)
    _deaths_around(node, dice, lambda: node.command(id="stop", stop_trainers=stop), deaths=2)
    node.wait_done("stop")
    exits = [(r.exit_code, r.exit_unknown) for a in node.coordinator.snapshots[-1].assignments for r in a.ranks]
    assert exits == [(-15, False), (-15, False)]
    assert sorted((node.folder / "born").read_text().split()) == ["0", "1"]
    assert not list((node.folder / "shm").glob("dtrain-*/*/"))


def _states(snapshot: wire.Snapshot) -> list[int]:
    return [shard.state for assignment in snapshot.assignments for shard in assignment.shards]
