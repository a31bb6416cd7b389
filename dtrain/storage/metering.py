"""Who watches an upload, and may slow it down: told of the bytes before they go and when they are gone.

A store sends large objects in slices. Before each slice it asks the meter, which may let it wait (a bandwidth cap)
or raise (nobody wants the upload any more); after it, it tells how far it is, for people to see.
"""

from typing import Protocol


class Meter(Protocol):
    """Told by the threads of one upload, several at a time.

    The counts of ``moved`` add up to the object's size when the upload is done. One that fails may have told of less
    or, as its bytes may have been lost on their way, of more than what storage has: the next try begins at 0.
    """

    def before(self, count_bytes: int) -> None:
        """So many bytes go out next. May wait; may raise to end the upload."""
        ...

    def moved(self, count_bytes: int) -> None:
        """So many bytes went out, or were found in storage already. Below 0: they have to go again."""
        ...


class Unmetered:
    """Lets everything pass."""

    def before(self, count_bytes: int) -> None:
        del count_bytes

    def moved(self, count_bytes: int) -> None:
        del count_bytes


UNMETERED = Unmetered()
