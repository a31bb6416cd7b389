"""What a failure costs: dtrain against torchrun at its best, in one table.

Both run benchmarks/recovering.py with two ranks, by turns, so that whatever else the machine does hits both. torchrun
runs with settings without which it may hang or wait for a name server (TORCH_DISABLE_SHARE_RDZV_TCP_STORE,
RES_OPTIONS), and where nodes are lost with the shortest keep-alive that it takes.

    python benchmarks/recovery.py [--rounds 10] [--rows rank agent coordinator node start] [--only dtrain]

Rows:
    rank         kill -9 of a rank to the first new step on all ranks, and the parts of that
    agent        kill -9 of the worker agent: steps lost, and the worst step after it
    coordinator  the same for the coordinator
    node         agent and trainer of a node killed at once, another there: to the first new step on all ranks
    start        from pressing Enter to the end of the first step, on one machine
"""

import argparse
import statistics
from collections.abc import Sequence

import killed_ranks
import killed_services
import lost_nodes
import startup

ROWS = ("rank", "agent", "coordinator", "node", "start")
SIDES = ("dtrain", "torchrun")
WORDS = 66  # width of the first column


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="of each row and side")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--only", choices=SIDES, help="measure one side only")
    asked = parser.parse_args()
    sides = (asked.only,) if asked.only else SIDES
    print(f"{f'medians of {asked.rounds}':{WORDS}}" + "".join(f"{name:>14}" for name in SIDES), flush=True)
    if "rank" in asked.rows:
        print_ranks(killed_ranks.measure(sides, asked.rounds))
    for verb, words in (("worker", "agent"), ("coordinator", "coordinator")):
        if words in asked.rows and "dtrain" in sides:
            print_services(words, killed_services.measure(verb, asked.rounds))
    if "node" in asked.rows:
        took = {name: lost_nodes.measure(name, asked.rounds) for name in sides}
        print_row(f"node gone, another there (bound {lost_nodes.BOUND_S:g} s) -> first new step", took)
        if "torchrun" in sides:
            alone = lost_nodes.measure("torchrun", asked.rounds, alone=True)
            print_row("    torchrun's survivor alone", {"torchrun": alone})
    if "start" in asked.rows:
        first_s, _ = startup.measure_all(asked.rounds)
        print_row("cold start -> first step done", dict(zip(SIDES, first_s.values(), strict=True)))


def print_ranks(found: dict[str, list[killed_ranks.Parts]]) -> None:
    totals = {name: [parts[killed_ranks.TOTAL] for parts in rows] for name, rows in found.items()}
    print_row("kill -9 of a rank -> first new step on all ranks", totals)
    for part, words in killed_ranks.PARTS.items():
        cells = [[parts[part] for parts in found.get(name, []) if part in parts] for name in SIDES]
        print(f"    {words:{WORDS - 4}}" + "".join(cell(values) for values in cells), flush=True)


def print_services(name: str, costs: Sequence[killed_services.Cost]) -> None:
    print(f"{f'kill -9 of the {name}: steps lost, all kills together':{WORDS}}{sum(c.steps_lost for c in costs):14}")
    worst, before = ([getattr(cost, field) for cost in costs] for field in ("worst", "before"))
    print(f"    {'its worst step, in medians':{WORDS - 4}}{statistics.median(worst):14.2f}   worst {max(worst):.2f}")
    print(f"    {'the same before the kill':{WORDS - 4}}{statistics.median(before):14.2f}   worst {max(before):.2f}")


def print_row(words: str, values: dict[str, list[float]]) -> None:
    line = f"{words:{WORDS}}" + "".join(cell(values.get(name, [])) for name in SIDES)
    if len(values) == len(SIDES):
        ours, theirs = (statistics.median(values[name]) for name in SIDES)
        line += f"   torchrun / dtrain: {theirs / ours:.1f}"
    print(line, flush=True)
    for name, each in values.items():
        print(f"    {name + ', sorted: ' + ' '.join(f'{value:.2f}' for value in sorted(each))}", flush=True)


def cell(values: Sequence[float]) -> str:
    return f"{statistics.median(values):12.3f} s" if values else f"{'':14}"


if __name__ == "__main__":
    main()
