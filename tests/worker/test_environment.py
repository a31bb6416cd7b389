"""What a trainer is born into, compared with what torchrun itself gives its workers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.common.names import Generation
from dtrain.worker.environment import trainer_environment, zygote_environment
from dtrain.worker.ports import HeldPort
from dtrain.worker.rank_dirs import RankId
from tests.worker.facts_of_trainers import JOB, spec

RANK = RankId(job=JOB, generation=Generation(3), rank=1)
DIR = Path("/shm/digits.g3/rank1")


def _environment(inherited: dict[str, str] | None = None, **changes: object) -> dict[str, str]:
    return trainer_environment(inherited or {}, replace(spec(), **changes), RANK, DIR, "journal")  # type: ignore[arg-type]


def test_every_variable_that_torchrun_sets_is_set() -> None:
    script = "import os, json; print(json.dumps(dict(os.environ)))"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--no-python"]
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [*command, sys.executable, "-c", script], capture_output=True, text=True, env=clean, timeout=120, check=True
    )
    theirs = set(json.loads(done.stdout)) - set(clean)
    ours = set(_environment())
    by_python = {name for name in theirs if name.startswith(("LC_", "PWD", "SHLVL", "_", "OLDPWD", "KMP", "LD_"))}
    assert theirs - by_python - ours == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("GROUP_RANK", "0"),
        ("ROLE_RANK", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "4000"),
        ("TORCHELASTIC_RESTART_COUNT", "0"),
        ("TORCHELASTIC_MAX_RESTARTS", "3"),
        ("TORCHELASTIC_RUN_ID", "digits"),
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
        ("TORCHELASTIC_ERROR_FILE", "/shm/digits.g3/rank1/error.json"),
        ("OMP_NUM_THREADS", "1"),
        ("DTRAIN_JOB", "digits"),
        ("DTRAIN_GENERATION", "3"),
        ("DTRAIN_RANK_DIR", "/shm/digits.g3/rank1"),
        ("DTRAIN_RENDEZVOUS", "file:///shm/digits.g3/rendezvous"),
        ("DTRAIN_TRAINER", "journal/digits/3/1"),
    ],
)
def test_a_rank_is_told_who_it_is(name: str, value: str) -> None:
    assert _environment()[name] == value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "glibc.cpu.x86_non_temporal_threshold=0x40000"),
        ("glibc.malloc.perturb=1", "glibc.malloc.perturb=1:glibc.cpu.x86_non_temporal_threshold=0x40000"),
        ("glibc.cpu.x86_non_temporal_threshold=0x100000", "glibc.cpu.x86_non_temporal_threshold=0x100000"),
    ],
)
def test_large_copies_go_past_the_cache_unless_the_user_said_otherwise(given: str | None, expected: str) -> None:
    settings = {} if given is None else {"GLIBC_TUNABLES": given}
    assert _environment(settings)["GLIBC_TUNABLES"] == expected
    assert _environment(env=settings)["GLIBC_TUNABLES"] == expected


@pytest.mark.parametrize(("given", "expected"), [(None, "timeout:1 attempts:2"), ("ndots:2", "ndots:2")])
def test_a_name_server_that_is_away_is_not_waited_for_unless_the_user_said_otherwise(
    given: str | None, expected: str
) -> None:
    inherited = {} if given is None else {"RES_OPTIONS": given}
    assert _environment(inherited)["RES_OPTIONS"] == expected
    assert zygote_environment(inherited, {})["RES_OPTIONS"] == expected
    assert _environment({}, env=inherited)["RES_OPTIONS"] == expected


def test_ranks_on_several_nodes_meet_at_rank_0() -> None:
    env = _environment(nnodes=2, node_rank=1, first_rank=1, nproc=1, master_address="node-a")
    assert env["DTRAIN_RENDEZVOUS"] == "tcp://node-a:4000"
    assert (env["LOCAL_RANK"], env["GROUP_RANK"]) == ("0", "1")


def test_the_agents_own_settings_do_not_reach_its_trainers() -> None:
    env = _environment({"DTRAIN_ETCD": "10.0.0.1:2379", "DTRAIN_JOB": "another", "HOME": "/home/me"})
    assert "DTRAIN_ETCD" not in env
    assert env["DTRAIN_JOB"] == "digits"
    assert env["HOME"] == "/home/me"


def test_what_the_job_asks_for_stands_unless_only_the_agent_can_know_it() -> None:
    env = _environment({"OMP_NUM_THREADS": "9"}, env={"OMP_NUM_THREADS": "4", "LR": "0.1", "RANK": "77"})
    assert (env["OMP_NUM_THREADS"], env["LR"], env["RANK"]) == ("4", "0.1", "1")


def test_one_trainer_alone_may_use_all_threads_and_devices_are_left_alone() -> None:
    env = _environment({"CUDA_VISIBLE_DEVICES": "3"}, nproc=1)
    assert "OMP_NUM_THREADS" not in env
    assert env["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_held_port_is_let_go_only_by_its_number_and_replaced_by_another() -> None:
    held = HeldPort()
    first = held.number
    held.release(first + 1)
    assert held.number == first
    held.release(first)
    second = held.number
    held.close()
    assert second != first
