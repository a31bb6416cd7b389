"""What a first step needs and takes seconds to import, imported once in a process that trainers are forked from.

The worker's zygote loads this module by its name: the worker itself never imports torch.

Rules for everything imported or called here, since a fork copies the calling thread only:
- no thread may be left, and nothing may run in parallel: a child would wait for threads that it does not have;
- nothing may touch CUDA, which refuses to work in a forked child once it was initialised;
- nothing may draw from a random generator that a script could draw from.
"""

import contextlib
import ctypes
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# OpenBLAS under the names that NumPy's and the distributions' builds give this function.
_SET_BLAS_THREADS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)
_LIBRARIES = Path("/proc/self/maps")


# In this order: a package before what it puts off.
_MODULES = (
    "numpy.random",
    "safetensors.torch",
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "torch.optim",
    "torch.utils.data",
    "dtrain.storage.dcp",
    "dtrain.trainer.run",
    "dtrain.trainer.supervised",
)


def preload() -> None:
    """Import what scripts and this room import, and what torch puts off until DDP or an optimizer is made."""
    for name in _MODULES:
        importlib.import_module(name)


def settle(environment: Mapping[str, str]) -> None:
    """In a fresh child: have the threads and the random numbers that a process started with ``environment`` has.

    Python's own generator renews itself at a fork. torch seeds the one of the CPU at random and those of GPUs, which
    do not exist yet, with a constant: so only the first is seeded again.
    """
    import numpy.random
    import torch

    numpy.random.seed()
    torch.default_generator.seed()
    threads = int(environment.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    if threads > 1:  # it was loaded with one
        _set_blas_threads(threads)
    _move_debug_files()


def _move_debug_files() -> None:
    """Have what torch.compile writes for debugging go below the trainer's folder, and not the zygote's.

    The default is corrected: a value that is set would count in this thread only.
    """
    config = vars(sys.modules.get("torch._dynamo.config", object))
    try:
        config["_config"]["debug_dir_root"].default = config["default_debug_dir_root"]()
    except (KeyError, AttributeError):  # not loaded, or kept in another way by this version of torch
        return


def _set_blas_threads(threads: int) -> None:
    with contextlib.suppress(OSError):  # without /proc there is no zygote either
        lines = _LIBRARIES.read_text().splitlines()
        for path in {line.split(maxsplit=5)[5] for line in lines if "openblas" in line}:
            library = ctypes.CDLL(path)
            for name in _SET_BLAS_THREADS:
                with contextlib.suppress(AttributeError):
                    getattr(library, name)(threads)
                    break
