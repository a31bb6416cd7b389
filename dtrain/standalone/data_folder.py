"""The data folder of runs on one machine: who may use it, and what lies where.

Two runs in one folder would start two etcds on the same files, so a folder belongs to one process at a time.
The lock is a flock, which ends with its last holder however that dies. Every service that is started inherits
the lock: a folder stays locked until the last service of a killed run has left, so that a new run never
meets half of an old one. A new run waits for such stragglers, and only for them: a lock whose first owner
is alive is refused at once.

=====================  ==========================================================================
``lock``               the flock; holds the pid of its first owner
``endpoints.json``     while a run is active: where its etcd listens, for the other verbs
``etcd/``              the data of the embedded etcd: the event logs of all jobs run here
``workers/<n>/``       the journal and the trainers' logs of worker n
``store/``             checkpoints, where no other store was named
``services/*.log``     what etcd, the coordinator and the workers printed
=====================  ==========================================================================
"""

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from dtrain.common.errors import UserError

STRAGGLERS_S = 20.0  # longer than a worker's grace for its trainers plus its own leaving
_STRAGGLERS_POLL_S = 0.05


class FolderInUseError(UserError):
    """Another process has the folder now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where the active run of a data folder can be reached."""

    etcd: str  # host:port
    prefix: str  # where its keys begin
    pid: int  # the process that owns the folder


@dataclass(frozen=True, slots=True)
class DataFolder:
    """Paths inside a data folder. Making one touches nothing on disk."""

    root: Path  # absolute

    @classmethod
    def at(cls, path: str | Path) -> "DataFolder":
        return cls(Path(path).expanduser().absolute())

    @property
    def etcd(self) -> Path:
        return self.root / "etcd"

    @property
    def store(self) -> Path:
        return self.root / "store"

    def worker(self, number: int) -> Path:
        return self.root / "workers" / str(number)

    def service_log(self, name: str) -> Path:
        return self.root / "services" / f"{name}.log"

    @property
    def lock_path(self) -> Path:
        return self.root / "lock"

    @property
    def endpoints_path(self) -> Path:
        return self.root / "endpoints.json"

    def has_history(self) -> bool:
        """Whether an etcd ever ran here."""
        return (self.etcd / "store" / "member").is_dir()

    def make(self) -> None:
        """Make the folder, or raise :class:`UserError`."""
        try:
            for folder in (self.root, self.etcd, self.root / "services", self.root / "workers"):
                folder.mkdir(parents=True, exist_ok=True)
            # 0700 on etcd's data: it holds the environment variables that jobs were given.
            self.etcd.chmod(0o700)
        except OSError as error:
            raise UserError(
                f"data folder {self.root} cannot be made ({error.strerror}): name a writable one with --data-dir."
            ) from error

    def active(self) -> Endpoints | None:
        """Where the active run of this folder can be reached; None if there is none."""
        try:
            text = self.endpoints_path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not self._is_locked():
            return None  # left by a run that was killed
        try:
            values = json.loads(text)
            return Endpoints(etcd=str(values["etcd"]), prefix=str(values["prefix"]), pid=int(values["pid"]))
        except (ValueError, KeyError, TypeError):
            return None

    def publish(self, endpoints: Endpoints) -> None:
        """Say where the active run can be reached. Readers see all of it or nothing."""
        draft = self.endpoints_path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps({"etcd": endpoints.etcd, "prefix": endpoints.prefix, "pid": endpoints.pid}) + "\n")
        draft.replace(self.endpoints_path)

    def withdraw(self) -> None:
        """The run has ended: nobody is to be found here any more."""
        self.endpoints_path.unlink(missing_ok=True)

    def _is_locked(self) -> bool:
        try:
            fd = os.open(self.lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


class FolderLock:
    """The exclusive right to use a data folder, from :func:`lock_folder` until ``release``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd  # services are started with it, see the module's docstring

    def release(self) -> None:
        os.close(self.fd)


def lock_folder(folder: DataFolder, *, stragglers_s: float = STRAGGLERS_S) -> FolderLock:
    """Make the folder and lock it, or raise :class:`UserError` naming the process that uses it."""
    folder.make()
    fd = os.open(folder.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + stragglers_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(fd)
            if owner is not None and _is_alive(owner):
                os.close(fd)
                raise FolderInUseError(
                    f"data folder {folder.root} is in use by process {owner}: "
                    "wait for it, end it, or give another folder with --data-dir."
                ) from None
            if time.monotonic() > deadline:
                os.close(fd)
                raise UserError(
                    f"data folder {folder.root} is still in use by what an ended run left behind: "
                    f"see who holds it with 'fuser {folder.lock_path}', or give another folder with --data-dir."
                ) from None
            time.sleep(_STRAGGLERS_POLL_S)  # a flock cannot be waited for with a deadline
            continue
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return FolderLock(fd)


def _owner(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    return state not in ("Z", "X")
