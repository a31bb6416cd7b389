"""Reads the trainers' mailboxes, and writes the agent's words into them.

A trainer never calls its agent, so the agent looks. A look is a few loads from shared memory, so it can be
frequent: a staged state is noticed within POLL_S. Words that decide something are told at once; progress, which
changes with every step, is told at the heartbeat's rate.
"""

import json
import logging
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

from dtrain.common.mailbox import MAILBOX_BYTES, Mailbox, RestoreState
from dtrain.common.names import Generation, JobName
from dtrain.worker.core.inputs import MailboxSeen
from dtrain.worker.rank_dirs import RankId
from dtrain.worker.transfers import Transfer

logger = logging.getLogger(__name__)

POLL_S = 0.02  # between two looks: 50 a second cost about a thousandth of a core for eight ranks


class _Watched:
    """One mapped mailbox, and what was told of it last."""

    def __init__(self, of: RankId, path: Path) -> None:
        self.of = of
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), MAILBOX_BYTES)
        self.box = Mailbox(self._page)
        self.urgent: tuple[int, ...] = ()
        self.progress: tuple[int, ...] = ()
        self.told_at = float("-inf")
        self.readable = True
        self._metrics = ""

    def close(self) -> None:
        self.box.close()
        self._page.close()

    def look(self, now: float, every_s: float) -> MailboxSeen | None:
        """Return what the mailbox holds if it is worth telling now."""
        box = self.box
        staged = box.staged
        urgent = (box.phase, *staged, box.missed, box.stage_failed, box.until_step, box.tracking)
        progress = (box.completed_step, box.step_ns)
        if urgent == self.urgent and (progress == self.progress or now - self.told_at < every_s):
            return None
        self.urgent, self.progress, self.told_at = urgent, progress, now
        return self.read()

    def read(self) -> MailboxSeen:
        box = self.box
        staged, slot, size_bytes = box.staged
        self._metrics = json.dumps(box.metrics) if box.metrics else self._metrics
        return MailboxSeen(
            job=self.of.job,
            generation=self.of.generation,
            rank=self.of.rank,
            phase=box.phase.name.lower(),
            completed_step=box.completed_step,
            until_step=box.until_step,
            tracking=box.tracking,
            staged=staged,
            staged_slot=slot,
            staged_bytes=size_bytes,
            missed=box.missed,
            stage_failed=box.stage_failed,
            error=box.error if box.stage_failed else "",
            step_s=box.step_ns / 1e9,
            metrics_json=self._metrics,
        )


class Mailboxes:
    """All mailboxes of the agent's ranks. Used in the event loop only."""

    def __init__(
        self,
        emit: Callable[[MailboxSeen], None],
        *,
        progress_every_s: float,
        on_need: Callable[[RankId, int], None],
    ) -> None:
        self._emit = emit
        self._on_need = on_need  # the rank wants slots of so many bytes; told until it has them
        self._progress_every_s = progress_every_s
        self._watched: dict[RankId, _Watched] = {}

    def watch(self, of: RankId, folder: Path) -> bool:
        """Begin to look at the rank's mailbox; return whether there is one."""
        if of not in self._watched:
            try:
                self._watched[of] = _Watched(of, folder / "mailbox")
            except (FileNotFoundError, ValueError) as error:
                logger.warning("no mailbox for %s: %s", of, error)
                return False
        return True

    def forget(self, job: str, generation: int) -> None:
        for of in [of for of in self._watched if of.job == job and of.generation == generation]:
            self._watched.pop(of).close()

    def close(self) -> None:
        for watched in self._watched.values():
            watched.close()
        self._watched.clear()

    def poll(self, now: float) -> None:
        """Look at every mailbox once."""
        for watched in self._watched.values():
            try:
                seen = watched.look(now, self._progress_every_s)
            except ValueError as error:  # a script scribbled into the page; its rank is judged by its exit
                if watched.readable:
                    logger.warning("the mailbox of %s cannot be read: %s", watched.of, error)
                watched.readable = False
                continue
            watched.readable = True
            if seen is not None:
                self._emit(seen)
            if watched.box.needed_bytes > watched.box.slots[1]:
                self._on_need(watched.of, watched.box.needed_bytes)

    def read_last(self, of: RankId) -> None:
        """Tell what the mailbox holds after its trainer is gone."""
        if of in self._watched:
            try:
                self._emit(self._watched[of].read())
            except ValueError as error:
                logger.warning("the mailbox of %s cannot be read: %s", of, error)

    def ask_stage(self, of: RankId, word: int, choose_slot: Callable[[], int]) -> None:
        """Ask the rank to stage; which slot is settled when it is asked for the first time."""
        if of in self._watched and self._watched[of].box.request != word:
            self._watched[of].box.ask(word, slot=choose_slot())

    def open_slots(self, of: RankId, first: int, size_bytes: int) -> None:
        """Tell the rank that a pair of slots is allocated."""
        if of in self._watched:
            self._watched[of].box.publish_slots(first, size_bytes)

    def open_restore(self, of: RankId) -> None:
        if of in self._watched:
            self._watched[of].box.restore = RestoreState.READY

    def reading(self) -> Iterator[tuple[tuple[JobName, Generation], Transfer]]:
        """How far those trainers are that now read what they start from themselves."""
        for of, watched in self._watched.items():
            done, total = watched.box.reading
            if total:
                yield (of.job, of.generation), Transfer(bytes_done=done, bytes_total=total)

    def slot_holds(self, of: RankId, slot: int) -> int:
        """The packed word of the state that lies whole in the slot; 0 for none, or if the mailbox is gone."""
        return self._watched[of].box.slot_holds(slot) if of in self._watched else 0
