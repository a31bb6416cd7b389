"""``dtrain run`` on this machine: the job's output and code, Ctrl-C, kill -9 of any process, and going on.

The scripts are small and train for real where that matters; nothing is simulated.
"""

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from dtrain.standalone.children import leftovers
from tests.cli.commands import DEADLINE_S, DTRAIN, Running, assert_nothing_is_left, dtrain, environment, running

TRAINING = """
import sys, time
import torch
import dtrain

with dtrain.join() as run:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.track(model=model, optimizer=optimizer)
    first = True
    for batch in run.steps([torch.ones(4)] * 10, until=int(sys.argv[1])):
        if first:
            print(f"restored at step {run.step}" if run.restored else "working", flush=True)
        first = False
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
        run.report(loss=0.5)
        time.sleep(0.02)
    print(f"finished at step {run.step}", flush=True)
"""
ENDLESS = "100000"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAINING)
    return tmp_path


def status(folder: Path, job: str = "job") -> dict[str, object]:
    answer = dtrain("status", job, "-o", "json", cwd=folder)
    assert answer.code == 0, answer
    found = json.loads(answer.stdout)
    assert isinstance(found, dict)
    return found


def is_training(folder: Path) -> bool:
    answer = dtrain("status", "job", "-o", "json", cwd=folder)
    return answer.code == 0 and json.loads(answer.stdout)["completed_step"] > 0


def service(folder: Path, verb: str) -> psutil.Process:
    """The process of one service of the run in ``folder``."""
    for process in leftovers(folder / ".dtrain"):
        command = process.cmdline()
        if verb in command[1:4] or (verb == "etcd" and command[0].endswith("etcd")):
            return process
    raise AssertionError(f"no {verb} among {[process.cmdline() for process in leftovers(folder / '.dtrain')]}")


def train(folder: Path, steps: str, *options: str) -> "Running":
    return running("run", "--name", "job", "--every-steps", "20", *options, "train.py", steps, cwd=folder)


def test_every_rank_is_heard_and_the_job_succeeds(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text("import os, sys; print('hello', os.environ['WORLD_SIZE'], sys.argv[1:])\n")
    answer = dtrain("run", "--nproc_per_node", "2", "hello.py", "--flag", "-x", "--", "--name", cwd=tmp_path)
    assert answer.code == 0, answer
    said = "hello 2 ['--flag', '-x', '--', '--name']"
    assert sorted(answer.stdout.splitlines()) == [f"[rank0]: {said}", f"[rank1]: {said}"]
    assert "job succeeded" in answer.stderr
    assert_nothing_is_left(tmp_path)
    kept = dtrain("logs", json.loads(dtrain("list", "-o", "json", cwd=tmp_path).stdout)[0]["job"], cwd=tmp_path)
    assert sorted(kept.stdout.splitlines()) == sorted(answer.stdout.splitlines())


def test_a_program_of_its_own_is_run_without_an_interpreter(tmp_path: Path) -> None:
    (tmp_path / "program").write_text('#!/bin/sh\necho rank $RANK of $WORLD_SIZE: "$@"\n')
    (tmp_path / "program").chmod(0o755)
    answer = dtrain("run", "--no-python", "--nproc-per-node", "2", "./program", "-x", "one", cwd=tmp_path)
    assert answer.code == 0, answer
    assert sorted(answer.stdout.splitlines()) == [f"[rank{rank}]: rank {rank} of 2: -x one" for rank in (0, 1)]


def test_two_nodes_run_as_two_workers(tmp_path: Path) -> None:
    program = "import os; print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'GROUP_RANK')))\n"
    (tmp_path / "hello.py").write_text(program)
    answer = dtrain("run", "--nnodes", "2", "--nproc-per-node", "2", "hello.py", cwd=tmp_path)
    assert answer.code == 0, answer
    expected = ["[rank0]: 0 4 0 0", "[rank1]: 1 4 1 0", "[rank2]: 2 4 0 1", "[rank3]: 3 4 1 1"]
    assert sorted(answer.stdout.splitlines()) == expected


def test_the_exit_code_is_the_jobs(tmp_path: Path) -> None:
    (tmp_path / "seven.py").write_text("import sys; sys.exit(7)\n")
    answer = dtrain("run", "--max-restarts", "1", "seven.py", cwd=tmp_path)
    assert answer.code == 7, answer
    assert "all 1 restarts are used" in answer.stderr
    assert_nothing_is_left(tmp_path)


def test_a_script_that_raises_at_its_start_ends_the_run_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "boom.py").write_text("raise RuntimeError('no such data set')\n")
    answer = dtrain("run", "boom.py", cwd=tmp_path)
    assert answer.code == 1, answer
    last = answer.stderr.splitlines()[-1]
    assert "RuntimeError: no such data set" in last
    assert "Traceback" not in answer.stderr
    assert_nothing_is_left(tmp_path)


def test_an_error_that_comes_again_at_its_step_ends_the_run_with_code_1_and_the_traceback(folder: Path) -> None:
    mistake = "    if run.step == 24:\n            raise ValueError('loss is nan')\n        run.report(loss=0.5)"
    (folder / "train.py").write_text(TRAINING.replace("    run.report(loss=0.5)", mistake))
    answer = dtrain("run", "--name", "job", "--every-steps", "20", "train.py", "100", cwd=folder)
    assert answer.code == 1, answer
    assert "ValueError: loss is nan (2 times in a row after step 24 from" in answer.stderr.splitlines()[-1]
    assert answer.stderr.count(" started: 1 rank") <= 3, "it was started again and again"
    told = [json.loads(line) for line in dtrain("history", "job", "-o", "json", cwd=folder).stdout.splitlines()]
    [given_up] = [event for event in told if event["type"] == "JobFailed"]
    assert given_up["data"]["exit_code"] == 1
    lines = given_up["cause"]["traceback"].strip().splitlines()
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "ValueError: loss is nan")
    assert_nothing_is_left(folder)


def test_the_other_verbs_see_a_run_and_remember_it(folder: Path) -> None:
    with train(folder, ENDLESS) as run:
        run.wait_for_line("checkpoint 1 of step")
        found = status(folder)
        assert found["phase"] == "running" and found["world_size"] == 1
        [rank] = found["ranks"]  # type: ignore[misc]
        assert rank["metrics"] == {"loss": 0.5} and rank["phase"] == "training"
        [worker] = json.loads(dtrain("workers", "-o", "json", cwd=folder).stdout)
        assert worker["slots"] == worker["slots_used"] == 1 and worker["connected"]
        taken = json.loads(dtrain("checkpoint", "job", "-o", "json", cwd=folder).stdout)
        numbers = [
            entry["checkpoint"] for entry in json.loads(dtrain("checkpoints", "job", "-o", "json", cwd=folder).stdout)
        ]
        assert taken["checkpoint"] in numbers
        run.wait_for_line("working")
        assert "[rank0]: working" in dtrain("logs", "job", cwd=folder).stdout
        followers = [
            subprocess.Popen([*DTRAIN, verb, "job", "-f"], cwd=folder, stdout=subprocess.PIPE, env=environment())
            for verb in ("history", "logs")
        ]
        for follower in followers:
            assert follower.stdout is not None and follower.stdout.readline()
        cancelled = dtrain("cancel", "job", cwd=folder)
        assert cancelled.stdout == "job job is cancelled\n"
        assert run.end() == 1
        assert all(follower.communicate(timeout=DEADLINE_S)[0] is not None for follower in followers)
        assert [follower.returncode for follower in followers] == [0, 0], "following ends with the run"
    assert_nothing_is_left(folder)
    assert json.loads(dtrain("list", "-o", "json", cwd=folder).stdout)[0]["phase"] == "cancelled"
    assert dtrain("logs", "job", "--rank", "0", cwd=folder).code == 0
    history = dtrain("history", "job", cwd=folder).stdout
    assert "run 1 submitted" in history and "job cancelled" in history
    assert_nothing_is_left(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind_and_goes_on_where_it_was_saved(
    folder: Path, number: signal.Signals
) -> None:
    with train(folder, ENDLESS) as run:
        run.wait_for_line("checkpoint 2 of step")
        run.process.send_signal(number)
        assert run.end(deadline_s=20) == 128 + number
        assert "run --name job again" in run.stderr
        assert_nothing_is_left(folder)
    assert status(folder)["phase"] == "interrupted"
    saved = status(folder)["committed_step"]
    answer = dtrain("run", "--name", "job", "--every-steps", "20", "train.py", str(int(str(saved)) + 30), cwd=folder)
    assert answer.code == 0, answer
    assert f"run 2 continues from step {saved}" in answer.stderr
    assert f"[rank0]: restored at step {saved}" in answer.stdout
    assert_nothing_is_left(folder)


def test_a_second_ctrl_c_ends_everything_at_once(folder: Path) -> None:
    # A script that ignores SIGTERM would hold an orderly end up.
    (folder / "train.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
        "while True: time.sleep(0.1)\n"
    )
    with train(folder, ENDLESS) as run:
        run.wait_for_line("[rank0]: deaf")
        run.process.send_signal(signal.SIGINT)
        run.wait_for_line("once more to stop at once")
        run.process.send_signal(signal.SIGINT)
        assert run.end(deadline_s=3) == 130
        assert_nothing_is_left(folder, within_s=1)


def test_kill_9_of_the_run_takes_everything_with_it_and_loses_nothing_saved(folder: Path) -> None:
    with train(folder, ENDLESS) as run:
        run.wait_for_line("checkpoint 2 of step")
        run.process.kill()
        run.end()
        # At once: the folder is taken over from what is still leaving.
        answer = dtrain("run", "--name", "job", "--every-steps", "20", "train.py", "200", cwd=folder)
    assert answer.code == 0, answer
    assert "run 2 continues from step" in answer.stderr
    assert "[rank0]: finished at step 200" in answer.stdout
    assert_nothing_is_left(folder, within_s=10)


def test_kill_9_of_the_run_alone_leaves_no_process(folder: Path) -> None:
    with train(folder, ENDLESS) as run:
        run.wait_for_line("checkpoint 1 of step")
        run.process.kill()
        run.end()
        assert_nothing_is_left(folder, within_s=15)


@pytest.mark.parametrize("verb", ["coordinator", "worker", "etcd"])
def test_kill_9_of_a_service_costs_no_training_step(folder: Path, verb: str) -> None:
    with train(folder, "250") as run:
        run.wait_for_line("checkpoint 1 of step")
        service(folder, verb).kill()
        assert run.end() == 0, run.stderr
        assert "starting it again" in run.stderr
        assert "[rank0]: finished at step 250" in run.stdout
        assert "restored" not in run.stdout
        assert run.stderr.count("generation") == 1, run.stderr
        assert_nothing_is_left(folder)


def test_kill_9_of_a_rank_costs_the_steps_since_the_checkpoint(folder: Path) -> None:
    with train(folder, "250", "--nproc-per-node", "2") as run:
        run.wait_for_line("checkpoint 1 of step")
        ranks = status(folder)["ranks"]
        assert isinstance(ranks, list)
        os.kill(ranks[1]["pid"], signal.SIGKILL)
        assert run.end() == 0, run.stderr
        assert "generation 1 failed: rank 1 on worker-0 was ended by signal 9" in run.stderr
        assert "[rank1]: restored at step" in run.stdout
        assert_nothing_is_left(folder)


def test_a_job_of_that_name_that_runs_is_not_disturbed(folder: Path) -> None:
    with train(folder, ENDLESS) as run:
        run.wait_until(lambda: is_training(folder), "training")
        endpoint = json.loads((folder / ".dtrain" / "endpoints.json").read_text())["etcd"]
        answer = dtrain("submit", "--etcd", endpoint, "--name", "job", "train.py", "5", cwd=folder)
        assert answer.code == 2 and "already running" in answer.stderr, answer
        again = dtrain("run", "--name", "other", "train.py", "5", cwd=folder)
        assert again.code == 2 and f"in use by process {run.process.pid}" in again.stderr, again
        assert run.process.poll() is None
