"""The command: `python -m tests.sim --seeds N` or `--seed S --trace`."""

import sys

from tests.sim.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
