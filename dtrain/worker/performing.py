"""Performs what the machine decided: one line of the table here for each act.

Every act is idempotent and quick; what takes time (transfers, waiting for exits) is only begun here and answers
with an input later.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from dtrain.common.mailbox import RestoreState
from dtrain.storage.control_groups import memory_groups
from dtrain.worker.arenas import Arenas
from dtrain.worker.caches import Caches
from dtrain.worker.core.actions import (
    Act,
    AskStage,
    CleanGeneration,
    DropTransfers,
    EndTrainers,
    FetchRestore,
    OpenRestore,
    PrepareFolders,
    RemoveArena,
    RemoveRestore,
    SendSnapshot,
    SpawnTrainer,
    TakeStack,
    Upload,
)
from dtrain.worker.core.inputs import FoldersFailed, FoldersReady, Input
from dtrain.worker.core.states import ExitFact, TrainersSpec
from dtrain.worker.environment import ERROR_FILE, trainer_environment
from dtrain.worker.keepers import Keepers
from dtrain.worker.mailboxes import Mailboxes
from dtrain.worker.ports import HeldPort
from dtrain.worker.rank_dirs import KeeperPlan, RankDirs, RankId
from dtrain.worker.restores import Restores, forget_needs
from dtrain.worker.rpc.logs import log_path
from dtrain.worker.stacks import Stacks
from dtrain.worker.uploads import Uploads

MIB = 1 << 20
GRACE_MAX_S = 30.0  # a keeper whose agent died after SIGTERM kills after this by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Shells:
    """Everything that touches the world for the agent."""

    journal_id: str
    logs: Path
    agent_lock: Path
    orphan_after_s: float
    dirs: RankDirs
    keepers: Keepers
    mailboxes: Mailboxes
    arenas: Arenas
    caches: Caches
    uploads: Uploads
    restores: Restores
    stacks: Stacks
    port: HeldPort
    emit: Callable[[Input], None]
    send_snapshot: Callable[[], None]


def perform(shells: Shells, act: Act) -> None:
    """Do one act, or begin it."""
    match act:
        case PrepareFolders():
            _prepare(shells, act)
        case SpawnTrainer():
            _spawn(shells, act)
        case EndTrainers(job=job, generation=generation, grace_s=grace_s):
            shells.keepers.end(job, generation, grace_s)
        case AskStage(word=word, committed_attempt=committed):
            of = _rank(act)
            shells.caches.outdate(of.job, committed)
            shells.mailboxes.ask_stage(of, word, lambda: shells.arenas.choose(of, committed))
        case Upload():
            shells.uploads.start(act, shells.dirs.rank_dir(_rank(act)))
        case FetchRestore():
            shells.restores.start(act)
        case OpenRestore():
            shells.mailboxes.open_restore(_rank(act))
        case RemoveRestore():
            forget_needs(shells.dirs.rank_dir(_rank(act)))
        case DropTransfers(job=job, generation=generation):
            shells.uploads.drop(job, generation)
            shells.restores.drop(job, generation)
        case CleanGeneration(job=job, generation=generation):
            shells.uploads.drop(job, generation)
            shells.restores.drop(job, generation)
            shells.mailboxes.forget(job, generation)
            shells.dirs.remove(job, generation)
            shells.arenas.rest(job, generation, time.monotonic())
        case RemoveArena(job=job):
            shells.arenas.remove(job)
            shells.caches.remove(job)
            shells.uploads.forget(job)
        case TakeStack(number=number):
            shells.stacks.take(_rank(act), shells.dirs.rank_dir(_rank(act)), number)
        case SendSnapshot():
            shells.send_snapshot()
        case _ as never:
            assert_never(never)


def _rank(act: SpawnTrainer | AskStage | Upload | OpenRestore | RemoveRestore | TakeStack) -> RankId:
    return RankId(job=act.job, generation=act.generation, rank=act.rank)


def _prepare(shells: Shells, act: PrepareFolders) -> None:
    spec = act.spec
    restore = RestoreState.NOTHING if spec.restore is None else RestoreState.PENDING
    ranks = tuple(
        RankId(job=act.job, generation=act.generation, rank=spec.first_rank + local) for local in range(spec.nproc)
    )
    try:
        for of in ranks:
            shells.dirs.prepare(of, _plan(shells, spec, of), restore)
        shells.arenas.claim(ranks)
    except OSError as error:
        fact = ExitFact(code=None, at_unix_s=time.time(), error=f"its folder could not be made: {error}")
        shells.emit(FoldersFailed(job=act.job, generation=act.generation, exit=fact))
        return
    shells.emit(FoldersReady(job=act.job, generation=act.generation))


def _plan(shells: Shells, spec: TrainersSpec, of: RankId) -> KeeperPlan:
    folder = shells.dirs.rank_dir(of)
    kills_file, memory_bound = _memory()
    return KeeperPlan(
        argv=[*([] if spec.no_python else [spec.python or sys.executable, "-u"]), spec.script, *spec.args],
        cwd=spec.cwd or "/",
        env=trainer_environment(os.environ, spec, of, folder, shells.journal_id),
        log=str(log_path(shells.logs, of.job, of.generation, of.rank)),
        error_file=str(folder / ERROR_FILE),
        grace_s=GRACE_MAX_S,
        agent_lock=str(shells.agent_lock),
        orphan_after_s=shells.orphan_after_s,
        kills_file=kills_file,
        memory_bound=memory_bound,
    )


def _memory() -> tuple[str, str]:
    """Where the kernel counts its kills in the group that trainers are born into, and what bounds it, in words."""
    groups = list(memory_groups())
    counting = next((str(group.kills_file) for group in groups if group.kills_file.exists()), "")
    bounds = [(group.limit_bytes, str(group.folder)) for group in groups if group.limit_bytes is not None]
    if not bounds:
        return counting, "and its control group has no limit"
    size_bytes, name = min(bounds)
    return counting, f"and the limit of the control group {name} is {size_bytes // MIB} MiB"


def _spawn(shells: Shells, act: SpawnTrainer) -> None:
    of = _rank(act)
    folder = shells.dirs.rank_dir(of)
    if act.start and act.rendezvous_port:
        shells.port.release(act.rendezvous_port)
    shells.mailboxes.watch(of, folder)
    shells.keepers.ensure(of, folder, start=act.start)
