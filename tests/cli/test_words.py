"""What the command line makes of options, events, statuses and logs, without any process."""

import asyncio
import dataclasses
import enum
import types
import typing
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dtrain.cli.clients import parse_endpoints
from dtrain.cli.event_words import describe, describe_cause
from dtrain.cli.following import Follower
from dtrain.cli.job_specs import default_name, parse_env, parse_nnodes, parse_nproc
from dtrain.cli.log_streams import LINE_MAX_BYTES, LineJoiner
from dtrain.cli.output import job_view, print_job, words_of_bytes
from dtrain.cli.progress import progress_words, with_rank
from dtrain.cli.services import _serving, default_worker_id
from dtrain.common.errors import UserError
from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName, job_name, worker_id
from dtrain.common.specs import JobSpec
from dtrain.coordinator.core.events import Cause, CheckpointAborted, CheckpointCommitted, Event, JobSucceeded
from dtrain.proto import agent_pb2 as wire


def made_up(kind: type) -> object:
    """An instance of an event type with plausible values."""
    values: dict[str, object] = {}
    for name, hint in typing.get_type_hints(kind).items():
        origin = typing.get_origin(hint)
        plain = getattr(hint, "__supertype__", hint)
        if name == "spec":
            values[name] = JobSpec(name=job_name("job"), python="python", script="/train.py")
        elif origin is tuple:
            values[name] = ()
        elif origin in (typing.Union, types.UnionType):
            values[name] = None
        else:
            values[name] = (
                next(iter(plain)) if issubclass(plain, enum.Enum) else plain(7) if plain is not str else "words"
            )
    return kind(**values)


@pytest.mark.parametrize("kind", typing.get_args(Event), ids=lambda kind: str(kind.__name__))
def test_every_event_is_told_in_one_line(kind: type) -> None:
    event = made_up(kind)
    assert dataclasses.is_dataclass(event)
    words = describe(event)  # type: ignore[arg-type]  # built from the very union
    assert words and "\n" not in words and not words.endswith(".")


def test_a_cause_names_the_fact_and_where_it_was_seen() -> None:
    cause = Cause(fact="trainer_exited", worker="node-1", snapshot=7, detail="ValueError: no")
    assert describe_cause(cause) == "trainer exited, seen in snapshot 7 of node-1, ValueError: no"


def test_a_failure_is_told_with_its_victims_and_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    job = wire.JobStatus(job="job", phase="running")
    assert job_view(job)["last_failure"] is None
    failure = wire.Failure(generation=2, reason="rank 3 on b raised", kind="script", traceback="Traceback\n  x\nE: y\n")
    failure.victims.add(rank=0, worker="a", exit_code=1, error="lost")
    job.last_failure.CopyFrom(failure)
    view = job_view(job)["last_failure"]
    assert isinstance(view, dict)
    assert (view["generation"], view["kind"], view["traceback"]) == (2, "script", "Traceback\n  x\nE: y\n")
    assert view["victims"] == [{"rank": 0, "worker": "a", "exit_code": 1, "error": "lost"}]
    print_job(job)
    shown = capsys.readouterr().out
    assert "generation 2: rank 3 on b raised; its victims: rank 0 on a\n" in shown
    assert shown.endswith("\n\n    Traceback\n      x\n    E: y\n")


@pytest.mark.parametrize(("text", "expected"), [("1", (1, 1)), ("4", (4, 4)), ("1:4", (1, 4)), ("2:2", (2, 2))])
def test_nnodes_are_a_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert parse_nnodes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0:1", "4:1", "-1", "1:", ":2", "1:2:3", "x", "1.5"])
def test_other_nnodes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--nnodes 1:4"):
        parse_nnodes(text)


def test_nproc_is_a_number_or_counts_this_machine() -> None:
    assert parse_nproc("3") == 3
    assert parse_nproc("cpu") >= 1


def test_env_sets_hands_on_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDED_ON", "yes")
    assert parse_env(("A=1", "B=", "C=x=y", "HANDED_ON")) == {"A": "1", "B": "", "C": "x=y", "HANDED_ON": "yes"}
    with pytest.raises(UserError, match="NAME=VALUE"):
        parse_env(("=1",))


@pytest.mark.parametrize("stem", ["train", "Train_GPT-2", "...", "x" * 200, "ÄÖ"])
def test_a_default_name_is_valid_and_differs_each_time(stem: str) -> None:
    first, second = default_name(stem), default_name(stem)
    assert first == job_name(first) and first != second


@pytest.mark.parametrize("host", ["node-1", "Node_1.Example.COM", "-x-", "___", "a b"])
def test_a_hosts_name_becomes_a_worker_id(host: str) -> None:
    assert worker_id(default_worker_id(host))


def test_endpoints_are_hosts_with_ports() -> None:
    assert parse_endpoints("a:1, http://b:2/,[::1]:3") == ("a:1", "b:2", "[::1]:3")
    for text in ("", "a", "a:0", "a:99999", "a:b", ":1", "https://a:1/x"):
        with pytest.raises(UserError, match="HOST:PORT"):
            parse_endpoints(text)


def test_chunks_become_whole_lines_of_each_log() -> None:
    joiner = LineJoiner()
    assert list(joiner.feed(1, 0, b"on")) == []
    assert list(joiner.feed(1, 1, b"other\n")) == ["other"]
    assert list(joiner.feed(1, 0, b"e\ntwo\nthr")) == ["one", "two"]
    assert list(joiner.feed(1, 0, b"ee\r\n10%\r20%\r\n\xff\n")) == ["three", "20%", "\ufffd"]
    assert list(joiner.feed(1, 0, b"x" * (2 * LINE_MAX_BYTES))) == ["x" * LINE_MAX_BYTES]
    assert list(joiner.rests()) == [(0, "x" * LINE_MAX_BYTES)]
    assert list(joiner.rests()) == []


def test_a_prefix_is_not_put_twice() -> None:
    assert with_rank(1, "hello") == "[rank1]: hello"
    assert with_rank(1, "[rank1]: Traceback") == "[rank1]: Traceback"
    assert with_rank(1, "[rank0]: of another") == "[rank1]: [rank0]: of another"


def test_sizes_are_said_as_people_say_them() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 5 * 1024**3: "5.0 GiB", 3 * 1024**5: "3072.0 TiB"}
    assert {size: words_of_bytes(size) for size in sizes} == sizes


def running_job() -> wire.JobStatus:
    job = wire.JobStatus(job="mine", phase="running", world_size=2, committed_checkpoint=1, committed_step=50)
    for rank, step in ((1, 61), (0, 60)):
        report = wire.RankReport(rank=rank, state=wire.RUNNING, completed_step=step, until_step=100, phase="training")
        report.metrics_json = '{"loss": 0.25}'
        job.ranks.append(wire.JobRank(worker="node-1", report=report))
    return job


def test_progress_is_one_line() -> None:
    line = progress_words(running_job(), 10.0)
    assert line == "mine: step 60/100, 10.0 steps/s, 4 s left, 2 ranks, loss=0.25, saved step 50"


def test_transfers_under_way_are_summed_up_and_told_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    job = running_job()
    assert (job_view(job)["restores"], [rank["upload"] for rank in job_view(job)["ranks"]]) == ([], [None, None])
    job.ranks[0].report.upload.CopyFrom(wire.Transfer(bytes_done=1 << 20, bytes_total=4 << 20))
    job.ranks[1].report.upload.CopyFrom(wire.Transfer(bytes_done=3 << 20, bytes_total=4 << 20))
    job.restores.add(worker="node-1", transfer=wire.Transfer(bytes_done=1, bytes_total=3))
    assert "restoring 33 % of 3 B, uploading 50 % of 8.0 MiB, saved step 50" in progress_words(job, None)
    view = job_view(job)
    assert view["restores"] == [{"worker": "node-1", "bytes_done": 1, "bytes_total": 3}]
    assert view["ranks"][job.ranks[0].report.rank]["upload"] == {"bytes_done": 1 << 20, "bytes_total": 4 << 20}
    print_job(job)
    text = capsys.readouterr().out
    told = dict(line.split(":", 1) for line in text.splitlines() if ": " in line)
    assert (told["uploading"].strip(), told["restoring"].strip()) == ("50 % of 8.0 MiB", "33 % of 3 B")
    assert "25 % of 4.0 MiB" in text and "75 % of 4.0 MiB" in text


def test_a_waiting_job_says_what_it_waits_for() -> None:
    waiting = wire.JobStatus(job="mine", phase="pending", waiting_for="2 workers; 1 there")
    assert progress_words(waiting, None) == "mine waits for 2 workers; 1 there"


def test_the_json_of_a_job_has_its_documented_fields() -> None:
    view = job_view(running_job())
    assert view["completed_step"] == 60 and view["exit_code"] is None
    ranks = view["ranks"]
    assert isinstance(ranks, list) and [rank["rank"] for rank in ranks] == [0, 1]
    assert ranks[0]["metrics"] == {"loss": 0.25} and ranks[0]["exit_code"] is None


@pytest.mark.parametrize("stored", [False, True])
def test_a_run_of_which_nothing_could_be_stored_says_so_at_its_end(stored: bool) -> None:
    said: list[str] = []
    screen = SimpleNamespace(say=said.append)
    names = {"prefix": "/dtrain", "job": JobName("mine"), "run": 1}
    follower = Follower(cast(Any, None), cast(Any, None), screen=cast(Any, screen), **cast(Any, names))
    number, attempt = CheckpointNumber(1), AttemptNumber(1)
    events: list[object] = [
        CheckpointAborted(checkpoint=number, attempt=attempt, reason="rank 0 had already passed step 5", missed=True),
        CheckpointAborted(checkpoint=number, attempt=attempt, reason="a lock cannot be stored"),
        *([made_up(CheckpointCommitted)] if stored else []),
        JobSucceeded(),
    ]

    async def told() -> AsyncIterator[Any]:
        for event in events:
            yield SimpleNamespace(event=event)

    follower._events = told()
    outcome = asyncio.run(follower._read_events())
    assert outcome.exit_code == 0
    assert outcome.words.endswith("could be stored: a lock cannot be stored") is not stored


def test_an_error_of_the_system_that_ends_a_service_is_told_whole(caplog: pytest.LogCaptureFixture) -> None:
    async def service() -> int:
        raise OSError(5, "Input/output error", "/data/journal")

    assert _serving(service()) == 1
    assert "Traceback" in caplog.text and "/data/journal" in caplog.text
