"""The environment that a trainer is born into: torchrun's variables as torchrun 2.13 sets them, and our own.

A script written for torchrun must not notice the difference. So every variable that torchrun sets is set here
with the same meaning; the agent's own settings (DTRAIN_*) are taken out first, since a trainer that read them
would act on its agent's orders; what the job asked for comes next; what only the agent can know comes last.
CUDA_VISIBLE_DEVICES is left as it is, as torchrun leaves it.
"""

from collections.abc import Mapping
from pathlib import Path

from dtrain.worker.core.states import TrainersSpec
from dtrain.worker.rank_dirs import RankId

ERROR_FILE = "error.json"
ROLE = "default"  # torchrun's name for its only role
# A checkpoint is copied tensor by tensor. By default the C library writes past the cache only in copies of some
# three quarters of the cache's size, and smaller ones take nearly twice as long. From 16 times this size on it also
# copies four pages at a time, which is worth another 15 %: so a quarter of a MiB, for tensors of 4 MiB and more.
NON_TEMPORAL = "glibc.cpu.x86_non_temporal_threshold"
NON_TEMPORAL_BYTES = 0x40000
# torch's TCP store asks the name server for the name of each peer's address, written as ::ffff:a.b.c.d, which no hosts
# file holds. One lost packet costs 5 s, a name server that is away 10 s, with the resolver's own settings; as many
# tries of a second each cost 1 s and 2 s.
RESOLVER_OPTIONS = "timeout:1 attempts:2"


def trainer_environment(
    inherited: Mapping[str, str], spec: TrainersSpec, of: RankId, rank_dir: Path, journal_id: str
) -> dict[str, str]:
    """Return the whole environment of one trainer. ``inherited`` is the agent's own."""
    env = {name: value for name, value in inherited.items() if not name.startswith("DTRAIN_")}
    env.update(spec.env)
    if spec.nproc > 1:
        env.setdefault("OMP_NUM_THREADS", "1")  # or each rank would start a thread on every core
    _set_for_every_start(env)
    env.update(_torchrun_variables(spec, of, rank_dir))
    env.update(_own_variables(spec, of, rank_dir, journal_id))
    return env


def zygote_environment(inherited: Mapping[str, str], needs: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the process that trainers are forked from. ``inherited`` is the agent's own.

    It differs from a trainer's in what a trainer reads after its start only, and in the number of threads. ``needs``:
    what the job that it is to serve wants of the variables that libraries read when they are loaded.
    """
    env = {name: value for name, value in inherited.items() if not name.startswith("DTRAIN_")}
    env.update(needs)
    env["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork: no child could use it
    _set_for_every_start(env)
    return env


def _set_for_every_start(env: dict[str, str]) -> None:
    env.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    env.setdefault("RES_OPTIONS", RESOLVER_OPTIONS)
    tunables = env.get("GLIBC_TUNABLES", "")
    if NON_TEMPORAL not in tunables:
        env["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{NON_TEMPORAL}={NON_TEMPORAL_BYTES:#x}")))
    env["PYTHONUNBUFFERED"] = "1"  # what a rank printed must be in its log when it is killed


def _torchrun_variables(spec: TrainersSpec, of: RankId, rank_dir: Path) -> dict[str, str]:
    return {
        "RANK": str(of.rank),
        "LOCAL_RANK": str(of.rank - spec.first_rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_WORLD_SIZE": str(spec.nproc),
        "GROUP_RANK": str(spec.node_rank),
        "GROUP_WORLD_SIZE": str(spec.nnodes),
        "ROLE_NAME": ROLE,
        "ROLE_RANK": str(of.rank),
        "ROLE_WORLD_SIZE": str(spec.world_size),
        "MASTER_ADDR": spec.master_address,
        "MASTER_PORT": str(spec.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(spec.restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_RUN_ID": of.job,
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 hosts the store at MASTER_PORT
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "TORCHELASTIC_ERROR_FILE": str(rank_dir / ERROR_FILE),
    }


def _own_variables(spec: TrainersSpec, of: RankId, rank_dir: Path, journal_id: str) -> dict[str, str]:
    if spec.nnodes == 1:
        rendezvous = f"file://{rank_dir.parent / 'rendezvous'}"
    else:
        rendezvous = f"tcp://{spec.master_address}:{spec.master_port}"
    last = {"DTRAIN_SAVE_LAST": "1"} if spec.save_last else {}
    return {
        **last,
        "DTRAIN_JOB": of.job,
        "DTRAIN_GENERATION": str(of.generation),
        "DTRAIN_RANK_DIR": str(rank_dir),
        "DTRAIN_RENDEZVOUS": rendezvous,
        "DTRAIN_TRAINER": trainer_mark(of, journal_id),
    }


def trainer_mark(of: RankId, journal_id: str) -> str:
    """The mark by which every process of this rank can be found, whoever its parent is now."""
    return f"{journal_id}/{of.job}/{of.generation}/{of.rank}"
