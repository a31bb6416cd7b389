"""What a checker says."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    checker: str
    text: str
