"""The steps of a run, as a script's loops take them.

A loop that is left early has to be noticed when it is left: what a script does afterwards, an evaluation perhaps, is
no step, and may take long. Python closes a generator when nobody holds it any more, but a progress bar that the script
keeps holds what it was given. So each loop gets an iterator of its own, which ends with the loop.
"""

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from dtrain.common.errors import UserError

Batch = TypeVar("Batch")


class Steps(Iterator[Batch]):
    """One sequence of steps. A loop may be left, and another one may go on where it was."""

    def __init__(
        self, batches: Generator[Batch, None, None], *, leave: Callable[[], None], go_on: Callable[[], None]
    ) -> None:
        """``leave`` is called when a loop is left before the last step, ``go_on`` when another goes on with it."""
        self._batches = batches
        self._leave = leave
        self._go_on = go_on
        self._left = False
        self._failed: Exception | None = None  # what ended them

    def __iter__(self) -> Iterator[Batch]:
        self._take_up()
        try:
            while True:
                try:
                    batch = self._next()
                except StopIteration:
                    return
                yield batch
        except GeneratorExit:
            # By break, return or an exception of the body: which one cannot be seen here.
            self._left = True
            self._leave()
            raise

    def __next__(self) -> Batch:
        self._take_up()
        return self._next()

    def close(self) -> None:
        """No step will follow."""
        self._batches.close()

    def _next(self) -> Batch:
        """The next batch. Behind an error there is none: its place in the data could not be found again."""
        if self._failed is not None:
            raise UserError(
                f"run.steps() was asked for a batch behind an error ({type(self._failed).__name__}): what cannot be "
                "read is to be skipped in the dataset, or let the error end the rank."
            ) from self._failed
        try:
            return next(self._batches)
        except StopIteration:
            raise
        except Exception as error:
            self._failed = error
            raise

    def _take_up(self) -> None:
        if self._left:
            self._left = False
            self._go_on()
