"""What a person may write after --store, and what they are told when it cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.common.errors import UserError
from dtrain.storage.local import LocalFolder
from dtrain.storage.objects import StorageFull, StorageUnavailable
from dtrain.storage.s3 import S3Store
from dtrain.storage.uris import open_store, probe
from tests.support.memory_store import Fault, MemoryStore


def test_a_path_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in (str(tmp_path / "a b"), "a b", "./a b", f"file://{tmp_path}/a%20b", f"file://localhost{tmp_path}/a b"):
        store = open_store(uri)
        assert isinstance(store, LocalFolder)
        assert store.root == tmp_path / "a b"
        assert store.uri == f"file://{tmp_path}/a%20b"


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a?region=eu-north-1", "s3://bucket/a?region=eu-north-1"),
        (
            "s3://bucket?region=x&endpoint=http://127.0.0.1:9000",
            "s3://bucket?endpoint=http://127.0.0.1:9000&region=x",
        ),
        ("s3://bucket/a%20b", "s3://bucket/a%20b"),
    ],
)
def test_a_bucket_is_named_the_way_it_can_be_opened_again(uri: str, canonical: str) -> None:
    store = open_store(uri)
    assert isinstance(store, S3Store)
    assert store.uri == canonical
    assert open_store(store.uri).uri == canonical


@pytest.mark.parametrize(
    ("uri", "mend"),
    [
        ("", "give a folder's path"),
        ("a\x00b", "give a folder's path"),
        ("http://host/x", "give a folder's path"),
        ("gs://bucket", "give a folder's path"),
        ("file://relative/path", "with three slashes"),
        ("file:relative", "with three slashes"),
        ("file:///a?b", "with three slashes"),
        ("file:///a%00b", "give a folder's path"),
        ("s3://", "write s3://bucket/prefix"),
        ("s3:///prefix", "write s3://bucket/prefix"),
        ("s3://key:secret@bucket/prefix", "credentials come from the environment"),
        ("s3://key:secret@bucket?x=1", "credentials come from the environment"),
        ("s3://bucket:9000/prefix", "write s3://bucket/prefix"),
        ("s3://bucket?endpont=http://x", "only endpoint= and region="),
        ("s3://bucket?region=a&region=b", "only endpoint= and region="),
        ("s3://bucket?endpoint=127.0.0.1:9000", "write endpoint=http://host:port"),
        ("s3://bucket?endpoint=", "write endpoint=http://host:port"),
        ("s3://bucket?endpoint=http://user:pw@host", "leave them to the environment"),
        ("s3://bucket?endpoint=http://host:99999", "write endpoint=http://host:port"),
        ("s3://bucket/../other", "is not valid"),
        ("s3://bucket/a//b", "is not valid"),
    ],
)
def test_what_is_no_store_is_said_in_one_sentence_with_the_mend(uri: str, mend: str) -> None:
    with pytest.raises(UserError) as caught:
        open_store(uri)
    assert mend in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert ":pw@" not in str(caught.value)


def test_a_folder_store_costs_no_import_of_what_it_does_not_need(tmp_path: Path) -> None:
    script = (
        "import sys; from dtrain.storage.uris import open_store, probe; probe(open_store(sys.argv[1]));"
        "print(sorted({'boto3', 'botocore', 'torch', 'grpc', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_store_whose_path_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="name another folder") as caught:
            probe(open_store(str(path)))
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("depth", ["", "new/folder"])
def test_a_folder_that_may_not_be_written_is_said(tmp_path: Path, depth: str) -> None:
    """Root may write anywhere, so the probe runs as nobody where the tests run as root."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    script = """
import os, sys
from dtrain.common.errors import UserError
from dtrain.storage import local, uris
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
try:
    uris.probe(local.LocalFolder(local.Path(sys.argv[1])))
except UserError as error:
    print(error)
"""
    folder = tmp_path
    while os.getuid() == 0 and folder != Path("/tmp") and folder != folder.parent:
        folder.chmod(folder.stat().st_mode | 0o011)  # pytest's own folders are closed to others
        folder = folder.parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(closed / depth)], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert "let the user that runs dtrain write there" in done.stdout
    assert str(closed) in done.stdout


@pytest.mark.parametrize("error", [StorageUnavailable("it is away"), StorageFull("no room")])
def test_a_probe_that_fails_for_now_says_so(error: Exception) -> None:
    store = MemoryStore()
    store.fail_next(Fault(operation="put", error=error))
    with pytest.raises(UserError, match=f"cannot be used now: {error}"):
        probe(store)


def test_a_probe_takes_its_object_away_even_if_reading_fails() -> None:
    store = MemoryStore()
    store.fail_next(Fault(operation="get", error=StorageUnavailable("away")))
    with pytest.raises(UserError):
        probe(store)
    assert list(store.list("")) == []
