"""A whole agent: the staged bytes outlive its trainers, and go when their job does."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.proto import agent_pb2 as wire
from tests.support.facts import wait_for
from tests.worker.nodes import JOB, Node, alive
from tests.worker.scripts import large_state_trainer

SMALL_BYTES = 4 * 1024 * 1024  # room for mailboxes, not for half of a state


def arena(node: Node) -> Path:
    (root,) = (node.folder / "shm").glob("dtrain-*")
    return root / "arenas" / JOB


def checkpoint(node: Node, number: int, *, generation: int = 1, committed: int = 0) -> None:
    """Have attempt ``number`` staged and stored by both ranks."""
    stage = wire.StageCheckpoint(
        checkpoint=number,
        attempt=number,
        step=max(node.steps().values()) + 50,
        store=node.store,
        committed_attempt=committed,
    )
    node.wait_done(node.command(generation=generation, stage_checkpoint=stage))
    states = {shard.state for a in node.coordinator.snapshots[-1].assignments for shard in a.shards}
    assert states == {wire.DURABLE}


def records(node: Node) -> list[str]:
    return sorted(f"{path.parent.name} {path.name}" for path in arena(node).rglob("*.json"))


def test_the_committed_bytes_outlive_trainers_generations_and_the_agent(node: Node) -> None:
    node.start()
    node.start_trainers()
    before = node.wait_training()
    checkpoint(node, 1)
    kept = {rank: (arena(node) / f"rank{rank}" / "slot0").read_bytes() for rank in (0, 1)}
    assert records(node) == ["rank0 slot0.json", "rank1 slot0.json"]
    os.kill(before[0], 9)
    node.kill()
    node.start()
    node.wait_done(node.start_trainers(generation=2, restore=None))
    node.wait_training()
    checkpoint(node, 2, generation=2, committed=1)
    checkpoint(node, 3, generation=2, committed=1)  # the second was aborted: written over, the first is kept
    assert {rank: (arena(node) / f"rank{rank}" / "slot0").read_bytes() for rank in (0, 1)} == kept
    assert records(node) == ["rank0 slot0.json", "rank0 slot1.json", "rank1 slot0.json", "rank1 slot1.json"]


def test_a_stop_between_two_generations_keeps_the_bytes_and_any_other_stop_does_not(node: Node) -> None:
    node.start()
    node.start_trainers()
    pids = node.wait_training()
    checkpoint(node, 1)
    node.wait_done(node.command(stop_trainers=wire.StopTrainers(grace_s=0, keep_arena=True)))
    assert not any(alive(pid) for pid in pids.values())
    assert len(records(node)) == 2
    node.start_trainers(generation=2)
    node.wait_training()
    node.wait_done(node.command(generation=2, stop_trainers=wire.StopTrainers(grace_s=0)))
    wait_for("the memory is given back", lambda: not list((node.folder / "shm").glob("dtrain-*/*/")), deadline_s=20)


def test_what_a_dead_agent_left_of_jobs_it_does_not_know_is_swept(node: Node) -> None:
    node.start()
    node.start_trainers()
    node.wait_training()
    stranger = arena(node).parent / "stranger" / "rank0"
    in_files = node.folder / "node" / "arenas" / "stranger" / "rank0"
    for folder in (stranger, in_files):
        folder.mkdir(parents=True)
        (folder / "slot0").write_bytes(b"old")
    node.kill()
    node.start()
    node.wait_training()
    assert not stranger.parent.exists() and not in_files.parent.exists()
    assert (arena(node) / "rank0").is_dir()


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A shared memory of SMALL_BYTES. Named before ``node``, so that it goes after all who use it."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "dtrain-test", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    # Lazily: processes that were killed just now may still be giving their memory back.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_too_little_memory_is_in_the_ranks_log_at_the_start_and_checkpoints_are_stored_all_the_same(
    small_memory: Path, node: Node
) -> None:
    node.start(shared_memory=str(small_memory))
    node.start_trainers(script=large_state_trainer.__file__, args=[])
    node.wait_training()
    for rank in (0, 1):
        wait_for("the log says it", lambda rank=rank: "not enough shared memory" in node.log(rank), deadline_s=20)
    text = node.log(0)
    files = node.folder / "node" / "arenas" / JOB
    assert f"has {SMALL_BYTES >> 20} MiB" in text or "has 3 MiB" in text, "what there is"
    assert "for each of 2 ranks on this node need " in text and f"Files in {files} are used instead" in text
    wait_for("the slots are there", lambda: len(list(files.rglob("slot?"))) == 4, deadline_s=20)
    checkpoint(node, 1)
    assert sorted(path.name for path in files.rglob("*.json")) == ["slot2.json", "slot2.json"]
