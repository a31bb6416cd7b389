"""A job whose state is spoiled from one step on, in its first generation only, and which notices too late.

The checkpoint after that step is sound to the byte, and whatever is restored from it dies at once.
"""

import argparse
import time
from typing import Any

import dtrain

STEP_S = 0.1
NOTICED_AFTER = 12  # steps; a checkpoint is taken in between


class State:
    """What is tracked: whether all is well."""

    def __init__(self) -> None:
        self.spoiled = False

    def state_dict(self) -> dict[str, Any]:
        return {"spoiled": self.spoiled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spoiled = state["spoiled"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--spoil-at", type=int, required=True)
    args = parser.parse_args()
    state = State()
    with dtrain.join() as run:
        run.track(state=state)
        for _ in run.steps(range(args.steps), until=args.steps):
            if run.generation == 1 and run.step >= args.spoil_at:
                state.spoiled = True
            if state.spoiled and (run.generation > 1 or run.step >= args.spoil_at + NOTICED_AFTER):
                raise ValueError("loss is nan")
            time.sleep(STEP_S)


if __name__ == "__main__":
    main()
