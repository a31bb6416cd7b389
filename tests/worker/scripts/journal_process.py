"""Writes step after step into a journal and says each on standard output once it is on the disk."""

import sys
from pathlib import Path

from dtrain.worker.core.actions import JournalAssignment, JournalCommand, JournalTerm
from dtrain.worker.core.inputs import Input
from dtrain.worker.core.machine import step
from dtrain.worker.journal import Journal
from tests.worker.facts_of_trainers import exited, node_state, ready, start, started


def story(generation: int) -> list[Input]:
    return [
        start(id=f"start/{generation}", generation=generation, seq=generation, term=generation),
        ready(generation=generation),
        started(0, generation=generation),
        exited(0, code=generation % 100, generation=generation),
        exited(1, code=generation % 100, generation=generation),
    ]


if __name__ == "__main__":
    journal = Journal(Path(sys.argv[1]))
    state, generation = node_state(), 0
    while True:
        generation += 1
        for fact in story(generation):
            state, actions = step(state, fact, 0.0)
            entries = [a for a in actions if isinstance(a, JournalTerm | JournalCommand | JournalAssignment)]
            if entries:
                journal.write(entries)
                print(generation, flush=True)
