"""Life under a worker: the trainer's side of the mailbox.

    JOINED -> RESTORING -> TRAINING <-> CHECKPOINTING
                              +-> HOLDING -> FINISHED

TRAINING is left for PAUSED and entered again wherever the script says so. A loop that is left before its last step
(``break``, or an exception of its body) leads to LEFT, and not to FINISHED: whether this rank fails shows at the
end of ``with join()`` only, and another loop may take the steps up. What the script does until then may take long: an
evaluation.

At the end of each step the trainer publishes the step it completed, and *then* looks at the request. The worker
writes a request at any time, for a step that the coordinator believes to be ahead of every rank. Two orders are
possible at the boundary of step s:

- the request for s was written before the look: it is staged;
- it was written after the look: the trainer sees it at the boundary of s + 1, and reports it as missed.

So every request gets an answer (staged, missed, failed) unless the trainer dies, and only the answer counts: nobody
may conclude from ``completed_step`` that a request was seen, or was not. Publishing first makes the number that the
coordinator chooses from as fresh as can be. A request for a later step waits; one that can no longer be met when the
steps are over is reported as missed.

A trainer whose last step was not staged waits for that request (HOLDING) before it goes on: another attempt may
still be on its way to storage, and the coordinator has one in flight at a time. The wait is bounded.

A state that cannot be stored (a value no checkpoint can hold, shared memory full) is reported, and training goes on.

Bytes that come from a GPU may still be on their way when training goes on. The state counts as staged, and is told to
the worker, at the first boundary after that (or when the steps are over), where they are waited for.

A slot is marked as empty before it is written and as holding this request's state when it is whole, so that a trainer
killed in between leaves nothing that could be taken for a checkpoint.
"""

import contextlib
import gc
import logging
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter_ns, sleep

from dtrain.common import failpoints
from dtrain.common.errors import UserError
from dtrain.common.failpoints import Point
from dtrain.common.mailbox import MAILBOX_BYTES, Mailbox, TrainerPhase, unpack
from dtrain.common.names import Step
from dtrain.trainer.arena import ArenaPreparation, SlotMemory, StageSlots
from dtrain.trainer.copying import Arriving, Copier
from dtrain.trainer.cores import cores_of_rank
from dtrain.trainer.failures import one_line
from dtrain.trainer.restoring import Plan, restore_from_worker
from dtrain.trainer.stacks import answer_with_stacks
from dtrain.trainer.staging import ShardLayouts
from dtrain.trainer.tracking import CapturedState, SavedState

_log = logging.getLogger("dtrain")

HOLD_S = 7200.0  # an attempt in flight blocks the next one for as long as its uploads advance; most take minutes
HOLD_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class _Staging:
    """A state that was given to a slot."""

    request: int
    step: int
    slot: int
    size_bytes: int
    memory: SlotMemory  # kept while bytes arrive there
    arriving: Arriving | None  # None: all bytes are there


class WorkerStation:
    """Progress out, checkpoint requests in, through the mailbox in ``rank_dir``."""

    def __init__(
        self, rank_dir: Path, *, rank: int, world_size: int, local_world_size: int = 1, save_last: bool = False
    ) -> None:
        """``local_world_size``: ranks on this node, which share its cores."""
        self._rank_dir = rank_dir
        self._cores = cores_of_rank(local_world_size)
        self._save_last = save_last
        self._steps = Step(0), Step(0)  # where this trainer began, and its last step
        self._tried = Step(0)  # the newest step that was staged, or could not be
        self._rank, self._world_size = rank, world_size
        self._map, self._mailbox = _open_mailbox(rank_dir / "mailbox")
        self._layouts = ShardLayouts(rank=rank, world_size=world_size)
        self._slots = StageSlots(rank_dir)
        self._copier = Copier(self._cores)
        self._preparation = ArenaPreparation(self._slots, self._mailbox, self._copier)
        self._first_step_is_due = False  # whether the preparation waits for the end of the first step
        self._capture: Callable[[Step], CapturedState] | None = None  # set by begin()
        self._staging: _Staging | None = None  # what is on its way from a GPU
        self._answered = 0  # the last request that was staged, missed or failed; 0 before the first
        self._step_began_ns = 0  # perf_counter_ns() at the end of the last boundary
        self._error_shown = False  # whether the error region tells of a failed staging
        answer_with_stacks(rank_dir)
        self._mailbox.phase = TrainerPhase.JOINED

    def track(self) -> None:
        """Say that this trainer can be checkpointed."""
        self._mailbox.tracking = True

    def load(self, plan: Plan) -> SavedState | None:
        """Read what this rank starts from into what ``plan`` names, and return it; None for nothing."""
        self._mailbox.phase = TrainerPhase.RESTORING
        with _no_garbage_collection():
            return restore_from_worker(
                self._rank_dir,
                self._mailbox,
                rank=self._rank,
                world_size=self._world_size,
                cores=self._cores,
                plan=plan,
            )

    def begin(
        self,
        *,
        step: Step,
        until: Step,
        capture: Callable[[Step], CapturedState],
        estimate_bytes: Callable[[], int] | None = None,
    ) -> None:
        """The steps begin: ``step`` is done, ``until`` will be the last.

        ``estimate_bytes`` says how large the state is; it is called in another thread after the first step. Without
        it nothing is prepared, and the first checkpoint takes longer.
        """
        self._capture = capture
        if estimate_bytes is not None and self._mailbox.tracking:
            self._preparation.begin(estimate_bytes)
            self._first_step_is_due = True
        self._steps = step, until
        mailbox = self._mailbox
        mailbox.until_step = until
        mailbox.completed_step = step
        mailbox.phase = TrainerPhase.TRAINING
        self._step_began_ns = perf_counter_ns()

    def boundary(self, step: Step) -> None:
        """The body of ``step`` has run. Costs about a microsecond unless a checkpoint is asked for."""
        mailbox = self._mailbox
        mailbox.completed_step = step
        now_ns = perf_counter_ns()
        mailbox.step_ns = now_ns - self._step_began_ns
        self._step_began_ns = now_ns
        if self._staging is not None:
            self._settle()
            self._step_began_ns = perf_counter_ns()
        if mailbox.request != self._answered:
            self._answer(mailbox.request, step)
            self._step_began_ns = perf_counter_ns()
        if self._first_step_is_due:  # now optimizers have their state
            self._first_step_is_due = False
            self._preparation.look()

    def stop(self, until: Step) -> None:
        """The step that is under way is the last one."""
        self._steps = self._steps[0], until
        self._mailbox.until_step = until

    def leave(self) -> None:
        """No step will follow, and it is not known yet whether this rank failed. Waits for nothing.

        It must not wait: where a peer died, what is on its way from a GPU may never come.
        """
        staging = self._staging
        if staging is not None and (staging.arriving is None or staging.arriving.is_there()):
            self._settle()
        self._miss()
        self._mailbox.phase = TrainerPhase.LEFT

    def go_on(self) -> None:
        """Steps will follow after all: another loop took them up."""
        self._mailbox.phase = TrainerPhase.TRAINING
        self._step_began_ns = perf_counter_ns()

    def finish(self) -> None:
        """No step will follow. Waits until the last state is staged, if the job wants it and it is not yet."""
        self._settle()
        began, until = self._steps
        if self._save_last and self._mailbox.completed_step == until > began and self._mailbox.tracking:
            self._hold(until)
            self._settle()
        self._miss()
        self._mailbox.phase = TrainerPhase.FINISHED

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside belongs to no step: it is neither timed nor taken for a hang."""
        mailbox, before = self._mailbox, self._mailbox.phase
        began_ns = perf_counter_ns()
        mailbox.phase = TrainerPhase.PAUSED
        try:
            yield
        finally:
            mailbox.phase = before
            self._step_began_ns += perf_counter_ns() - began_ns

    def report(self, metrics: dict[str, float | str]) -> None:
        """Show ``metrics`` to whoever watches. Raises ValueError if they do not fit."""
        self._mailbox.metrics = metrics

    def fail(self, text: str) -> None:
        """Say why this trainer is about to end."""
        self._mailbox.error = text

    def close(self) -> None:
        """Let go of the shared memory; the files belong to the worker."""
        self._preparation.close()
        self._slots.let_go()
        self._copier.close()
        self._mailbox.close()
        self._map.close()

    def _hold(self, step: Step) -> None:
        deadline_s = monotonic() + HOLD_S
        while self._tried != step:
            if monotonic() > deadline_s:
                _log.warning("the state of the last step was not asked for within %.0f s: it is not saved", HOLD_S)
                return
            self._mailbox.phase = TrainerPhase.HOLDING
            sleep(HOLD_POLL_S)  # training is over: nothing is held up but the script's last lines
            if self._mailbox.request != self._answered:
                self._answer(self._mailbox.request, step)

    def _miss(self) -> None:
        """The steps are over: what is still asked for can no longer be met."""
        request = self._mailbox.request
        if request != self._answered:
            self._mailbox.missed = self._answered = request

    def _answer(self, request: int, step: Step) -> None:
        _, wanted_step = unpack(request)
        if wanted_step > step:
            return  # not yet
        self._answered = request
        if request == 0:
            return
        if wanted_step < step:
            self._mailbox.missed = request
            return
        self._mailbox.phase = TrainerPhase.CHECKPOINTING
        with _no_garbage_collection():
            self._stage(request, step)
        self._mailbox.phase = TrainerPhase.TRAINING

    def _stage(self, request: int, step: Step) -> None:
        if self._capture is None:
            raise AssertionError("a step boundary before begin()")
        mailbox = self._mailbox
        self._tried = step
        began_ns = perf_counter_ns()
        try:
            failpoints.hit(Point.STAGE_BEFORE)
            image = self._layouts.lay_out(self._capture(step))
            slot = self._slots.choose(mailbox.stage_slot)
            memory = self._slots.reserve(slot, image.plan.total_bytes)
            mailbox.begin_staging(slot)
            arriving = image.copy_into(memoryview(memory.pages), self._copier, pinned=memory.pinned)
            failpoints.hit(Point.STAGE_WITHIN)
        except Exception as error:  # whatever a script's state_dict() may raise: no checkpoint stops training
            mailbox.stall_ns = perf_counter_ns() - began_ns
            self._stage_failed(request, step, error)
            return
        mailbox.stall_ns = perf_counter_ns() - began_ns
        self._staging = _Staging(
            request=request, step=step, slot=slot, size_bytes=image.plan.total_bytes, memory=memory, arriving=arriving
        )
        if arriving is None:
            self._settle()

    def _settle(self) -> None:
        """Wait for what is on its way, and tell the worker that it is staged."""
        staging, self._staging = self._staging, None
        if staging is None:
            return
        try:
            if staging.arriving is not None:
                staging.arriving.wait()
        except RuntimeError as error:
            self._stage_failed(staging.request, staging.step, error)
            return
        if self._error_shown:
            self._mailbox.error = ""
            self._error_shown = False
        self._slots.staged(staging.slot)
        self._slots.release()
        self._mailbox.publish_staged(staging.request, slot=staging.slot, size_bytes=staging.size_bytes)
        failpoints.hit(Point.STAGE_AFTER)
        self._preparation.want(staging.size_bytes)

    def _stage_failed(self, request: int, step: int, error: Exception) -> None:
        _log.warning("the state of step %d could not be stored", step, exc_info=error)
        self._mailbox.error = f"step {step} could not be stored: {one_line(error)}"
        self._error_shown = True
        self._mailbox.stage_failed = request
        self._preparation.look()  # it may have been a slot that was missing


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Put collections off: a full one takes longer, with torch loaded, than copying a GiB."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open_mailbox(path: Path) -> tuple[mmap.mmap, Mailbox]:
    try:
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), MAILBOX_BYTES)
        return mapped, Mailbox(mapped)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the worker's mailbox {path} cannot be used ({error}): start this script with 'dtrain run', "
            "or unset DTRAIN_RANK_DIR to run it by hand."
        ) from error
