"""Keep services alive: a service that dies is started again at once, and again more slowly if it dies again.

Services are crash-only, so starting one again is always safe. Two deaths are different: an exit code that
says "what was asked for cannot be done" (starting again gives the same answer), and a service that keeps
dying young. Both end the run, with the service's own last words.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.common.errors import DtrainError, UserError
from dtrain.standalone.children import start_child

USER_ERROR_EXIT_CODE = 2  # what the command line exits with on a UserError
YOUNG_S = 5.0  # a service that dies within this time of its start died young
YOUNG_DEATHS_MAX = 10  # in a row; the next one ends the run
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
_TAIL_BYTES = 4096  # of a log, looked at for last words

Notice = Callable[[str], None]


class ServiceFailedError(DtrainError):
    """A service keeps dying; the text names it, its last words and its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One service to keep alive."""

    name: str
    argv: tuple[str, ...]
    log: Path
    stop_grace_s: float  # SIGTERM first, SIGKILL after this


@dataclass(slots=True)
class _Kept:
    service: Service
    process: asyncio.subprocess.Process | None = None
    young_deaths: int = 0
    starts: int = 0
    task: asyncio.Task[None] | None = field(default=None)


class Supervisor:
    """Starts services, restarts those that die, stops them in the order asked for."""

    def __init__(self, folder: Path, *, lock_fd: int, notice: Notice) -> None:
        self._folder = folder
        self._lock_fd = lock_fd
        self._notice = notice
        self._kept: dict[str, _Kept] = {}
        self._stopping = False
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, service: Service) -> None:
        """Start a service and keep it alive from now on."""
        kept = _Kept(service)
        self._kept[service.name] = kept
        await self._spawn(kept)
        kept.task = asyncio.create_task(self._keep(kept), name=f"keep {service.name}")

    def keep_running(self, name: str, run: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run a watchman of the caller's own; its error fails the run as a service's would."""

        async def guarded() -> None:
            try:
                await run()
            except (DtrainError, OSError) as error:
                self.fail(error)

        return asyncio.create_task(guarded(), name=f"keep {name}")

    def pids(self) -> dict[str, int]:
        """Pids of the services that run now, by name."""
        return {
            name: kept.process.pid
            for name, kept in self._kept.items()
            if kept.process is not None and kept.process.returncode is None
        }

    def fail(self, error: BaseException) -> None:
        """End the run with this error, unless it is ending already."""
        if not self._stopping and not self._failed.done():
            self._failed.set_exception(error)

    async def failed(self) -> None:
        """Wait until a service is beyond help; raises its error. Cancel it freely."""
        await asyncio.shield(self._failed)

    async def _spawn(self, kept: _Kept) -> None:
        kept.starts += 1
        kept.process = await start_child(
            kept.service.argv, log=kept.service.log, folder=self._folder, keep_fds=(self._lock_fd,)
        )

    async def _keep(self, kept: _Kept) -> None:
        service, clock = kept.service, asyncio.get_running_loop().time
        while True:
            assert kept.process is not None
            born = clock()
            code = await kept.process.wait()
            if self._stopping:
                return
            words = last_words(service.log)
            if code == USER_ERROR_EXIT_CODE:
                self.fail(UserError(words.removeprefix("dtrain: ") or f"{service.name} refused to start."))
                return
            kept.young_deaths = kept.young_deaths + 1 if clock() - born < YOUNG_S else 0
            if kept.young_deaths > YOUNG_DEATHS_MAX:
                self.fail(
                    ServiceFailedError(
                        f"{service.name} died {kept.young_deaths} times in a row ({describe_exit(code)}): "
                        f"{words or 'it said nothing'} (see {service.log})"
                    )
                )
                return
            self._notice(f"{service.name} {describe_exit(code)}; starting it again")
            await asyncio.sleep(backoff_s(kept.young_deaths))
            if self._stopping:
                return
            try:
                await self._spawn(kept)
            except OSError as error:
                self.fail(ServiceFailedError(f"{service.name} cannot be started again: {error}"))
                return

    async def stop(self, names: Sequence[str]) -> None:
        """Stop these services together: SIGTERM, then SIGKILL after each one's grace."""
        self._stopping = True
        await asyncio.gather(*(self._stop_one(self._kept[name]) for name in names if name in self._kept))

    def kill(self) -> None:
        """SIGKILL every service now."""
        self._stopping = True
        for kept in self._kept.values():
            _signal(kept.process, signal.SIGKILL)

    async def _stop_one(self, kept: _Kept) -> None:
        if kept.process is not None:
            _signal(kept.process, signal.SIGTERM)
            try:
                async with asyncio.timeout(kept.service.stop_grace_s):
                    await kept.process.wait()
            except TimeoutError:
                _signal(kept.process, signal.SIGKILL)
                await kept.process.wait()
        if kept.task is not None:
            kept.task.cancel()
            await asyncio.gather(kept.task, return_exceptions=True)


def backoff_s(young_deaths: int) -> float:
    """How long to wait before the next start: nothing after a first death, then doubling up to a bound."""
    if young_deaths <= 1:
        return 0.0
    return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** (young_deaths - 2))


def describe_exit(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def last_words(log: Path) -> str:
    """The last non-empty line of a log, empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except FileNotFoundError:
        return ""
    return next((line for line in reversed(lines) if line), "")


def _signal(process: asyncio.subprocess.Process | None, number: signal.Signals) -> None:
    if process is not None and process.returncode is None:
        try:
            process.send_signal(number)
        except ProcessLookupError:
            return  # it ended a moment ago
