"""Without a worker: the same script by hand and under torchrun, with checkpoints of its own if a folder is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dtrain.storage.local import LocalFolder
from dtrain.storage.verify import verify_checkpoint
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
    assert "000003/attempt-000003/rank-00000.safetensors: has digest" in str(resumed["stderr"])
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
    done = run(str(DIGITS), "--steps", "60", "--save-final", str(tmp_path / "final.safetensors"))
    assert done.returncode == 0, done.stderr
    share = float(done.stdout.split(": ")[1].split("%")[0])
    assert done.stdout.startswith("step 60: ") and share > 60  # guessing gives 10
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


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("run.track(x=object())", "run.track(x=...) cannot keep a builtins.object"),
        ("run.track(x=[1]); list(run.steps([1], until=1))", "it is not the loader given to run.steps()"),
        ("run.track(x=[1]); run.track(x=[1])", "was called twice"),
        ("list(run.steps([1], until=1)); run.steps([1], until=2)", "run.steps() was called twice"),
        ("list(run.steps([1], until=1)); run.track(x=[1])", "track everything before the steps begin"),
        ("run.steps([1], until=-1)", "until=-1"),
        ("list(run.steps([], until=1))", "gave no batch"),
        ("run.report(loss=object())", "give a number or a short text"),
    ],
)
def test_misuse_is_one_clear_sentence(body: str, says: str, tmp_path: Path) -> None:
    done = run("-c", f"import dtrain\nwith dtrain.join() as run:\n    {body}")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("dtrain.common.errors.UserError: ")
    assert says in done.stderr


def test_importing_dtrain_does_not_import_torch() -> None:
    done = run("-c", "import sys, dtrain; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0
