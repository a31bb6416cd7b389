"""Which rank a hang comes from, judged by where all of them stand.

All ranks of a generation meet in collectives, so one that is stuck soon has all others waiting for it. They are its
victims: their stacks end in torch's distributed code, or in a backward pass, where gradients are exchanged. The
culprit is behind the others, or stands somewhere else. Where all stand alike nobody can be named.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Where a rank waits for its peers: frames of torch.distributed, and the engine that runs the exchange of gradients.
_WAITING = re.compile(r"torch/distributed/|_engine_run_backward|torch/cuda/.*synchronize")
_WAITING_FRAMES = 3  # how many of the newest frames are looked at: wrappers lie on top of the call
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
_LIBRARY = re.compile(r"/site-packages/|/dist-packages/|/lib/python3|/torch/")
TOP_CHARS = 200  # of the frame that stands for a stack in a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where one rank stands."""

    rank: int
    worker: str
    step: int  # completed
    stack: str  # newest frame first; or why there is none

    @property
    def waits(self) -> bool:
        return any(_WAITING.search(frame) for frame in self.stack.splitlines()[:_WAITING_FRAMES])


def culprit_of(standings: Sequence[Standing]) -> Standing | None:
    """The rank that the others seem to wait for; None if they all stand alike."""
    if len(standings) == 1:
        return standings[0]
    idle = [standing for standing in standings if not standing.waits]
    behind = [standing for standing in standings if standing.step == min(s.step for s in standings)]
    for suspects in ([s for s in behind if s in idle], idle, behind):
        if 0 < len(suspects) < len(standings):
            return min(suspects, key=lambda standing: standing.rank)
    return None


def top_of(stack: str) -> str:
    """The newest frame of the script's own in words, else the newest; of a stack without frames its first line."""
    frames = list(_FRAME.finditer(stack))
    frame = next((frame for frame in frames if not _LIBRARY.search(frame["file"])), frames[0] if frames else None)
    if frame is None:
        return stack.partition("\n")[0][:TOP_CHARS]
    return f"{frame['name']}, {frame['file']}:{frame['line']}"[-TOP_CHARS:]
