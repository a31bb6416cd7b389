"""What a script holds while it trains: ``dtrain.join()`` and the run it gives.

    with dtrain.join() as run:                          # rank, world size, device, process group
        run.track(model=model, optimizer=optimizer)
        for batch in run.steps(loader, until=1000):     # restores first; one turn is one step
            ...
            run.report(loss=loss.item())

The same script runs under a worker, under torchrun and by hand. A step is done when its body has run and the loop
asks for the next batch; there, and only there, state is taken or put back. A body left by ``break`` or by an
exception is a step that was not done.
"""

import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol, SupportsFloat, TypeVar

import torch

from dtrain.common import failpoints
from dtrain.common.errors import UserError
from dtrain.common.names import Generation, JobName, Step
from dtrain.trainer import surroundings as surroundings_module
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.failures import is_failure, leave_at_once_if_uncaught, one_line, write_error_file
from dtrain.trainer.process_group import JOIN_TIMEOUT_S, choose_device, join_group, leave_group
from dtrain.trainer.restoring import Plan
from dtrain.trainer.steps import Steps
from dtrain.trainer.supervised import WorkerStation
from dtrain.trainer.surroundings import Surroundings
from dtrain.trainer.tracking import CapturedState, SavedState, TrackedState

_log = logging.getLogger("dtrain")

Batch = TypeVar("Batch")


class Station(Protocol):
    """Who takes progress and keeps checkpoints: a worker, or this process itself.

    Order of calls: track, load, begin, then boundary after each step, leave if the loop is left before its end (and
    go_on if another takes it up), finish, close. paused, report and fail at any time before close.
    """

    def track(self) -> None: ...

    def load(self, plan: Plan) -> SavedState | None: ...

    def begin(
        self,
        *,
        step: Step,
        until: Step,
        capture: Callable[[Step], CapturedState],
        estimate_bytes: Callable[[], int] | None = None,
    ) -> None: ...

    def boundary(self, step: Step) -> None: ...

    def leave(self) -> None: ...

    def go_on(self) -> None: ...

    def finish(self) -> None: ...

    def stop(self, until: Step) -> None: ...

    def paused(self) -> AbstractContextManager[None]: ...

    def report(self, metrics: dict[str, float | str]) -> None: ...

    def fail(self, text: str) -> None: ...

    def close(self) -> None: ...


_joined: set[Path] = set()  # folders of the ranks that this process has been


def join(*, store: str = "", every_steps: int = 0, timeout_s: float = JOIN_TIMEOUT_S) -> "Run":
    """Join the training run that this process is a rank of, and bring its process group up.

    ``store`` and ``every_steps`` are for local mode (torchrun, plain python): where checkpoints go, and how often;
    the environment's DTRAIN_LOCAL_STORE and DTRAIN_LOCAL_EVERY_STEPS go before them. Under a worker the job's own
    settings count. ``timeout_s`` bounds the wait for peers and every collective, in seconds.

    Raises :class:`~dtrain.common.errors.UserError` with one sentence that names the mend.
    """
    failpoints.arm(os.environ)
    surroundings = surroundings_module.read(os.environ)
    if surroundings.rank_dir in _joined:
        raise UserError(
            "dtrain.join() was called twice in one process: a rank joins once. Let an error end the process: "
            "dtrain starts the ranks again, from the newest checkpoint."
        )
    device = choose_device(surroundings)
    owns_group = join_group(surroundings, device, timeout_s=timeout_s)
    if surroundings.rank_dir is not None:
        _joined.add(surroundings.rank_dir)
        station: Station = WorkerStation(
            surroundings.rank_dir,
            rank=surroundings.rank,
            world_size=surroundings.world_size,
            local_world_size=surroundings.local_world_size,
            save_last=surroundings.save_last,
        )
    else:
        # Under a worker nothing of local mode is needed, and a restart counts every millisecond.
        from dtrain.trainer.local_mode import LocalStation

        station = LocalStation(
            surroundings,
            store_uri=surroundings.local_store or store,
            every_steps=surroundings.local_every_steps or every_steps,
        )
    return Run(surroundings, device, station, owns_group=owns_group)


class Run:
    """One rank's part in a training run. Made by :func:`join`; use it in a ``with`` statement."""

    def __init__(self, surroundings: Surroundings, device: torch.device, station: Station, *, owns_group: bool) -> None:
        self._surroundings = surroundings
        self._device = device
        self._station = station
        self._owns_group = owns_group  # whether join() made the process group
        self._tracked = TrackedState(rank=surroundings.rank, world_size=surroundings.world_size)
        self._metrics: dict[str, float | str] = {}  # the newest value of each
        self._metrics_refused = False  # whether it was said that they do not fit
        self._step = Step(0)  # completed steps
        self._restored = False
        self._stepping = False  # whether steps() was called
        self._until = Step(0)  # the last step
        self._over = False  # whether the ``with`` statement was left

    @property
    def rank(self) -> int:
        """This process's number among all: 0 <= rank < world_size."""
        return self._surroundings.rank

    @property
    def local_rank(self) -> int:
        """This process's number among those on its node."""
        return self._surroundings.local_rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self._surroundings.world_size

    @property
    def device(self) -> torch.device:
        """The device of this rank: its GPU, or the CPU."""
        return self._device

    @property
    def job(self) -> JobName:
        """The job's name; ``local`` when nobody named one."""
        return self._surroundings.job

    @property
    def generation(self) -> Generation:
        """Which attempt of the job this is, from 1."""
        return self._surroundings.generation

    @property
    def step(self) -> int:
        """Completed steps. In the body of the loop: the steps before this one."""
        return self._step

    @property
    def restored(self) -> bool:
        """Whether the steps go on from a checkpoint. Known once the steps have begun."""
        return self._restored

    def track(self, **objects: object) -> None:
        """Make ``objects`` part of every checkpoint, each under its name. Before the steps begin, each once.

        An object has ``state_dict()`` and ``load_state_dict()``, or is the data loader given to :meth:`steps`. Its
        tensors are taken to be the same on every rank (as DDP keeps them), or sharded over the ranks (DTensor); what
        differs from rank to rank belongs into :meth:`track_local`.
        """
        self._track(objects, self._tracked.add)

    def track_local(self, **objects: object) -> None:
        """Make ``objects``, whose state is this rank's own, part of every checkpoint.

        Rank 3 gets back what rank 3 saved. On another world size ranks that there were not before share the states
        that there were, and those that are no more are not read.
        """
        self._track(objects, self._tracked.add_local)

    def _track(self, objects: dict[str, object], add: Callable[[str, object], None]) -> None:
        if self._stepping:
            raise UserError("run.track() was called after run.steps(): track everything before the steps begin.")
        for name, item in objects.items():
            add(name, item)
        if self._tracked:
            self._station.track()

    def steps(self, loader: Iterable[Batch], until: int) -> Iterator[Batch]:
        """Restore, then give one batch a step until ``until`` steps are completed, over as many epochs as that takes.

        After a restore at or beyond ``until`` there is no batch. Random states and the position in ``loader`` are
        part of each checkpoint: a resumed run sees the batches and draws the numbers it would have.

        On a GPU a checkpoint is copied in the order of the stream that is current between two steps. A body that
        writes tracked tensors on another stream makes that one wait for the current stream first, and the current
        stream for that one before it ends (``wait_stream()``, both ways): else it may be copied half written.
        """
        if isinstance(until, bool) or not isinstance(until, int) or until < 0:
            raise UserError(f"run.steps(until={until!r}) is not valid: give the number of the last step, 0 or more.")
        if self._stepping:
            raise UserError(
                "run.steps() was called twice: a run has one sequence of steps, over as many epochs as it takes. Say "
                "until=epochs * len(loader); to go on behind an epoch, hold the steps and loop over the same again."
            )
        self._stepping = True
        self._tracked.bind_loader(loader)
        steps = self._run_steps(DataPosition(loader), Step(until))
        return Steps(steps, leave=self._leave_steps, go_on=self._station.go_on)

    def stop(self) -> None:
        """Make the step that is under way the last one, on every rank in the same step: training has converged.

        Its state is saved as that of any last step is, which a loop that is left by ``break`` does not bring about.
        """
        if not self._stepping or self._over or self._step >= self._until:
            raise UserError("run.stop() belongs into the body of the loop over run.steps().")
        self._until = Step(self._step + 1)
        self._station.stop(self._until)

    def paused(self) -> AbstractContextManager[None]:
        """Around what is no step, between steps or within one: an evaluation, a download, a person's prompt.

        A rank that completes no step for too long is taken to hang. What runs in ``with run.paused():`` may take as
        long as it likes. Every rank that waits for another one inside should say so too; and what it waits in, a
        collective, still ends after :func:`join`'s ``timeout_s``.
        """
        return self._station.paused()

    def report(self, **metrics: SupportsFloat | str) -> None:
        """Show the newest value of each metric to whoever watches the job: numbers, or short text."""
        for name, value in metrics.items():
            self._metrics[name] = _plain_metric(name, value)
        try:
            self._station.report(self._metrics)
        except ValueError as error:  # too many or too long: no reason to stop training
            if not self._metrics_refused:
                _log.warning("run.report(): %s; the metrics stay as they were", error)
            self._metrics_refused = True
            for name in metrics:
                del self._metrics[name]

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        if error is not None and is_failure(error):
            if self._surroundings.error_file is not None:
                write_error_file(self._surroundings.error_file, error)
            self._station.fail(one_line(error))
            # The process group stays as it is: destroying it would wait for peers that may be gone.
            leave_at_once_if_uncaught(error)
            return
        self._station.finish()
        self._station.close()
        if self._owns_group:
            leave_group()

    def _leave_steps(self) -> None:
        if not self._over:  # steps that are kept, and closed later, find no station any more
            self._station.leave()

    def _run_steps(self, position: DataPosition[Batch], until: Step) -> Generator[Batch, None, None]:
        self._restore(position, until)

        def capture(step: Step) -> CapturedState:
            return self._tracked.capture(step, position)

        station = self._station
        station.begin(step=self._step, until=until, capture=capture, estimate_bytes=self._tracked.estimate_bytes)
        boundary, next_batch, step = station.boundary, position.next_batch, self._step
        self._until = until
        try:
            while step < self._until:
                yield next_batch()
                self._step = step = Step(step + 1)
                boundary(step)
            station.finish()
        except GeneratorExit:
            self._leave_steps()
            raise
        finally:
            position.close()

    def _restore(self, position: DataPosition[Batch], until: Step) -> None:
        def plan(saved: SavedState) -> dict[str, torch.Tensor]:
            return self._tracked.targets(saved, self._device, seek=saved.step < until)

        saved = self._station.load(plan)
        if saved is None:
            return
        self._tracked.restore_objects(saved, self._device)
        self._tracked.restore_position(
            saved, position, rank=self.rank, world_size=self.world_size, seek=saved.step < until
        )
        self._step = saved.step
        self._restored = True


def _plain_metric(name: str, value: SupportsFloat | str) -> float | str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"run.report({name}=...) got a {type(value).__qualname__}: give a number or a short text."
        ) from error
    return number if math.isfinite(number) else str(number)  # JSON has no NaN
