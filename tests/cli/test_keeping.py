"""Which checkpoints are kept, pinned and let go, and whether storage still has them, asked on the command line."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli.job_specs import Asked, build_spec
from dtrain.common.specs import RetentionPolicy
from tests.cli.commands import Answer, assert_nothing_is_left, dtrain, running
from tests.cli.test_run import ENDLESS, TRAINING

KEEPING = ("--every-steps", "40", "--keep-last", "2")


def listed(folder: Path) -> list[dict[str, Any]]:
    answer = dtrain("checkpoints", "job", "-o", "json", cwd=folder)
    assert answer.code == 0, answer
    found: list[dict[str, Any]] = json.loads(answer.stdout)
    return found


def states(folder: Path) -> dict[int, str]:
    return {entry["checkpoint"]: entry["state"] for entry in listed(folder)}


def history(folder: Path) -> list[str]:
    return dtrain("history", "job", cwd=folder).stdout.splitlines()


def flip_one_bit(folder: Path, key: str) -> None:
    path = folder / ".dtrain" / "store" / key
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAINING)
    return tmp_path


def takes(folder: Path) -> int:
    """Take a checkpoint now; its number."""
    answer = dtrain("checkpoint", "job", "-o", "json", cwd=folder)
    assert answer.code == 0, answer
    return int(json.loads(answer.stdout)["checkpoint"])


def test_a_pin_keeps_a_checkpoint_and_damage_that_is_found_takes_one_out_of_use(folder: Path) -> None:
    options = ("--every-steps", "0", "--keep-last", "2")
    with running("run", "--name", "job", *options, "train.py", ENDLESS, cwd=folder) as run:
        run.wait_for_line("working")
        run.wait_until(lambda: dtrain("checkpoint", "job", cwd=folder).code == 0, "a first checkpoint")
        second = takes(folder)
        assert states(folder) == {1: "kept", second: "kept"}
        assert dtrain("pin", "job", str(second), cwd=folder).code == 0
        third, fourth = takes(folder), takes(folder)
        run.wait_until(lambda: 1 not in states(folder), "the deletion of the first")
        assert states(folder) == {second: "pinned", third: "kept", fourth: "kept"}

        key = listed(folder)[0]["shards"][0]["key"]
        flip_one_bit(folder, key)
        answer = dtrain("verify", "job", "--deep", cwd=folder)
        assert answer.code == 1, answer
        assert f"damaged: {key}: " in answer.stdout and "never restored from again" in answer.stdout
        assert states(folder)[second] == "quarantined"
        assert any(f"checkpoint {second} will not be used again: {key}" in line for line in history(folder))
        assert dtrain("verify", "job", "--deep", cwd=folder).code == 0, "what is out of use is not looked at again"

        assert dtrain("unpin", "job", str(second), cwd=folder).code == 0
        run.wait_until(lambda: second not in states(folder), "the deletion of what was let go")
        assert not (folder / ".dtrain" / "store" / key).exists()
        refused = dtrain("pin", "job", "1", cwd=folder)
        assert refused.code == 2 and "no checkpoint 1" in refused.stderr
        assert dtrain("cancel", "job", cwd=folder).code == 0
        run.end()
    assert_nothing_is_left(folder)


def verified(folder: Path, *options: str) -> tuple[Answer, dict[int, dict[str, Any]]]:
    answer = dtrain("verify", "job", "-o", "json", *options, cwd=folder)
    return answer, {entry["checkpoint"]: entry for entry in json.loads(answer.stdout)}


def test_a_folder_where_nothing_runs_is_verified_as_well(folder: Path) -> None:
    answer = dtrain("run", "--name", "job", *KEEPING, "train.py", "130", cwd=folder)
    assert answer.code == 0, answer
    store = folder / ".dtrain" / "store"
    for options in ((), ("--deep",)):
        answer, found = verified(folder, *options)
        assert answer.code == 0 and len(found) == 2
        assert all(entry["sound"] and entry["damage"] == [] for entry in found.values())
    older, newest = sorted(found)
    shard = next(entry for entry in listed(folder) if entry["checkpoint"] == newest)["shards"][0]["key"]

    flip_one_bit(folder, shard)
    answer, found = verified(folder)
    assert answer.code == 0, "sizes tell nothing of a flipped bit"
    answer, found = verified(folder, "--deep")
    assert answer.code == 1
    assert [entry["sound"] for _, entry in sorted(found.items())] == [True, False]
    assert [damage["key"] for damage in found[newest]["damage"]] == [shard]
    assert not found[newest]["recorded"], "nobody leads here who could write it down"
    words = dtrain("verify", "job", "--deep", cwd=folder)
    assert words.code == 1 and "no coordinator runs here" in words.stdout
    flip_one_bit(folder, shard)  # and back

    (store / shard).rename(folder / "aside")
    answer, found = verified(folder)
    assert answer.code == 1 and found[newest]["damage"] == [{"key": shard, "why": "is missing"}]
    (folder / "aside").rename(store / shard)

    marker = next(path for path in store.glob(f"jobs/job/checkpoints/{older:06d}/COMMITTED"))
    marker.unlink()
    answer, found = verified(folder)
    assert answer.code == 1 and [damage["why"] for damage in found[older]["damage"]] == ["is missing"]
    assert_nothing_is_left(folder)


def test_a_store_that_is_not_there_condemns_nothing(folder: Path) -> None:
    answer = dtrain("run", "--name", "job", *KEEPING, "train.py", "50", cwd=folder)
    assert answer.code == 0, answer
    subprocess.run(["mv", str(folder / ".dtrain" / "store" / "jobs"), str(folder / "elsewhere")], check=True)
    answer = dtrain("verify", "job", "--deep", cwd=folder)
    assert answer.code == 2, answer
    [line] = answer.stderr.splitlines()
    assert "shows nothing of job 'job'" in line
    assert answer.stdout == ""


def asked(script: Path, **changes: Any) -> Asked:
    given: dict[str, Any] = {
        "script": str(script), "args": (), "name": "job", "nnodes": "1", "nproc_per_node": "1", "max_restarts": 0,
        "restart_window": 0.0,
        "store": None, "every_steps": None, "every_seconds": None, "env": (), "python": "python",
        "keep_last": 0, "keep_every_steps": 0, "keep_every_seconds": 0.0,
    }  # fmt: skip
    return Asked(**{**given, **changes})


def test_the_keep_options_become_the_jobs_policy(folder: Path) -> None:
    spec = build_spec(
        asked(folder / "train.py", keep_last=3, keep_every_steps=100, keep_every_seconds=60.0), default_store="/s"
    )
    assert spec.retention == RetentionPolicy(keep_last=3, keep_every_steps=100, keep_every_seconds=60.0)
    assert build_spec(asked(folder / "train.py"), default_store="").retention == RetentionPolicy()


@pytest.mark.parametrize(
    "options",
    [
        ("--keep-every-steps", "5"),
        ("--keep-every-seconds", "5"),
        ("--keep-last", "-1"),
        ("--keep-last", "1000000"),
        ("--keep-last", "1", "--keep-every-seconds", "nan"),
        ("--keep-last", "1", "--keep-every-seconds", "-1"),
        ("--keep-last", "1", "--keep-every-seconds", "1e-9"),
    ],
    ids=" ".join,
)
def test_a_policy_that_cannot_be_meant_is_refused_in_one_line(folder: Path, options: tuple[str, ...]) -> None:
    answer = dtrain("run", *options, "train.py", "1", cwd=folder)
    assert answer.code == 2, answer
    [line] = answer.stderr.splitlines()
    assert "keep-" in line
    assert not (folder / ".dtrain").exists()
