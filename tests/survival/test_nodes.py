"""Nodes that go and come: a spare takes over, a job shrinks to what is left, a standby coordinator leads."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from dtrain.coordinator.core.events import GenerationStarted, MembersFinished
from dtrain.coordinator.core.hearing import GAP_S
from dtrain.coordinator.core.observed import UNSEEN_LOST_AFTER_S
from tests.support.cluster import Cluster, cluster
from tests.support.facts import wait_for
from tests.support.processes import free_shared_memory
from tests.survival.conftest import EVERY, SCRIPT, STEPS, Attack, begin, check, hurry_file

UNEVEN = """
import os, pathlib, sys, time

while os.environ["RANK"] == "0" and not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.02)
"""


def begin_on_nodes(it: Cluster, rng: random.Random, nnodes: str) -> Attack:
    """One rank a node."""
    records = it.folder / "records"
    records.mkdir()
    store = f"file://{it.folder}/store"
    options = ("--name", "attacked", "--nnodes", nnodes, "--nproc-per-node", "1")
    options += ("--every-steps", str(EVERY), "--store", store)
    final = it.folder / "final.safetensors"
    args = ("--steps", str(STEPS), "--records", str(records), "--final", str(final))
    it.submit(SCRIPT, *args, "--hurry", str(hurry_file(it, "attacked")), options=options)
    return Attack(it, "attacked", records, final, store, rng)


def lose_node(attack: Attack, rank: int) -> str:
    """The node of this rank is gone at once: its agent and its trainers are killed and do not come back."""
    event = attack.started()[-1].event
    assert isinstance(event, GenerationStarted)
    worker = event.members[rank].worker
    service = attack.cluster.workers.pop(int(worker.removeprefix("w")))
    service.kill()
    os.kill(attack.steps(rank)[-1]["pid"], signal.SIGKILL)
    return worker


def outlive(it: Cluster, job: str) -> None:
    """Rank 1 has ended well; its node goes for good, and so does the leader. Then rank 0 may end."""
    script, go_on = it.folder / "uneven.py", it.folder / "go-on"
    script.write_text(UNEVEN)
    it.submit(script, str(go_on), options=("--name", job, "--nnodes", "2", "--nproc-per-node", "1"))
    (finished,) = it.wait_for_event(job, "MembersFinished")
    assert isinstance(finished.event, MembersFinished)
    (worker,) = finished.event.workers
    service = it.workers.pop(int(worker.removeprefix("w")))
    assert service.terminate() == 0
    it.coordinators[0].kill()
    it.coordinators[0].start()
    log = it.coordinators[0].log
    wait_for("its successor to lead", lambda: log.read_text().count("leading in term") >= 2, deadline_s=30)
    heard_s = time.monotonic()
    enough_s = UNSEEN_LOST_AFTER_S + GAP_S + 1.0  # rank 0's worker is heard all the while
    wait_for("whoever it never saw to be lost", lambda: time.monotonic() > heard_s + enough_s, deadline_s=30)
    go_on.touch()


def test_a_spare_node_takes_over(tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster", workers=3, slots=1) as it:
        attack = begin_on_nodes(it, rng, "2")
        it.wait_for_event(attack.job, "CheckpointCommitted", count=1)
        lost = lose_node(attack, rng.randrange(2))
        attack.hurry()
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)
        last = attack.started()[-1].event
        assert isinstance(last, GenerationStarted)
        assert lost not in [member.worker for member in last.members]
        free_shared_memory(it.folder)  # a killed node cannot tidy up after itself


def test_a_job_shrinks_to_the_nodes_that_are_left(tmp_path: Path, rng: random.Random) -> None:
    with cluster(tmp_path / "cluster", workers=2, slots=1) as it:
        attack = begin_on_nodes(it, rng, "1:2")
        it.wait_for_event(attack.job, "CheckpointCommitted", count=1)
        lose_node(attack, 1)
        attack.hurry()
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        sizes = [e.event.world_size for e in attack.started() if isinstance(e.event, GenerationStarted)]
        assert sizes[0] == 2
        assert sizes[-1] == 1
        assert attack.steps(0)[-1]["step"] == STEPS
        free_shared_memory(it.folder)


def test_a_node_whose_ranks_have_ended_may_go_and_the_leader_too(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster", workers=2, slots=1) as it:
        outlive(it, "uneven")
        assert it.wait_for_end("uneven").type == "JobSucceeded", it.logs()
        assert [event.type for event in it.history("uneven")].count("GenerationStarted") == 1


def test_a_standby_coordinator_takes_over_and_nothing_is_restarted(
    tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster", coordinators=2) as it:
        attack = begin(it, rng)
        it.wait_for_event(attack.job, "CheckpointStarted")
        leader = next(c for c in it.coordinators if "leading in term" in c.log.read_text())
        leader.kill()
        it.coordinators.remove(leader)
        (standby,) = it.coordinators
        wait_for("the standby to lead", lambda: "leading in term" in standby.log.read_text(), deadline_s=20)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)
        assert len(attack.started()) == 1
        terms = [event.term for event in it.history(attack.job)]
        assert terms == sorted(terms)
        assert len(set(terms)) == 2, "the standby decided nothing"


def test_a_paused_leader_that_comes_back_changes_nothing(
    tmp_path: Path, rng: random.Random, quiet: Callable[[int], bytes]
) -> None:
    expected = quiet(STEPS)
    with cluster(tmp_path / "cluster", coordinators=2) as it:
        attack = begin(it, rng)
        it.wait_for_event(attack.job, "CheckpointStarted")
        leader = next(c for c in it.coordinators if "leading in term" in c.log.read_text())
        standby = next(c for c in it.coordinators if c is not leader)
        os.kill(leader.pid, signal.SIGSTOP)
        wait_for("the standby to lead", lambda: "leading in term" in standby.log.read_text(), deadline_s=30)
        os.kill(leader.pid, signal.SIGCONT)
        assert it.wait_for_end(attack.job).type == "JobSucceeded", it.logs()
        check(attack, expected)
        assert len(attack.started()) == 1
