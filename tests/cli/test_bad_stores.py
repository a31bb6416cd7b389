"""A store on S3 that cannot be used is said in one line before anything runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import assert_nothing_is_left, dtrain
from tests.cli.test_bad_input import assert_refused
from tests.support.s3_server import S3Server, seaweedfs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with seaweedfs(tmp_path_factory.mktemp("s3")) as it:
        yield it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text("print('ran')\n")
    return tmp_path


def test_a_bucket_that_is_missing_is_named(server: S3Server, folder: Path) -> None:
    store = f"s3://no-such-bucket/runs?endpoint={server.endpoint}&region=us-east-1"
    answer = dtrain("run", "--store", store, "script.py", cwd=folder, **server.environment)
    assert_refused(answer, "no-such-bucket")
    assert_nothing_is_left(folder)


def test_wrong_credentials_are_told_from_everything_else(server: S3Server, folder: Path) -> None:
    wrong = {**server.environment, "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    answer = dtrain("run", "--store", server.uri("runs"), "script.py", cwd=folder, **wrong)
    assert_refused(answer, "credentials")
    assert_nothing_is_left(folder)


def test_without_credentials_the_mend_is_said(server: S3Server, folder: Path) -> None:
    none = {k: v for k, v in server.environment.items() if k not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    answer = dtrain("run", "--store", server.uri("runs"), "script.py", cwd=folder, **none)
    assert_refused(answer, "credentials")
    assert_nothing_is_left(folder)
