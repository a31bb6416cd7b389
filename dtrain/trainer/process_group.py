"""The process group: how the ranks of one generation find each other.

The script never says how. Under a worker the ranks meet in a store that belongs to their generation alone (a file
on one node, a TCP store hosted by rank 0 across nodes), so that a rank of a dead generation can never be taken for
a peer. Under torchrun the usual ``env://`` is used. Started by hand there is a world of one, real enough for DDP.

Rules: every wait has an explicit timeout (torch's default would hide a lost peer for half an hour); a group that
the script made itself is used and left alone; on an exception nothing is torn down, because tearing down waits for
peers that may be gone.
"""

import logging
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

# Public, but torch does not re-export them in the way that mypy asks for.
from torch.distributed import FileStore, HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from dtrain.common.errors import PermanentError, UserError
from dtrain.trainer.surroundings import Launcher, Surroundings
from dtrain.trainer.tcp_stores import tcp_store

# Groups that were left, held until the interpreter ends. DDP's reducer holds the group too; if it held it last, the
# group's destructor would run while the model is freed, with the GIL, and join gloo's threads, of which one may need
# the GIL to let go of the last all-reduce: a deadlock, met by ranks that leave right after their last step.
_kept: list[object] = []

# gloo's threads let go of the last collective after it has completed, which takes the GIL when Python knows one of
# its tensors. Once the interpreter is ending, a foreign thread that asks for the GIL is killed in the middle of C++
# code, and that ends the process with SIGABRT (pytorch/pytorch#179291). So leaving waits until they are at rest.
_log = logging.getLogger("dtrain")

_GLOO_THREADS = "pt_gloo_runloop"  # the name torch gives them
_REST_S = 0.012  # longer than the 5 ms after which a thread that waits for the GIL asks again
_REST_TIMEOUT_S = 5.0

JOIN_TIMEOUT_S = 600.0  # longest wait for peers to appear, and for any one collective


def choose_device(surroundings: Surroundings) -> torch.device:
    """Return this rank's device. A node with fewer GPUs than ranks uses none, so that all its ranks agree."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus, ranks = torch.cuda.device_count(), surroundings.local_world_size
    if gpus >= ranks:
        return torch.device("cuda", surroundings.local_rank)
    if surroundings.local_rank == 0:
        _log.warning(
            "%d GPU(s) can be seen by %d ranks of this node, so all of them use the CPU: let every rank see all GPUs "
            "(CUDA_VISIBLE_DEVICES), or start as many ranks as there are",
            gpus,
            ranks,
        )
    return torch.device("cpu")


def join_group(surroundings: Surroundings, device: torch.device, *, timeout_s: float = JOIN_TIMEOUT_S) -> bool:
    """Bring the process group up. Return True if it is ours, so that leaving destroys it.

    Raises :class:`UserError` when the script's own group has another shape than the launcher said, and
    :class:`PermanentError` when the peers did not appear within ``timeout_s``.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (surroundings.rank, surroundings.world_size):
            raise UserError(
                f"the script's own process group has rank {dist.get_rank()} of {dist.get_world_size()}, but the "
                f"launcher said rank {surroundings.rank} of {surroundings.world_size}: initialise it from the "
                "environment (init_process_group()), or leave that to dtrain.join()."
            )
        return False
    timeout = timedelta(seconds=timeout_s)
    # gloo beside nccl, so that collectives on CPU tensors work too.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        if surroundings.launcher is Launcher.TORCHRUN or (
            surroundings.launcher is Launcher.WORKER and not surroundings.rendezvous
        ):
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            dist.init_process_group(
                backend,
                store=_store(surroundings, timeout),
                rank=surroundings.rank,
                world_size=surroundings.world_size,
                timeout=timeout,
            )
    except RuntimeError as error:  # a DistError, or what a file store raises
        raise PermanentError(
            f"rank {surroundings.rank} could not join the process group of {surroundings.world_size} "
            f"within {timeout_s:g} s: {error}"
        ) from error
    return True


def leave_group() -> None:
    """Destroy the process group after a normal end, without waiting for peers that may still be busy."""
    if dist.is_initialized():
        _kept.append(dist.group.WORLD)
        dist.destroy_process_group()
        _wait_until_gloo_rests()


def _wait_until_gloo_rests() -> None:
    """Wait until every gloo thread slept through one whole pause, in which this thread did not hold the GIL."""
    deadline = time.monotonic() + _REST_TIMEOUT_S
    before = _gloo_threads()
    while before and time.monotonic() < deadline:
        time.sleep(_REST_S)
        now = _gloo_threads()
        if now == before and all(state == "S" for state, *_ in now.values()):
            return
        before = now


def _gloo_threads() -> dict[str, tuple[str, ...]]:
    """Return (state, context switches by its will, and against it) of each gloo thread of this process."""
    found: dict[str, tuple[str, ...]] = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that ended meanwhile
        if fields["Name"].strip() == _GLOO_THREADS:
            found[task.name] = (
                fields["State"].split()[0],
                fields["voluntary_ctxt_switches"],
                fields["nonvoluntary_ctxt_switches"],
            )
    return found


def _store(surroundings: Surroundings, timeout: timedelta) -> Store:
    if surroundings.launcher is Launcher.PLAIN:
        return HashStore()
    address = urlsplit(surroundings.rendezvous)
    if address.scheme == "file" and address.path:
        file_store = FileStore(address.path, surroundings.world_size)
        file_store.set_timeout(timeout)
        return file_store
    if address.scheme == "tcp" and address.hostname and address.port:
        # A rank of an older generation that still knows this port finds nothing under its own prefix.
        prefix = f"dtrain/{surroundings.job}/{surroundings.generation}"
        return PrefixStore(prefix, tcp_store(address.hostname, address.port, surroundings, timeout))
    raise UserError(
        f"DTRAIN_RENDEZVOUS={surroundings.rendezvous!r} is not valid: give file:///path or tcp://host:port."
    )
