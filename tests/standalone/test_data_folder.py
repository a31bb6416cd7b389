"""A data folder belongs to one process at a time, whatever happened to the one before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.common.errors import UserError
from dtrain.standalone.data_folder import DataFolder, Endpoints, lock_folder

HOLDER = """
import os, subprocess, sys
from dtrain.standalone.data_folder import DataFolder, lock_folder
lock = lock_folder(DataFolder.at(sys.argv[1]))
if len(sys.argv) > 2:  # leave a child that inherited the lock, and die
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([sys.executable, "-c", "input()"], stdin=0, pass_fds=(lock.fd,), **quiet)
    os._exit(0)
print("locked", flush=True)
input()
"""


def test_a_locked_folder_is_refused_until_its_owner_leaves(tmp_path: Path) -> None:
    folder = DataFolder.at(tmp_path / "data")
    lock = lock_folder(folder)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        lock_folder(folder)
    lock.release()
    lock_folder(folder).release()


def test_the_lock_ends_with_its_owner_however_it_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {holder.pid}"):
            lock_folder(DataFolder.at(tmp_path))
    finally:
        holder.kill()
        holder.communicate()
    lock_folder(DataFolder.at(tmp_path)).release()


def test_what_an_ended_run_left_behind_is_waited_for(tmp_path: Path) -> None:
    read, write = os.pipe()
    holder = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path), "leave"], stdin=read, check=True, timeout=30)
    os.close(read)
    assert holder.returncode == 0
    try:
        with pytest.raises(UserError, match="what an ended run left behind"):
            lock_folder(DataFolder.at(tmp_path), stragglers_s=0.2)
    finally:
        os.close(write)  # the child's input ends, and the child with it
    lock_folder(DataFolder.at(tmp_path)).release()


def test_an_active_run_is_found_only_while_the_folder_is_locked(tmp_path: Path) -> None:
    folder = DataFolder.at(tmp_path)
    lock = lock_folder(folder)
    assert folder.active() is None
    said = Endpoints(etcd="127.0.0.1:1234", prefix="/dtrain", pid=os.getpid())
    folder.publish(said)
    assert folder.active() == said
    lock.release()
    assert folder.active() is None, "left by a run that was killed"


def test_a_torn_endpoints_file_is_no_active_run(tmp_path: Path) -> None:
    folder = DataFolder.at(tmp_path)
    lock = lock_folder(folder)
    folder.endpoints_path.write_text(json.dumps({"etcd": "127.0.0.1:1"}))
    assert folder.active() is None
    lock.release()


def test_a_folder_that_cannot_be_made_is_refused_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-dir"):
        lock_folder(DataFolder.at(tmp_path / "file" / "data"))
