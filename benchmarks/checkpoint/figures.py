"""The table's rows: each figure beside what it is held against, and whether it is reached."""

from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. ``ratio`` is ours against the other's, as the bound counts it."""

    what: str
    setting: str  # ranks and threads
    ours: str
    against: str
    ratio: float
    bound: float
    most: bool  # the bound is the largest allowed, not the smallest

    @property
    def reached(self) -> bool:
        return self.ratio <= self.bound if self.most else self.ratio >= self.bound

    def cells(self) -> tuple[str, ...]:
        sign = "≤" if self.most else "≥"
        said = "yes" if self.reached else "NO"
        return (self.what, self.setting, self.ours, self.against, f"{self.ratio:.2f}", f"{sign} {self.bound:g}", said)


def warm(values: list[float]) -> float:
    """The median of all but the first."""
    return median(values[1:])


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def gib_s(size_bytes: int, seconds: float) -> str:
    return f"{size_bytes / seconds / (1 << 30):.2f} GiB/s"


def as_markdown(rows: list[Row]) -> str:
    """The rows as a table for people and for the documents."""
    head = ("figure", "ranks × threads", "dtrain", "against", "ratio", "to reach", "reached")
    lines = [head, ("---",) * len(head), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
