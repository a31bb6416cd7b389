"""A log or a checkpoint that was damaged is named and never trusted; the real etcdctl does the damage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import assert_nothing_is_left, dtrain
from tests.cli.test_run import TRAINING

EVENTS = "/dtrain/jobs/job/events/"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a job ran to its end, with several checkpoints. Tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "train.py").write_text(TRAINING)
    answer = dtrain("run", "--name", "job", "--every-steps", "40", "train.py", "160", cwd=folder)
    assert answer.code == 0, answer
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(finished), str(copy)], check=True)
    return copy


def etcdctl(folder: Path, *arguments: str) -> str:
    answer = dtrain("etcd", *arguments, cwd=folder)
    assert answer.code == 0, answer
    return answer.stdout


def test_etcdctl_shows_the_history_as_json(folder: Path) -> None:
    lines = etcdctl(folder, "get", "--prefix", EVENTS).splitlines()
    keys, events = lines[0::2], [json.loads(line) for line in lines[1::2]]
    assert keys == [f"{EVENTS}{seq:012d}" for seq in range(1, len(events) + 1)]
    assert [events[0]["type"], events[-1]["type"]] == ["JobSubmitted", "JobSucceeded"]
    assert all({"seq", "term", "time", "type", "data", "cause", "prev"} == set(event) for event in events)
    assert_nothing_is_left(folder)


@pytest.mark.parametrize("damage", ["edited", "removed"])
def test_a_damaged_log_is_refused_by_the_name_of_its_key(folder: Path, damage: str) -> None:
    key = f"{EVENTS}{4:012d}"
    if damage == "edited":
        value = etcdctl(folder, "get", "--print-value-only", key).strip()
        etcdctl(folder, "put", key, value.replace('"step":', '"step":1'))
    else:
        etcdctl(folder, "del", key)
    for verb in (["history", "job"], ["checkpoints", "job"], ["list"], ["run", "--name", "job", "train.py", "200"]):
        answer = dtrain(*verb, cwd=folder)
        assert answer.code == 2, answer
        assert "Traceback" not in answer.stderr
        last = answer.stderr.splitlines()[-1]
        assert key in last or f"{EVENTS}{5:012d}" in last, answer.stderr
        assert "[rank0]" not in answer.stdout, "nothing runs on a log that cannot be trusted"
    assert_nothing_is_left(folder)


def test_a_shard_with_one_flipped_bit_is_named_and_the_checkpoint_before_it_is_used(folder: Path) -> None:
    before, newest = json.loads(dtrain("checkpoints", "job", "-o", "json", cwd=folder).stdout)[-2:]
    key = newest["shards"][0]["key"]
    store = Path(json.loads(dtrain("status", "job", "-o", "json", cwd=folder).stdout)["store"].removeprefix("file://"))
    sound = (store / key).read_bytes()
    (store / key).write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        # The same store as before, and not the copy's: a job's checkpoints lie where its log says.
        options = ["--name", "job", "--every-steps", "40", "--store", str(store)]
        answer = dtrain("run", *options, "train.py", "240", cwd=folder)
    finally:
        (store / key).write_bytes(sound)
    assert answer.code == 0, answer
    assert key in answer.stderr
    assert f"[rank0]: restored at step {before['step']}" in answer.stdout
    assert "[rank0]: finished at step 240" in answer.stdout
    listed = json.loads(dtrain("checkpoints", "job", "-o", "json", cwd=folder).stdout)
    assert [entry["quarantined"] is not None for entry in listed if entry["checkpoint"] == newest["checkpoint"]] == [
        True
    ]
    assert_nothing_is_left(folder)


def test_the_module_can_be_run_by_its_name(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "dtrain", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dtrain, version")
