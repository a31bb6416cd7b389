"""What cannot be done is said in one line with the mend, with exit code 2, and costs nothing."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.cli import main
from dtrain.standalone.data_folder import DataFolder, lock_folder
from tests.cli.commands import Answer, assert_nothing_is_left, dtrain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text("print('ran')\n")
    (tmp_path / "a-file").write_text("not a folder\n")
    return tmp_path


def assert_refused(answer: Answer, *words: str) -> None:
    assert answer.code == 2, answer
    lines = answer.stderr.splitlines()
    assert len(lines) == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "missing.py"], ["missing.py not found", "give the path"]),
        (["run"], ["SCRIPT.py", "--help"]),
        (["run", "--bogus", "script.py"], ["--bogus", "--help"]),
        (["run", "--upload-mib-per-s", "0.5", "script.py"], ["--upload-mib-per-s", "0.5", "x>=1.0"]),
        (["run", "--nnodes", "0", "script.py"], ["nnodes 0", "--nnodes 1:4"]),
        (["run", "--nnodes", "4:1", "script.py"], ["nnodes 4:1", "--nnodes 1:4"]),
        (["run", "--nnodes", "two", "script.py"], ["nnodes two", "--nnodes 1:4"]),
        (["run", "--nproc-per-node", "0", "script.py"], ["nproc-per-node 0", "1 or more"]),
        (["run", "--nproc_per_node", "many", "script.py"], ["nproc-per-node many", "auto"]),
        (["run", "--max-restarts", "-1", "script.py"], ["max-restarts -1", "0 or more"]),
        (["run", "--restart-window", "-1", "script.py"], ["restart-window -1", "0 for the whole run"]),
        (["run", "--restart-window", "inf", "script.py"], ["restart-window inf", "0 for the whole run"]),
        (["run", "--nproc-per-node", "2", "--slots", "1", "script.py"], ["slots (1)", "--slots"]),
        (["run", "--name", "../up", "script.py"], ["'../up' is not valid", "lower-case"]),
        (["run", "--name", "", "script.py"], ["is not valid", "lower-case"]),
        (["run", "--every-steps", "5", "--every-seconds", "5", "script.py"], ["not both"]),
        (["run", "--every-steps", "-5", "script.py"], ["--every-steps -5", "above 0"]),
        (["run", "--python", "/no/such/python", "script.py"], ["/no/such/python not found", "--python"]),
        (["run", "--no-python", "script.py"], ["script.py not found", "chmod +x"]),
        (["run", "--env", "1X=2", "script.py"], ["'1X=2'", "NAME=VALUE"]),
        (["run", "--env", "NOT_SET_ANYWHERE", "script.py"], ["NOT_SET_ANYWHERE is not set", "=VALUE"]),
        (["run", "--store", "ftp://somewhere", "script.py"], ["ftp://somewhere", "s3://"]),
        (["run", "--store", "a-file", "script.py"], ["a-file", "name another folder"]),
        (["run", "--data-dir", "a-file/inside", "script.py"], ["a-file/inside", "--data-dir"]),
        (["run", "--etcd", "nonsense", "script.py"], ["'nonsense'", "HOST:PORT"]),
        (["run", "--etcd", "http://host:port/x", "script.py"], ["HOST:PORT"]),
        (["submit", "script.py"], ["--etcd"]),
        (["list"], ["nothing has run", "--etcd", "--data-dir"]),
        (["history", "job"], ["nothing has run", "--data-dir"]),
        (["history", "../job"], ["'../job' is not valid"]),
        (["workers"], ["no run is active", "--etcd"]),
        (["cancel", "job"], ["no run is active", "--etcd"]),
        (["etcd"], ["nothing has run", "--data-dir"]),
        (["nonsense"], ["nonsense", "--help"]),
    ],
)
def test_bad_input_is_refused_in_one_line_with_the_mend(folder: Path, arguments: list[str], words: list[str]) -> None:
    assert_refused(dtrain(*arguments, cwd=folder), *words)
    assert_nothing_is_left(folder)


def test_without_a_verb_the_verbs_are_shown(folder: Path) -> None:
    answer = dtrain(cwd=folder)
    assert answer.code == 2
    assert "\nCommands:\n  run " in answer.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(FileExistsError(errno.EEXIST, "File exists", "a/b"), 2), (OSError(errno.EIO, "Input/output error", "a/b"), 1)],
    ids=["a person's", "the machine's"],
)
def test_what_cannot_be_opened_is_named_in_one_line(
    error: OSError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(main.dtrain, "main", fails)
    monkeypatch.delenv("DTRAIN_TRACEBACK", raising=False)
    assert main.main(["list"]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"dtrain: a/b: {error.strerror}") and said.count("\n") == 1


@pytest.mark.parametrize(
    "verb",
    [
        ["run", "script.py"],
        ["submit", "script.py"],
        ["list"],
        ["history", "job"],
        ["coordinator", "--etcd-wait", "0"],
        ["worker", "--etcd-wait", "0", "--data-dir", "worker"],
    ],
    ids=lambda verb: verb[0],
)
def test_an_etcd_that_is_not_there_is_named(folder: Path, verb: list[str], free_port: int) -> None:
    answer = dtrain(*verb[:1], "--etcd", f"127.0.0.1:{free_port}", *verb[1:], cwd=folder)
    assert_refused(answer, f"127.0.0.1:{free_port}", "--etcd")


def test_an_address_where_something_else_listens_is_named(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert_refused(dtrain("list", "--etcd", f"127.0.0.1:{port}", cwd=folder), f"127.0.0.1:{port}", "2379")


def test_a_data_folder_in_use_is_refused_by_the_pid_of_its_user(folder: Path) -> None:
    lock = lock_folder(DataFolder.at(folder / ".dtrain"))
    try:
        assert_refused(dtrain("run", "script.py", cwd=folder), f"in use by process {os.getpid()}", "--data-dir")
    finally:
        lock.release()


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port where nothing listens: bound, so that nobody else takes it, and not listening."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
