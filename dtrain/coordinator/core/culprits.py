"""Which rank a hang comes from, judged by where all of them stand.

All ranks of a generation meet in collectives, so one that is stuck soon has all others waiting for it. They are its
victims: their stacks end in torch's distributed code, or in a backward pass, where gradients are exchanged. The
culprit is behind the others, or stands somewhere else. Where all stand alike nobody can be named.

Two things look otherwise than they are:

- Who waits for a GPU stands on a line of the script's own (``loss.item()``), and in no frame of torch. Where more than
  half of the ranks stand on one such line, they wait there: none of them is the culprit.
- Who has ended its steps before the others' (less data, an early return) may have ended altogether, and well. It is
  the one that the others wait for, wherever the rest of them stand.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Where a rank waits for its peers: frames of torch.distributed, the wrappers that exchange a model's buffers, and the
# engine that runs the exchange of gradients.
_WAITING = re.compile(r"torch/distributed/|torch/nn/parallel/|_engine_run_backward|torch/cuda/.*synchronize")
_WAITING_FRAMES = 3  # how many of the newest frames are looked at: wrappers lie on top of the call
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
_LIBRARY = re.compile(r"/site-packages/|/dist-packages/|/lib/python3|/torch/")
LEFT = "ended its steps"  # the first words in place of the stack of a rank that has
TOP_CHARS = 200  # of the frame that stands for a stack in a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where one rank stands."""

    rank: int
    worker: str
    step: int  # completed
    stack: str  # newest frame first; or why there is none
    left: bool = False  # it has ended its steps, before the others had done theirs; its stack begins with LEFT

    @property
    def waits(self) -> bool:
        return any(_WAITING.search(frame) for frame in self.stack.splitlines()[:_WAITING_FRAMES])

    @property
    def line(self) -> str:
        """Where it stands in the script's own code; empty if that is not known."""
        frame = _own_frame(self.stack)
        return f"{frame['file']}:{frame['line']}" if frame is not None else ""


def culprit_of(standings: Sequence[Standing]) -> Standing | None:
    """The rank that the others seem to wait for; None if they all stand alike."""
    left = [standing for standing in standings if standing.left]
    if left:
        return min(left, key=lambda standing: (standing.step, standing.rank))
    if len(standings) == 1:
        return standings[0]
    seeming = [standing for standing in standings if not standing.waits]
    lines = Counter(standing.line for standing in seeming if standing.line)
    idle = [standing for standing in seeming if lines[standing.line] * 2 <= len(standings)]
    behind = [standing for standing in standings if standing.step == min(s.step for s in standings)]
    for suspects in ([s for s in behind if s in idle], idle, behind):
        if 0 < len(suspects) < len(standings):
            return min(suspects, key=lambda standing: standing.rank)
    return None


def _own_frame(stack: str) -> re.Match[str] | None:
    """The newest frame of the script's own."""
    return next((frame for frame in _FRAME.finditer(stack) if not _LIBRARY.search(frame["file"])), None)


def top_of(stack: str) -> str:
    """The newest frame of the script's own in words, else the newest.

    Of a stack without frames, and of a rank that left, the first line.
    """
    frame = None if stack.startswith(LEFT) else _own_frame(stack) or _FRAME.search(stack)
    if frame is None:
        return stack.partition("\n")[0][:TOP_CHARS]
    return f"{frame['name']}, {frame['file']}:{frame['line']}"[-TOP_CHARS:]
