"""`python -m tests.sim.planted`: hunt for every planted fault and write the table of what caught it."""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.sim.planted.faults import PLANTED, Planted
from tests.sim.planted.hunts import Caught, hunt

TABLE = Path(__file__).parent / "README.md"
HEAD = """# Planted faults

Each line is one fault, planted into a copy of the product, and hunted with schedules from seed 1 on: how many it
took, and which checker spoke first. `make sim-planted` writes this table anew; at most 2000 schedules a fault.
`python -m tests.sim.planted --only NAME` hunts for some, and writes their lines.

| planted fault | file | schedules until caught | caught by |
|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.planted", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--within-s", type=float, default=3000.0, help="of each hunt")
    parser.add_argument("--only", default="", help="only faults whose name holds this")
    options = parser.parse_args()

    def one(fault: Planted) -> tuple[Planted, Caught]:
        caught = hunt(fault, seeds=options.seeds, first=options.first, within_s=options.within_s, timeout_s=3600.0)
        print(f"{caught.seeds:5d}  {caught.checker or 'NOT CAUGHT'}  <-  {fault.name}: {caught.text[:120]}", flush=True)
        return fault, caught

    chosen = [fault for fault in PLANTED if options.only in fault.name]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(one, chosen))
    write(results)
    return 0 if all(caught.checker for _, caught in results) else 1


def write(results: list[tuple[Planted, Caught]]) -> None:
    """Write the table, with the lines of those that were not hunted for as they were."""
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in TABLE.read_text().splitlines()}
    for fault, caught in results:
        seeds = str(caught.seeds) if caught.checker else f"not within {caught.seeds}"
        lines[fault.name] = f"| {fault.name} | `{fault.file}` | {seeds} | {caught.checker or '-'} |"
    TABLE.write_text(HEAD + "".join(f"{lines[fault.name]}\n" for fault in PLANTED if fault.name in lines))


if __name__ == "__main__":
    sys.exit(main())
