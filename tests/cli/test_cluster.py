"""The verbs on a cluster whose parts were started one by one, as in production."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.cli.commands import DTRAIN, Running, dtrain, environment
from tests.support.etcd_server import etcd_server, etcdctl_binary
from tests.support.facts import wait_for

STOP_S = 20.0  # a worker gives its ranks 5 s


@contextmanager
def serving(cwd: Path, name: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A service in the foreground, ended in order; its log is NAME.log."""
    with (cwd / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*DTRAIN, *arguments], cwd=cwd, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder with scripts, and the endpoint of a cluster with two coordinators and one worker of two slots."""
    (tmp_path / "hello.py").write_text("import os; print('hello', os.environ['RANK'], os.environ.get('COLOUR'))\n")
    (tmp_path / "wait.py").write_text("import time\nprint('waiting', flush=True)\nwhile True: time.sleep(0.1)\n")
    with ExitStack() as stack:
        etcd = stack.enter_context(etcd_server(tmp_path / "etcd"))
        endpoint = etcd.endpoint
        for name in ("coordinator-a", "coordinator-b"):
            stack.enter_context(serving(tmp_path, name, "coordinator", "--etcd", endpoint, "--identity", name))
        worker = ("worker", "--etcd", endpoint, "--worker-id", "node-1", "--slots", "2", "--data-dir", "node-1")
        stack.enter_context(serving(tmp_path, "worker", *worker))
        yield tmp_path, endpoint


def ask(cluster: tuple[Path, str], verb: str, *arguments: str) -> object:
    """What a verb answers as JSON."""
    answer = dtrain(verb, "--etcd", cluster[1], "-o", "json", *arguments, cwd=cluster[0])
    assert answer.code == 0, answer
    return json.loads(answer.stdout)


def test_a_job_runs_on_a_cluster_and_its_output_and_code_come_back(cluster: tuple[Path, str]) -> None:
    folder, endpoint = cluster
    options = ["--name", "hello", "--nproc-per-node", "2", "--env", "COLOUR=blue"]
    answer = dtrain("run", "--etcd", endpoint, *options, "hello.py", cwd=folder)
    assert answer.code == 0, answer
    assert sorted(answer.stdout.splitlines()) == ["[rank0]: hello 0 blue", "[rank1]: hello 1 blue"]
    assert not (folder / ".dtrain").exists(), "a run on a cluster leaves nothing on this machine"
    logs = dtrain("logs", "--etcd", endpoint, "hello", "--rank", "1", cwd=folder)
    assert logs.stdout == "[rank1]: hello 1 blue\n"
    assert "without --store nothing is saved" in answer.stderr
    followed = dtrain("logs", "--etcd", endpoint, "hello", "--follow", cwd=folder)  # it ended: so does this
    assert sorted(followed.stdout.splitlines()) == ["[rank0]: hello 0 blue", "[rank1]: hello 1 blue"]
    nobody = dtrain("logs", "--etcd", endpoint, "hello", "--rank", "7", cwd=folder)
    assert (nobody.code, nobody.stderr) == (2, "dtrain: job hello never had a rank 7: give --rank 0 to 1.\n")


def test_ctrl_c_leaves_a_clusters_job_running(cluster: tuple[Path, str]) -> None:
    folder, endpoint = cluster
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(
            [*DTRAIN, "run", "--etcd", endpoint, "--name", "wait", "wait.py"],
            cwd=folder,
            env=environment(),
            stdout=out,
            stderr=out,
        )
    try:
        (folder / "run.out").symlink_to("out")
        (folder / "run.err").symlink_to("out")
        Running(process, folder).wait_for_line("[rank0]: waiting")
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S) == 130
    finally:
        process.kill()
        process.wait()
    assert "dtrain cancel wait" in (folder / "out").read_text()
    status = ask(cluster, "status", "wait")
    assert isinstance(status, dict) and status["phase"] == "running"
    answer = dtrain("cancel", "--etcd", endpoint, "wait", cwd=folder)
    assert answer.stdout == "job wait is cancelled\n"


def test_a_submission_returns_at_once_and_is_seen_by_all_verbs(cluster: tuple[Path, str]) -> None:
    folder, endpoint = cluster
    assert ask(cluster, "submit", "--name", "later", "wait.py") == {"job": "later", "run": 1, "resumes_step": 0}
    again = dtrain("submit", "--etcd", endpoint, "--name", "later", "wait.py", cwd=folder)
    assert again.code == 2 and "already running" in again.stderr and "dtrain cancel later" in again.stderr
    jobs = ask(cluster, "list")
    assert isinstance(jobs, list) and [job["job"] for job in jobs] == ["later"]
    workers = ask(cluster, "workers")
    assert isinstance(workers, list) and [worker["worker"] for worker in workers] == ["node-1"]
    assert dtrain("cancel", "--etcd", endpoint, "later", cwd=folder).code == 0
    nobody = dtrain("status", "--etcd", endpoint, "nobody", cwd=folder)
    assert nobody.code == 2 and "no job named 'nobody'" in nobody.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nproc-per-node", "3"], ["nproc-per-node 3", "2 at most", "--slots"]),
        (["--every-steps", "5"], ["checkpoints need a store", "--store"]),
        (["--store", "/dev/null/inside"], ["/dev/null/inside"]),
        (["--store", "s3://bucket/x?endpoint=http://127.0.0.1:9"], ["127.0.0.1:9"]),
    ],
)
def test_what_a_cluster_cannot_do_is_refused_in_one_line(
    cluster: tuple[Path, str], options: list[str], words: list[str]
) -> None:
    folder, endpoint = cluster
    dtrain("run", "--etcd", endpoint, "hello.py", cwd=folder)  # the worker is there now
    answer = dtrain(
        *("submit", "--etcd", endpoint, *options, "hello.py"),
        cwd=folder,
        AWS_ACCESS_KEY_ID="nobody",
        AWS_SECRET_ACCESS_KEY="nothing",
    )
    assert answer.code == 2, answer
    [line] = answer.stderr.splitlines()
    assert all(word in line for word in words), line


def test_a_standby_takes_over_when_the_leader_is_killed(cluster: tuple[Path, str]) -> None:
    folder, endpoint = cluster
    ask(cluster, "submit", "--name", "wait", "wait.py")

    def leader() -> dict[str, object]:
        words = [str(etcdctl_binary()), f"--endpoints={endpoint}", "get", "--print-value-only", "/dtrain/leader"]
        shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30, env=environment())
        found = json.loads(shown.stdout)
        assert isinstance(found, dict)
        return found

    def begun() -> bool:
        status = ask(cluster, "status", "wait")
        return isinstance(status, dict) and status["generation"] == 1

    wait_for("it has begun", begun, deadline_s=60.0)
    before = leader()
    process = before["process"]
    assert isinstance(process, dict)
    os.kill(int(process["pid"]), signal.SIGKILL)
    status = ask(cluster, "status", "wait")  # waits for the next leader
    assert isinstance(status, dict) and status["generation"] == 1
    assert leader()["id"] != before["id"]
    assert dtrain("cancel", "--etcd", endpoint, "wait", cwd=folder).code == 0


def test_a_worker_whose_name_another_takes_leaves_with_a_code_by_which_nothing_starts_it_again(
    cluster: tuple[Path, str],
) -> None:
    folder, endpoint = cluster
    twin = ("worker", "--etcd", endpoint, "--worker-id", "twin", "--no-zygote", "--data-dir")

    def connected() -> bool:
        workers = ask(cluster, "workers")
        assert isinstance(workers, list)
        return any(worker["worker"] == "twin" and worker["connected"] for worker in workers)

    with serving(folder, "first", *twin, "first") as first:
        wait_for("the first is there", connected, deadline_s=60.0)
        with serving(folder, "second", *twin, "second") as second:
            assert first.wait(60.0) == 3
            assert "give each node its own --worker-id" in (folder / "first.log").read_text()
            assert second.poll() is None
