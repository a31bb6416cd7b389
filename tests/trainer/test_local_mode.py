"""Without a worker: the same script by hand and under torchrun, with checkpoints of its own if a folder is named."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dtrain.common.errors import UserError
from dtrain.storage.local import LocalFolder
from dtrain.storage.verify import verify_checkpoint
from dtrain.trainer.local_mode import LocalStation
from dtrain.trainer.run import Run
from dtrain.trainer.surroundings import read
from tests.trainer.playing_worker import DEADLINE_S, ROOT, clean_environment

SCRIPT = Path(__file__).parent / "ddp_script.py"
DIGITS = ROOT / "examples" / "digits.py"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
    )


def train(results: Path, until: int, **environment: str) -> dict[str, object]:
    results.mkdir(exist_ok=True)
    done = run(str(SCRIPT), str(results), str(until), "0", **environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads((results / "rank0.json").read_text())
    return {**found, "stderr": done.stderr}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_restart_goes_on_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 20)
    assert whole["restored"] is False
    store = {"DTRAIN_LOCAL_STORE": str(tmp_path / "store"), "DTRAIN_LOCAL_EVERY_STEPS": "4", "DTRAIN_JOB": "mine"}
    train(tmp_path / "cut", 10, **store)  # checkpoints at 4, 8 and, being the last step, 10
    keys = [info.key for info in LocalFolder(tmp_path / "store").list("")]
    markers = [key for key in keys if key.endswith("COMMITTED")]
    assert markers == [f"jobs/mine/checkpoints/00000{number}/COMMITTED" for number in (1, 2, 3)]
    assert all(verify_checkpoint(LocalFolder(tmp_path / "store"), key) == [] for key in markers)

    flip_a_bit(tmp_path / "store/jobs/mine/checkpoints/000003/attempt-000003/rank-00000.safetensors")
    resumed = train(tmp_path / "cut", 20, **store)
    assert resumed["restored"] is True
    assert "000003/attempt-000003/rank-00000.safetensors: tensor '_rank.0.dtrain" in str(resumed["stderr"])
    assert resumed["seen"] == whole["seen"][8:]  # type: ignore[index]
    one, other = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "cut"))
    assert all(one[name].equal(other[name]) for name in one)


def test_with_no_whole_checkpoint_it_does_not_begin_again_in_silence(tmp_path: Path) -> None:
    store = {"DTRAIN_LOCAL_STORE": str(tmp_path / "store")}
    train(tmp_path / "results", 2, **store)
    flip_a_bit(tmp_path / "store/jobs/local/checkpoints/000001/attempt-000001/rank-00000.safetensors")
    done = run(str(SCRIPT), str(tmp_path / "results"), "4", "0", **store)
    assert done.returncode == 1
    assert "no checkpoint of job local" in done.stderr and "is whole" in done.stderr


def test_the_example_learns_under_plain_python(tmp_path: Path) -> None:
    done = run(str(DIGITS), "--steps", "120", "--save-final", str(tmp_path / "final.safetensors"))
    assert done.returncode == 0, done.stderr
    share = float(done.stdout.split(": ")[1].split("%")[0])
    assert done.stdout.startswith("step 120: ") and share > 70  # guessing gives 10
    assert "layers.0.weight" in load_file(tmp_path / "final.safetensors")


def test_the_example_runs_and_resumes_under_torchrun(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(DIGITS))
    # torch's store looks names up in reverse; a resolver that drops a question must not cost five seconds.
    settings = {"DTRAIN_LOCAL_STORE": str(tmp_path / "store"), "RES_OPTIONS": "timeout:1 attempts:1"}
    first = run(*torchrun, "--steps", "10", **settings)
    assert first.returncode == 0, first.stderr
    second = run(*torchrun, "--steps", "20", **settings)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("step 20: ")
    manifests = sorted((tmp_path / "store").rglob("manifest.json"))
    found = [json.loads(path.read_text()) for path in manifests]
    assert [(item["step"], item["world_size"], len(item["shards"])) for item in found] == [(10, 2, 2), (20, 2, 2)]


@pytest.fixture
def alone() -> Run:
    """Return the run of a script started by hand, without a process group."""
    here = read({})
    return Run(here, torch.device("cpu"), LocalStation(here, store_uri="", every_steps=0), owns_group=False)


DATA = [1]


def track_then_step(run: Run, loader: list[int]) -> None:
    run.track(x=loader)
    run.steps(DATA, until=1)


def step_then_track(run: Run) -> None:
    run.steps(DATA, until=1)
    run.track(x=DATA)


def track_twice(run: Run) -> None:
    run.track(x=DATA)
    run.track(x=DATA)


MISUSE: dict[str, Callable[[Run], object]] = {
    "run.track(x=...) cannot keep a builtins.object": lambda run: run.track(x=object()),
    "it is not the loader given to run.steps()": lambda run: track_then_step(run, [1]),
    "was called twice: give each object its own name": track_twice,
    "run.steps() was called twice": lambda run: (list(run.steps(DATA, until=1)), run.steps(DATA, until=2)),
    "track everything before the steps begin": step_then_track,
    "until=-1": lambda run: run.steps(DATA, until=-1),
    "gave no batch": lambda run: list(run.steps(list[int](), until=1)),
    "give a number or a short text": lambda run: run.report(loss=[]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("says", MISUSE)
def test_misuse_is_one_clear_sentence(says: str, alone: Run) -> None:
    with pytest.raises(UserError) as caught:
        MISUSE[says](alone)
    assert says in str(caught.value)


def test_a_step_left_by_break_is_not_completed(alone: Run) -> None:
    for batch in alone.steps([10, 20, 30], until=3):
        if batch == 20:
            break
    assert alone.step == 1


def test_importing_dtrain_does_not_import_torch() -> None:
    done = run("-c", "import sys, dtrain; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0
